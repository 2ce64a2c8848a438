"""``came8bit estimate``."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers

from came8bit import planner
from came8bit.cli import estimate, estimate_transformers, main
from came8bit.planner.report import PARTS, bar_of


def run(capsys, *arguments):
    code = main(["estimate", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_report_names_everything(capsys):
    code, text, _ = run(capsys, "llama-7b", "--sequence", "2048", "--checkpointing")
    assert code == 0
    assert text.startswith("llama-7b: 6,738,415,616 parameters in 291 tensors")
    for kind in planner.OPTIMIZERS.values():
        assert text.count(kind.label) >= 4  # table, bar, buffers, what fits
    for words in ("momentum codes", "absmax", "statistics", "state2", "exp_avg_sq", "step_in_back"):
        assert words in text
    for card in planner.CARDS:
        assert re.search(rf"^{card} GB: ", text, flags=re.MULTILINE)
    assert "16 GB: PagedCAME8bit, activation checkpointing, step in backward; peak 14." in text
    assert "8 GB: does not fit; the smallest way" in text
    assert max(map(len, text.splitlines())) < 130


def test_numbers_of_the_table_are_those_of_the_estimate(capsys):
    _, text, _ = run(capsys, "gpt2", "--dtype", "fp32", "--optimizers", "came8bit", "--card", "6")
    result = planner.estimate(
        planner.named("gpt2"), planner.OPTIMIZERS["came8bit"], planner.Setup(dtype="fp32")
    )
    line = next(x for x in text.splitlines() if x.startswith("CAME8bit "))
    assert f"{result.parameters / planner.GIB:.2f}" in line.split()
    assert f"{result.peak / planner.GIB:.2f}" in line.split()
    assert "6 GB: CAME8bit; peak" in text


def test_what_fits_is_said_for_every_card(capsys):
    _, text, _ = run(capsys, "llama-7b", "--sequence", "2048", "--checkpointing")
    block = text[text.index("fits, with 1.00 GiB left free") :].splitlines()
    line = next(x for x in block if x.startswith("CAME8bit "))
    said = re.split(r"\s{2,}", line)[1:]
    model, kind = planner.named("llama-7b"), planner.OPTIMIZERS["came8bit"]
    setups = [planner.Setup(sequence=2048, checkpointing=True, release=r) for r in (False, True)]
    plain, released = (planner.estimate(model, kind, setup).peak for setup in setups)
    assert len(said) == len(planner.CARDS)
    for card, word in zip(planner.CARDS, said, strict=True):
        usable = (card - 1) * planner.GIB
        if plain <= usable:
            assert word == "yes"
        elif released <= usable:
            assert word == "in backward"
        else:
            assert word == f"+{(released - usable) / planner.GIB:.2f}"
    assert set(said) >= {"yes", "in backward"}


def test_json_has_the_same_in_bytes(capsys):
    code, text, _ = run(
        capsys, "gpt2", "--json", "--card", "4.75", "--batch", "3", "--reserve", "0.5"
    )
    assert code == 0
    facts = json.loads(text)
    setup = planner.Setup(batch=3)
    assert facts["model"]["parameters"] == 124_439_808
    assert [e["optimizer"] for e in facts["estimates"]] == list(planner.OPTIMIZERS)
    for entry in facts["estimates"]:
        result = planner.estimate(
            planner.named("gpt2"), planner.OPTIMIZERS[entry["optimizer"]], setup
        )
        assert entry["peak"] == result.peak == sum(entry["at_peak"].values())
        assert entry["state"]["bytes"] == result.state.nbytes
        assert entry["host"] == result.host
    (card,) = facts["cards"]
    assert card["usable"] == 17 * planner.GIB // 4
    assert card["fits"] == [
        e["optimizer"] for e in facts["estimates"] if e["peak"] <= card["usable"]
    ]
    released = {e["optimizer"] for e in facts["step_in_backward"] if e["peak"] <= card["usable"]}
    assert set(card["fits_with_step_in_backward"]) == released >= set(card["fits"])
    assert 0 < len(card["fits"]) < len(facts["estimates"])
    assert card["came8bit"]["python"][0].startswith("import came8bit")


def test_flags_reach_the_setup(capsys):
    flags = ["--checkpointing", "--step-in-backward", "--fp32-embeddings", "--paged"]
    numbers = ["--page-budget", "512", "--min-8bit-size", "100", "--activations", "0.5"]
    _, text, _ = run(capsys, "gpt2", "--json", *flags, *numbers, "--dtype", "fp16")
    facts = json.loads(text)
    assert facts["setup"] == {
        "dtype": "fp16",
        "batch": 1,
        "sequence": 1024,
        "checkpointing": True,
        "release": True,
        "accumulation": False,
        "fp32_embeddings": True,
        "min_8bit_size": 100,
        "budget": 512 * 2**20,
        "activations": 2**29,
    }
    assert {e["optimizer"] for e in facts["estimates"]} == {
        name for name in planner.OPTIMIZERS if name.startswith("paged")
    }
    assert facts["step_in_backward"] == []  # they all do
    _, text, _ = run(capsys, "gpt2", "--json", "--accumulate")
    facts = json.loads(text)
    assert facts["setup"]["accumulation"]
    assert facts["step_in_backward"] == []


def test_a_config_and_a_file(capsys, tmp_path):
    from safetensors.torch import save_file

    config = tmp_path / "config.json"
    config.write_text(json.dumps(planner.CONFIGS["qwen2.5-0.5b"][1]))
    _, text, _ = run(capsys, str(config))
    assert "494,032,768 parameters" in text
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(300, 200)}, weights)
    code, text, _ = run(capsys, str(weights), "--card", "8")
    assert code == 0
    assert "60,000 parameters in 1 tensors" in text
    assert "ACTIVATIONS ARE NOT COUNTED" in text
    assert "room for batch" not in text
    _, text, _ = run(capsys, str(weights), "--card", "8", "--activations", "2")
    assert "Activations are the given number." in text
    assert "NOT COUNTED" not in text


# --- where nothing fits ---------------------------------------------------------------------------


def advice(capsys, *arguments):
    """What is said of the one card, in one line."""
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    return " ".join(text[text.index("With CAME8bit, the least") :].split())


def test_parameters_that_do_not_fit_alone_are_said_to(capsys):
    text = advice(capsys, "llama-7b", "--card", "8")
    assert "The parameters alone take 12.55 GiB, and 7.00 are there" in text
    assert "LoRA on quantized parameters" in text
    for words in ("--batch", "shorter", "smaller batch", "bf16"):
        assert words not in text
    assert "--dtype bf16 halves that." in advice(
        capsys, "llama-7b", "--card", "8", "--dtype", "fp32"
    )


def test_a_batch_and_a_sequence_that_fit_are_proposed(capsys):
    card = ["llama-7b", "--card", "15"]
    # Here the smallest way is one of those that are not the smallest with a batch of one.
    text = advice(capsys, *card, "--batch", "8", "--sequence", "4096")
    said = re.search(r"It fits with (--batch 1 --sequence (\d+));", text)
    assert "training fewer parameters (LoRA)" in text
    assert "peak" in advice(capsys, *card, *said[1].split())
    double = ["--batch", "1", "--sequence", str(2 * int(said[2]))]
    assert "does not fit" in advice(capsys, *card, *double)


def test_state_and_gradients_that_do_not_fit_are_said_to(capsys):
    text = advice(capsys, "llama-7b", "--card", "13.8", "--batch", "4")
    assert "gradients are too large, even with batch 1 and 128 tokens. A larger card is" in text
    assert "--batch" not in text


def test_given_activations_may_be_made_smaller(capsys):
    text = advice(capsys, "llama-7b", "--card", "15", "--activations", "5")
    assert "A shorter sequence or a smaller batch, and so fewer activations than the given" in text
    text = advice(capsys, "llama-7b", "--card", "13.9", "--activations", "5")
    assert "Parameters, state and gradients alone are too large" in text


# --- what the planner does not know ---------------------------------------------------------------


def write_config(folder, kind, name, **settings):
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.architectures = [name]
    config.save_pretrained(folder)
    return config


def test_a_folder_of_an_unknown_kind_is_not_asked_for_its_config(capsys, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(300, 200)}, tmp_path / "model.safetensors")
    said = "ACTIVATIONS ARE NOT COUNTED: "
    _, text, _ = run(capsys, str(tmp_path))
    assert f"{said}shapes alone do not tell them. Give the model's config.json, or --act" in text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    _, text, _ = run(capsys, str(tmp_path))
    assert (
        f"{said}the planner does not know the layers of a model of type 'mamba'. Give --a" in text
    )
    assert "config.json, or" not in text
    assert "60,000 parameters in 1 tensors" in text
    (tmp_path / "config.json").write_text("{}")
    _, text, _ = run(capsys, str(tmp_path))
    assert "the layers of a model without a model_type. Give --activations." in text


_NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 90}
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
OTHERS = [
    ("mixtral", "MixtralForCausalLM", {**_NARROW, **_TWO_HEADS, "num_local_experts": 4}),
    ("bert", "BertForMaskedLM", {**_NARROW, "num_attention_heads": 2}),
    ("t5", "T5ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "num_layers": 2}),
    ("vit", "ViTForImageClassification", {"hidden_size": 36, "num_hidden_layers": 2}),
    ("llama", "LlamaForQuestionAnswering", {**_NARROW, **_TWO_HEADS}),
]


@pytest.mark.parametrize(("kind", "name", "settings"), OTHERS)
def test_transformers_gives_the_shapes_of_other_kinds(capsys, tmp_path, kind, name, settings):
    config = write_config(tmp_path, kind, name, **settings)
    real = {n: tuple(p.shape) for n, p in getattr(transformers, name)(config).named_parameters()}
    for path in (tmp_path, tmp_path / "config.json"):
        model = estimate.load_model(str(path))
        assert {p.name: p.shape for p in model.parameters} == real
        assert model.architecture is None
    _, text, _ = run(capsys, str(tmp_path))
    assert f"{name} of transformers {transformers.__version__}, without memory" in text
    assert "ACTIVATIONS ARE NOT COUNTED: the planner does not know the layers of a " in text


def test_what_does_not_train_is_left_out(capsys, tmp_path):
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 90}
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    settings = {**sizes, **dict.fromkeys(tokens, 0)}
    write_config(tmp_path, "whisper", "WhisperForConditionalGeneration", **settings)
    _, text, _ = run(capsys, str(tmp_path))
    assert "1 tensors that do not train are left out: model.encoder.embed_positions.weight." in text


def test_models_that_transformers_does_not_give(capsys, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    cases = [
        ({"model_type": "nonesuch"}, "does not know it either."),
        ({}, "does not know it either."),
        ({"model_type": "mixtral"}, "architectures, which names the class, is None."),
        ({"model_type": "mixtral", "architectures": ["os"]}, "but no class 'os'."),
        (
            {"model_type": "mixtral", "architectures": ["MixtralModel"], "hidden_size": -1},
            "fails to build MixtralModel (",
        ),
    ]
    for config, message in cases:
        path.write_text(json.dumps(config))
        code, out, error = run(capsys, str(path))
        assert (code, out) == (2, "")
        assert message in error
        assert "Give the model's .safetensors file" in error
    path.write_text(json.dumps({"model_type": "mixtral", "quantization_config": {"bits": 4}}))
    assert "quantized model" in run(capsys, str(path))[2]
    monkeypatch.setattr(estimate_transformers.importlib.util, "find_spec", lambda name: None)
    path.write_text(json.dumps(cases[2][0]))
    assert "With transformers installed" in run(capsys, str(path))[2]


ERRORS = [
    (["llama-6b"], "neither a file or folder nor a known name; names are gpt2"),
    (["missing/config.json"], "No such file"),
    (["gpt2", "--sequence", "2000"], "positions up to 1024"),
    (["gpt2", "--optimizers", "adam"], "there is no 'adam'; there are adamw"),
    (["gpt2", "--optimizers", "adamw", "--paged"], "none of adamw has paged state"),
    (["gpt2", "--accumulate", "--step-in-backward"], "cannot be accumulated"),
    (["gpt2", "--page-budget", "1"], "the largest parameter has a page of"),
    (["gpt2", "--card", "1"], "a card of 1 GB has nothing left"),
    (["gpt2", "--plot", "picture.jpg"], "ends in .png"),
    (["gpt2", "--plot", "missing/folder/picture.png"], "No such file"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_are_one_sentence(capsys, arguments, message):
    code, out, error = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert error.startswith("came8bit estimate: error: ")
    assert message in error


@pytest.mark.parametrize("option", ["--batch=0", "--card=-1", "--card=nan", "--reserve=-1"])
def test_numbers_out_of_range(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "gpt2", option])
    assert stopped.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_the_picture(capsys, tmp_path):
    path = tmp_path / "memory.png"
    code, text, _ = run(capsys, "gpt2", "--plot", str(path))
    assert code == 0
    assert f"the picture is in {path}" in text
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_are_as_long_as_their_sums():
    parts = dict.fromkeys(PARTS, 0) | {"parameters": 50, "state": 25, "gradients": 25}
    assert bar_of(parts, 100) == "P" * 28 + "S" * 14 + "G" * 14
    # Parts of a hundredth each are not rounded away.
    parts = dict.fromkeys(PARTS, 1)
    assert len(bar_of(parts, 100)) == round(56 * 7 / 100)


def test_it_needs_no_other_package():
    heavy = ["accelerate", "bitsandbytes", "diffusers", "matplotlib", "safetensors", "transformers"]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({heavy!r}))\n"  # None: importing it raises
        "from came8bit.cli import main\n"
        "sys.exit(main(['estimate', 'gpt2', '--plot', 'x.png']) != 2 or main(['estimate', 'gpt2']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--plot needs matplotlib" in done.stderr
    assert "124,439,808 parameters" in done.stdout


def test_help_lists_names_and_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    text = capsys.readouterr().out
    for word in ("sana-1.6b", "qwen3", "--page-budget", "paged-came8bit", "docs/planner.md"):
        assert word in text
