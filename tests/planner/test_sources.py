"""Shapes the planner knows, against the models that transformers really builds."""

from __future__ import annotations

import json
import math
import os
import signal
import struct

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from came8bit import CAME8bit, CAME32bit, planner, save_checkpoint
from came8bit.planner.sources import INDEX, read_header

SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 320, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 64}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

# model_type, what its config.json says
CONFIGS = [
    ("llama", SIZES),
    ("llama", {**SIZES, "tie_word_embeddings": True}),
    ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("llama", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    ("mistral", SIZES),
    ("mistral", {**SIZES, "head_dim": 32}),
    ("qwen2", SIZES),
    ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    ("qwen3", SIZES),
    ("qwen3", {**SIZES, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", SIZES),
    ("gemma", {**SIZES, "head_dim": 32, "attention_bias": True}),
    ("gemma2", SIZES),
    ("gemma3_text", {**SIZES, "head_dim": 32}),
    ("phi3", SIZES),
    ("olmo2", SIZES),
    ("olmo2", {**SIZES, "attention_bias": True}),
    ("granite", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", SIZES),
    ("smollm3", {**SIZES, "tie_word_embeddings": False}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_neox", NEOX),
    ("gpt_neox", {**NEOX, "attention_bias": False, "tie_word_embeddings": True}),
]


def built(kind, settings):
    """Shapes and (of the tables of ``nn.Embedding``) names, from a model on the meta device."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **settings, **tokens)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = model.modules()
    tables = [id(m.weight) for m in modules if isinstance(m, torch.nn.Embedding)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, {name for name, p in model.named_parameters() if id(p) in tables}


@pytest.mark.parametrize(("kind", "settings"), CONFIGS, ids=lambda value: str(value)[:20])
def test_every_parameter_is_that_of_transformers(kind, settings):
    shapes, tables = built(kind, settings)
    architecture = planner.architecture_of({**settings, "model_type": kind})
    parameters = architecture.parameters()
    assert {p.name: p.shape for p in parameters} == shapes
    assert len(parameters) == len(shapes)
    assert {p.name for p in parameters if p.embedding} == tables
    stages = [stage.name for stage in architecture.stages(1, 8, 2)]
    assert len(set(stages)) == len(stages)
    assert {p.stage for p in parameters} == set(stages)


@pytest.mark.parametrize("name", [n for n in planner.CONFIGS if n != "sana-1.6b"])
def test_named_models_are_those_of_transformers(name):
    settings = dict(planner.CONFIGS[name][1])
    shapes, _ = built(settings.pop("model_type"), settings)
    assert {p.name: p.shape for p in planner.named(name).parameters} == shapes


# --- what stands on the layers --------------------------------------------------------------------

CLASSES = [
    ("llama", "LlamaForCausalLM"),
    ("llama", "LlamaModel"),
    ("llama", "LlamaForSequenceClassification"),
    ("llama", "LlamaForTokenClassification"),
    ("mistral", "MistralModel"),
    ("mistral", "MistralForSequenceClassification"),
    ("qwen2", "Qwen2Model"),
    ("qwen2", "Qwen2ForTokenClassification"),
    ("qwen3", "Qwen3ForSequenceClassification"),
    ("gemma", "GemmaForTokenClassification"),
    ("gemma2", "Gemma2ForSequenceClassification"),
    ("gemma3_text", "Gemma3ForCausalLM"),
    ("gemma3_text", "Gemma3TextModel"),
    ("gemma3_text", "Gemma3TextForSequenceClassification"),
    ("phi3", "Phi3ForTokenClassification"),
    ("olmo2", "Olmo2ForSequenceClassification"),
    ("granite", "GraniteModel"),
    ("smollm3", "SmolLM3ForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2Model"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2ForTokenClassification"),
    ("gpt_neox", "GPTNeoXModel"),
    ("gpt_neox", "GPTNeoXForSequenceClassification"),
    ("gpt_neox", "GPTNeoXForTokenClassification"),
]
_SETTINGS = {"gpt2": GPT2, "gpt_neox": NEOX}


@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_the_class_in_config_json_decides_the_head(tmp_path, kind, name, labels):
    settings = {**_SETTINGS.get(kind, SIZES), "num_labels": labels}
    config = AutoConfig.for_model(kind, **settings, pad_token_id=0)
    with torch.device("meta"):
        built = getattr(transformers, name)(config)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    model = planner.from_path(tmp_path)
    assert {p.name: p.shape for p in model.parameters} == {
        name: tuple(p.shape) for name, p in built.named_parameters()
    }
    assert name in model.source
    assert {p.stage for p in model.parameters} == {
        s.name for s in model.architecture.stages(1, 8, 2)
    }
    language = name.endswith(("CausalLM", "LMHeadModel"))
    bare = name.endswith("Model") and not language
    assert model.architecture.logits == (320 if language else 0 if bare else labels)
    assert bool(model.notes) == bare


def test_old_spellings_of_llama_are_llama():
    for name in ("LlamaForCausalLM", "LLaMAForCausalLM"):
        assert planner.architecture_of({**LLAMA, "architectures": [name]}).logits == 320


OTHER_CLASSES = [
    ["LlamaForQuestionAnswering"],
    ["LlamaForCausalLMEagle"],
    ["MistralForCausalLM"],
    ["LlamaModel", "LlamaForCausalLM"],
    "LlamaModel",
    [None],
]


@pytest.mark.parametrize("named", OTHER_CLASSES, ids=str)
def test_other_classes_are_refused_with_another_way(named):
    with pytest.raises(
        planner.UnknownModel, match=r"knows the language model.*safetensors"
    ) as error:
        planner.architecture_of({**LLAMA, "architectures": named})
    assert "LlamaModel, LlamaForSequenceClassification" in str(error.value)


def test_a_gpt2_with_two_heads_is_refused():
    config = {**GPT2, "model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}
    with pytest.raises(planner.UnknownModel, match="got architectures GPT2DoubleHeadsModel"):
        planner.architecture_of(config)


def test_published_parameter_counts():
    counts = {
        "gpt2": 124_439_808,
        "llama-1b": 1_235_814_400,
        "llama-7b": 6_738_415_616,
        "llama-8b": 8_030_261_248,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-7b": 7_615_616_512,
        "gemma-2b": 2_506_172_416,
    }
    assert {name: planner.named(name).numel for name in counts} == counts


def sana(**changes):
    architecture = planner.architecture_of({**planner.CONFIGS["sana-1.6b"][1], **changes})
    return planner.from_architecture("sana", "", architecture)


# What diffusers 0.42.1's SanaTransformer2DModel has, built on the meta device with these settings.
SANA = [
    ({}, 396, 1_604_462_752),
    ({"num_layers": 60}, 1156, 4_721_288_352),
    ({"qk_norm": "rms_norm_across_heads"}, 476, 1_604_641_952),
    ({"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, 480, 1_610_237_472),
    ({"attention_bias": True, "patch_size": 2, "out_channels": 16}, 456, 1_604_883_904),
]


@pytest.mark.parametrize(("changes", "tensors", "numel"), SANA)
def test_sana_has_the_parameters_that_diffusers_gives_it(changes, tensors, numel):
    model = sana(**changes)
    assert len(model.parameters) == len({p.name for p in model.parameters}) == tensors
    assert model.numel == numel


def test_sana_in_detail():
    shapes = {p.name: p.shape for p in sana().parameters}
    assert shapes["time_embed.linear.weight"] == (13_440, 2240)
    assert shapes["transformer_blocks.19.ff.conv_depth.weight"] == (11_200, 1, 3, 3)
    assert shapes["transformer_blocks.0.attn2.to_k.bias"] == (2240,)
    assert "transformer_blocks.0.attn1.to_k.bias" not in shapes
    assert sana().largest.name == "time_embed.linear.weight"


# --- what cannot be read --------------------------------------------------------------------------

LLAMA = {**SIZES, "model_type": "llama"}
REFUSED = [
    ({"model_type": "mamba"}, r"type 'mamba'; known are llama, .* the \.safetensors|\.safetensors"),
    ({}, "names no model_type; known are"),
    ({"model_type": ["llama"]}, "known are llama"),
    ({**LLAMA, "hidden_size": None}, "lacks 'hidden_size'"),
    ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads = 0, expected a whole number"),
    ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ({**LLAMA, "num_hidden_layers": "many"}, "many"),
    ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers = True"),
    ({**LLAMA, "hidden_size": -64}, "hidden_size = -64"),
    ({**LLAMA, "hidden_size": 1.5}, "hidden_size = 1.5"),
    ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads = 0"),
    ({**LLAMA, "vocab_size": [1]}, r"vocab_size = \[1\]"),
    ({**GPT2, "model_type": "gpt2", "n_inner": -1}, "n_inner = -1"),
    ({**GPT2, "model_type": "gpt2", "resid_pdrop": []}, "this gpt2 cannot be read"),
    (
        {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "id2label": {}},
        "gives 0 labels",
    ),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantized"),
    ({**SIZES, "model_type": "mistral", "num_key_value_heads": None}, "'num_key_value_heads'"),
    ({**GPT2, "model_type": "gpt2", "add_cross_attention": True}, "cross-attention"),
    ({**planner.CONFIGS["sana-1.6b"][1], "interpolation_scale": 1}, "interpolation_scale"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_unknown_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        planner.architecture_of(config)


def test_a_size_may_be_a_float_that_is_whole():
    assert planner.architecture_of({**LLAMA, "vocab_size": 1e3}).vocabulary == 1000


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(planner.UnknownModel, match=r"'gpt5'.*names are gpt2, gpt2-medium"):
        planner.named("gpt5")


# --- safetensors ----------------------------------------------------------------------------------


def test_a_safetensors_file_gives_the_shapes(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "wte.weight": torch.zeros(50, 8, dtype=torch.bfloat16),
        "h.0.attn.c_attn.bias": torch.zeros(24),
        "h.0.attn.bias": torch.zeros(1, 1, 6, 6),
        "position_ids": torch.zeros(6, dtype=torch.int64),
        "scale": torch.zeros(()),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    model = planner.from_path(path)
    assert {p.name: p.shape for p in model.parameters} == {
        "wte.weight": (50, 8),
        "h.0.attn.c_attn.bias": (24,),
        "scale": (),
    }
    assert [p.name for p in model.parameters if p.embedding] == ["wte.weight"]
    assert model.architecture is None
    assert model.notes[0].startswith("2 tensors that do not train are left out: ")


def test_an_index_gives_the_shapes_of_all_its_files(tmp_path):
    names = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    save_file({"a.weight": torch.zeros(3, 4)}, tmp_path / "one.safetensors")
    save_file({"b.weight": torch.zeros(5)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for path in (tmp_path / INDEX, tmp_path):
        assert [p.shape for p in planner.from_path(path).parameters] == [(3, 4), (5,)]
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not beside it: two\.safetensors"):
        planner.from_path(tmp_path / INDEX)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="'weight_map'"):
        planner.from_path(tmp_path / INDEX)


def test_a_folder_gives_its_config_or_else_its_weights(tmp_path):
    with pytest.raises(ValueError, match="neither a config"):
        planner.from_path(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(planner.UnknownModel, match="mamba"):
        planner.from_path(tmp_path)
    save_file({"w": torch.zeros(7)}, tmp_path / "model.safetensors")
    model = planner.from_path(tmp_path)
    assert model.numel == 7
    assert model.unknown == "a model of type 'mamba'"
    save_file({"w": torch.zeros(7)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files and no index"):
        planner.from_path(tmp_path)
    config.write_text(json.dumps(LLAMA))
    assert planner.from_path(tmp_path).architecture is not None


def test_only_the_header_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    description = {"w": {"dtype": "BF16", "shape": [10**6, 10**4], "data_offsets": [0, 2 * 10**10]}}
    header = json.dumps(description).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)  # and nothing after it
    assert planner.from_path(path).numel == 10**10
    assert read_header(path) == description


BROKEN = [
    (b"", "not a safetensors file"),
    (b"\xff" * 64, "not a safetensors file"),
    (struct.pack("<Q", 100) + b"{}", "cut off: 2 of 100 bytes"),
    (struct.pack("<Q", 5) + b"{nope", "not JSON"),
    (struct.pack("<Q", 2) + b"[]", "not an object"),
    (struct.pack("<Q", 7) + b'{"a":1}', "describes 'a' as 1"),
    (struct.pack("<Q", 2) + b"{}", "no tensors"),
    (struct.pack("<Q", 34) + b'{"a":{"dtype":"F32","shape":[-3]}}', "describes 'a' as"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        planner.from_path(path)


@pytest.mark.parametrize("cls", [CAME8bit, CAME32bit])
def test_the_state_of_an_optimizer_is_no_model(tmp_path, cls):
    weight = torch.zeros(100, 80, requires_grad=True)
    weight.grad = torch.ones(100, 80)
    optimizer = cls([("w", weight)])
    optimizer.step()
    save_checkpoint(optimizer, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"of a came8bit optimizer.*came8bit inspect .*x\.safe"):
        planner.from_path(tmp_path / "x.safetensors")


@pytest.fixture
def patience():
    """Whoever waits longer than this would wait for ever."""

    def enough(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, enough)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_refused_and_not_waited_for(tmp_path, name, patience):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="a pipe or a device, expected a file"):
        planner.from_path(tmp_path / name)


def test_quantized_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    packed = torch.zeros(64, 64, dtype=torch.int32)
    save_file({"w.qweight": packed, "w.scales": torch.zeros(64)}, path)
    with pytest.raises(ValueError, match=r"4,096 values that are neither fp32.*quantized"):
        planner.from_path(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a config\.json"):
        planner.from_path(path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        planner.from_path(config)
    config.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got a list"):
        planner.from_path(config)


def test_numel_of_a_scalar():
    assert planner.Parameter("scale", ()).numel == math.prod(()) == 1
