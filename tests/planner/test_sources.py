"""Where models come from, and which files are refused."""

import json
import os
import signal
import struct
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from came8bit import CAME8bit, CAME32bit, planner, save_checkpoint
from came8bit.planner.sources import INDEX, read_header

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
named = cache(planner.named)


def test_published_parameter_counts():
    counts = {
        "gpt2": 124_439_808,
        "llama-1b": 1_235_814_400,
        "llama-7b": 6_738_415_616,
        "llama-8b": 8_030_261_248,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-7b": 7_615_616_512,
        "gemma-2b": 2_506_172_416,
        "sana-1.6b": 1_604_462_752,
    }
    assert {name: named(name).numel for name in counts} == counts
    assert named("sana-1.6b").largest.shape == (13_440, 2240)
    tables = [p.name for p in named("gpt2").parameters if p.embedding]
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(planner.UnknownModel, match=r"'gpt5'.*names are gpt2, gpt2-medium"):
        planner.named("gpt5")


# --- config.json ----------------------------------------------------------------------------------


def write(folder, config):
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


REFUSED = [
    ({"model_type": "nonesuch"}, r"does not know a model of type 'nonesuch'\. Give .*safetensors"),
    ({}, "does not know a model without a model_type"),
    ({"model_type": ["llama"]}, "does not know"),
    ({"model_type": "mixtral", "architectures": ["os"]}, "no class 'os'"),
    ({**LLAMA, "architectures": ["LlamaModel", "LlamaForCausalLM"]}, "names the class, is"),
    ({**LLAMA, "hidden_size": -64}, "fails to build LlamaForCausalLM"),
    ({**LLAMA, "num_hidden_layers": "many"}, "many"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantized"),
    ({"_class_name": "os"}, "no class 'os'"),
    ({**LLAMA, "num_labels": 2147483648}, "got num_labels 2147483648, expected at most 100,000"),
    ({**LLAMA, "num_hidden_layers": 10**6}, "got num_hidden_layers 1000000, expected at most"),
    ({**LLAMA, "rope_scaling": {"factor": [1e400]}}, "got factor inf"),
    ({**LLAMA, "vocab_size": 2**40}, "got vocab_size"),
    ({**LLAMA, "num_hidden_layers": "201"}, "got num_hidden_layers 201, expected at most 200"),
    ({**LLAMA, "vocab_size": 10**400}, "got vocab_size 1000000"),
    (
        {**LLAMA, "model_type": "mixtral", "num_hidden_layers": 175, "num_local_experts": 400},
        "got 175 layers and 400 experts, expected at most 65,536 experts in all layers together",
    ),
    ("[" * 50_000, "nested too deep"),
    ('{"a":' * 900 + "1" + "}" * 900, "nested too deep, expected at most 50 levels"),
    ('{"a":' * 50_000, "nested too deep"),
    ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' is there twice"),
    ("{", "is not JSON"),
    ("[]", "expected a JSON object, got a list"),
    ("9" * 5000, "is not JSON"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_configurations_that_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message) as refused:
        planner.from_path(write(tmp_path, config))
    assert "\n" not in str(refused.value)


def test_a_config_that_is_not_utf8_or_too_long_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(json.dumps(LLAMA).encode("utf-16"))
    with pytest.raises(ValueError, match="is not JSON"):
        planner.from_path(path)
    path.write_bytes(b" " * 10_000_001)
    with pytest.raises(ValueError, match="at most 10,000,000 bytes"):
        planner.from_path(path)


def test_old_spellings_of_llama_are_llama(tmp_path):
    config = {**LLAMA, "architectures": ["LLaMAForCausalLM"], "pad_token_id": None}
    assert "LlamaForCausalLM" in planner.from_path(write(tmp_path, config)).source


def test_what_does_not_train_is_left_out(tmp_path):
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 90}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    name = "WhisperForConditionalGeneration"
    config = {"model_type": "whisper", "architectures": [name], **sizes, **heads}
    model = planner.from_path(write(tmp_path, config))
    said = "1 tensors that do not train are left out: model.encoder.embed_positions.weight."
    assert said in model.notes
    with pytest.raises(planner.Untraceable, match="the input 'input_features'"):
        model.workload.trace("fp32", 1, 8)


def test_without_the_library_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(planner.UnknownModel, match=r"built by transformers: pip install .*\[cli\]"):
        planner.from_path(write(tmp_path, LLAMA))


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
    assert model.workload is None
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
    write(tmp_path, {"model_type": "nonesuch"})
    with pytest.raises(planner.UnknownModel, match="nonesuch"):
        planner.from_path(tmp_path)
    save_file({"w": torch.zeros(7)}, tmp_path / "model.safetensors")
    model = planner.from_path(tmp_path)
    assert model.numel == 7
    assert "does not know a model of type 'nonesuch'" in model.unknown
    save_file({"w": torch.zeros(7)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files and no index"):
        planner.from_path(tmp_path)
    write(tmp_path, LLAMA)
    assert planner.from_path(tmp_path).workload is not None


def header(text, data=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, end, begin=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_only_the_header_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    description = {"w": entry([10**6, 10**4], 2 * 10**10, dtype="BF16")}
    path.write_bytes(header(description))
    os.truncate(path, path.stat().st_size + 2 * 10**10)  # a hole takes no room
    assert planner.from_path(path).numel == 10**10
    assert read_header(path) == description


_ONE = {"a": entry([3], 12)}
BROKEN = [
    (b"", "not a safetensors file"),
    (b"\xff" * 64, "not a safetensors file"),
    (struct.pack("<Q", 100) + b"{}", "cut off: got 2 of 100 bytes"),
    (header(b"{nope"), "not JSON"),
    (header(b"[]"), "expected a JSON object"),
    (header(b'{"a":1}'), "describes 'a' as 1"),
    (header(b"{}"), "no tensors"),
    (header(json.dumps(_ONE).encode("utf-16"), b"0" * 12), "not JSON"),
    (header(b'{"a":{"a":1,"a":2}}'), "the key 'a' is there twice"),
    (header(b'{"a":' * 50_000), "nested too deep"),
    (header({"a": entry([-3], 12)}), "damaged: its header describes 'a' as"),
    (header({"a": entry([2.7], 12)}, b"0" * 12), "describes 'a' as"),
    (header({"a": entry([True], 4)}, b"0" * 4), "describes 'a' as"),
    (header({"a": entry("3", 12)}, b"0" * 12), "describes 'a' as"),
    (header({"a": entry([3], 16)}, b"0" * 16), "describes 'a' as"),
    (header({"a": entry([2**40, 2**40], 12)}, b"0" * 12), "describes 'a' as"),
    (header({"a": {"dtype": "F32", "shape": [3]}}, b"0" * 12), "describes 'a' as"),
    (header(_ONE), "got 0 bytes of tensors, expected 12"),
    (header(_ONE, b"0" * 13), "got 13 bytes of tensors, expected 12"),
    (header({**_ONE, "b": entry([2], 16, 8)}, b"0" * 16), "'b' begins at 8, expected 12"),
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
