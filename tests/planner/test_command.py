"""``came8bit estimate``."""

import json
import logging
import re
from functools import cache

import pytest
import torch
from paths import ROOT
from processes import run_python
from safetensors.torch import save_file

from came8bit import planner
from came8bit.cli import estimate, main
from came8bit.planner import plot, report

named = cache(planner.named)


@pytest.fixture(autouse=True)
def models_are_kept(monkeypatch):
    """Traces, too: each of them takes a second or two."""
    monkeypatch.setattr(planner, "named", named)


def run(capsys, *arguments):
    code = main(["estimate", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


LLAMA = ["llama-7b", "--sequence", "2048", "--checkpointing"]


def test_the_answer_comes_first_and_fits_a_terminal(capsys):
    code, text, _ = run(capsys, *LLAMA)
    assert code == 0
    lines = text.splitlines()
    assert (
        lines[0] == "llama-7b: 6,738,415,616 parameters, bf16, batch 1 x 2048 tokens, checkpointing"
    )
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    for gpu in planner.GPUS:
        assert re.search(rf"^{gpu} GB ", text, flags=re.MULTILINE)
    (row,) = (line for line in lines if line.startswith("16 GB"))
    assert row.split("  ")[1:] != []
    assert "PagedCAME8bit, checkpointing, step in backward" in row
    assert "14.24" in row
    assert "8 GB   does not fit, 7.24 GiB too much" in text
    assert "optimizer = came8bit.PagedCAME8bit(model.parameters(), lr=2e-4)" in text
    assert "for 16 GB and 6.37 GiB of pinned" in text


def test_details_name_everything(capsys):
    code, text, _ = run(capsys, *LLAMA, "--details")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    for kind in planner.OPTIMIZERS.values():
        assert text.count(kind.label) >= 4  # table, bar, buffers, what fits
    for words in ("momentum codes", "absmax", "statistics", "state2", "exp_avg_sq", "step_in_back"):
        assert words in text
    model, kind = named("llama-7b"), planner.OPTIMIZERS["came8bit"]
    setups = [planner.Setup(sequence=2048, checkpointing=True, release=r) for r in (False, True)]
    plain, released = (planner.estimate(model, kind, setup).peak for setup in setups)
    block = text[text.index("Fits, with 1.00 GiB left free") :].splitlines()
    line = next(x for x in block if x.startswith("CAME8bit "))
    said = re.split(r"\s{2,}", line.strip())[1:]
    assert len(said) == len(planner.GPUS)
    for gpu, word in zip(planner.GPUS, said, strict=True):
        usable = (gpu - 1) * planner.GIB
        missing = f"+{(released - usable) / planner.GIB:.2f}"
        assert word == ("yes" if plain <= usable else "in bwd" if released <= usable else missing)
    assert set(said) >= {"yes", "in bwd"}


def test_json_has_the_same_in_bytes(capsys):
    code, text, _ = run(
        capsys, "gpt2", "--json", "--gpu", "4.75 GB", "--batch", "3", "--reserve", ".5"
    )
    assert code == 0
    facts = json.loads(text)
    setup = planner.Setup(batch=3)
    assert facts["model"]["parameters"] == 124_439_808
    assert [e["optimizer"] for e in facts["estimates"]] == list(planner.OPTIMIZERS)
    for entry in facts["estimates"]:
        kind = planner.OPTIMIZERS[entry["optimizer"]]
        result = planner.estimate(named("gpt2"), kind, setup)
        assert entry["peak"] == result.peak == sum(entry["at_peak"].values())
        assert entry["state"]["bytes"] == result.state.nbytes
        assert entry["host"] == result.host
    (gpu,) = facts["gpus"]
    assert gpu["usable"] == 17 * planner.GIB // 4
    assert gpu["fits"] == [e["optimizer"] for e in facts["estimates"] if e["peak"] <= gpu["usable"]]
    assert set(gpu["fits_with_step_in_backward"]) >= set(gpu["fits"])
    assert gpu["came8bit"]["python"][0].startswith("import came8bit")
    assert gpu["came8bit"]["largest_batch"] >= 3


def test_flags_reach_the_setup(capsys):
    flags = ["--checkpointing", "--step-in-backward", "--fp32-embeddings", "--paged"]
    flags += ["--quantize-vectors"]
    numbers = ["--page-budget", "512", "--min-8bit-size", "100", "--activations", "0.5"]
    more = ["--dtype", "fp16", "--attention", "eager", "--card", "20"]
    _, text, _ = run(capsys, "gpt2", "--json", *flags, *numbers, *more)
    facts = json.loads(text)
    assert facts["setup"] == {
        "dtype": "fp16",
        "batch": 1,
        "sequence": 1024,
        "checkpointing": True,
        "release": True,
        "accumulation": False,
        "fp32_embeddings": True,
        "quantize_vectors": True,
        "min_8bit_size": 100,
        "budget": 512 * 2**20,
        "activations": 2**29,
        "attention": "eager",
    }
    paged = {name for name in planner.OPTIMIZERS if name.startswith("paged")}
    assert {e["optimizer"] for e in facts["estimates"]} == paged
    assert facts["step_in_backward"] == []  # they all do
    _, text, _ = run(capsys, "gpt2", "--json", "--accumulate", "--activations", "1")
    assert json.loads(text)["setup"]["accumulation"]
    assert json.loads(text)["step_in_backward"] == []


def test_headers_need_no_other_package(tmp_path):
    save_file({"w": torch.zeros(300, 200)}, tmp_path / "model.safetensors")
    heavy = ["accelerate", "diffusers", "matplotlib", "rich", "safetensors", "transformers"]
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {heavy!r}: raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util as u, torch\n"
        "sys.meta_path.insert(0, Block())\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda n, p=None: None if n.split('.')[0] in {heavy!r} else find(n, p)\n"
        "from came8bit.cli import main\n"
        "assert main(['estimate', 'gpt2']) == 2\n"
        f"sys.exit(main(['estimate', {str(tmp_path)!r}]))"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "pip install 'came8bit[cli]'" in done.stderr
    assert "60,000 parameters" in done.stdout
    assert "ACTIVATIONS ARE NOT COUNTED" in done.stdout
    assert re.search(r"^8 GB +CAME8bit +0\.01", done.stdout, flags=re.MULTILINE)


def test_activations_that_are_not_known(capsys, tmp_path):
    save_file({"w": torch.zeros(300, 200)}, tmp_path / "model.safetensors")
    _, text, _ = run(capsys, str(tmp_path))
    assert "NOT COUNTED: shapes alone do not tell them; the config.json does" in " ".join(
        text.split()
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch\x1b[2J"}))
    _, text, _ = run(capsys, str(tmp_path))
    assert "\x1b" not in text
    assert "does not know a model of type 'nonesuch" in " ".join(text.split())
    _, text, _ = run(capsys, str(tmp_path), "--activations", "2")
    assert "NOT COUNTED" not in text


# --- where nothing fits ---------------------------------------------------------------------------

NOTHING = [
    (["llama-7b", "--gpu", "8"], "8 GB: the parameters alone take 12.55 GiB of 7.00"),
    (["llama-7b", "--gpu", "8", "--dtype", "fp32"], "--dtype bf16 halves that."),
    (["llama-7b", "--gpu", "13.8"], "alone are too large, even with batch 1 and 128 tokens."),
    (["llama-7b", "--gpu", "15", "--activations", "5"], "than the given activations' may fit."),
    (["llama-7b", "--gpu", "13.9", "--activations", "5"], "gradients alone are too large. Use"),
]


@pytest.mark.parametrize(("arguments", "message"), NOTHING, ids=lambda value: str(value)[-30:])
def test_what_helps_where_nothing_fits(capsys, arguments, message):
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    assert message in " ".join(text.split())
    assert "import came8bit" not in text


def test_a_batch_and_a_sequence_that_fit_are_proposed(capsys):
    gpu = ["gpt2", "--gpu", "1.8"]
    _, text, _ = run(capsys, *gpu, "--batch", "8")
    said = re.search(r"(--batch 1 --sequence (\d+)) fits", " ".join(text.split()))
    assert "import came8bit" in run(capsys, *gpu, *said[1].split())[1]
    if int(said[2]) < 1024:
        double = ["--batch", "1", "--sequence", str(2 * int(said[2]))]
        assert "import came8bit" not in run(capsys, *gpu, *double)[1]


# --- errors, picture, help ------------------------------------------------------------------------

ERRORS = [
    (["llama-6b"], "neither a file or folder nor a known name; names are gpt2"),
    (["missing/config.json"], "No such file"),
    (["gpt2", "--sequence", "2000"], "positions up to 1024"),
    (["gpt2", "--optimizers", "adam"], "there is no 'adam'; there are adamw"),
    (["gpt2", "--optimizers", "adamw", "--paged"], "none of adamw has paged state"),
    (["gpt2", "--accumulate", "--step-in-backward"], "cannot be accumulated"),
    (["gpt2", "--page-budget", "1"], "the largest parameter has a page of"),
    (["gpt2", "--gpu", "1"], "a GPU of 1 GB has nothing left"),
    (["gpt2", "--plot", "picture.jpg"], "ends in .png"),
    (["gpt2", "--plot", "missing/folder/picture.png"], "missing/folder does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_are_one_sentence(capsys, arguments, message):
    code, out, error = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert error.startswith("came8bit estimate: error: ")
    assert message in error


OUT_OF_RANGE = ["--batch=0", "--gpu=-1", "--gpu=nan", "--reserve=-1", "--reserve=0x10"]
OUT_OF_RANGE += [f"--{name}=1e300" for name in ("gpu", "reserve", "activations", "page-budget")]
OUT_OF_RANGE += [f"--{name}=1{'0' * 30}" for name in ("batch", "sequence", "min-8bit-size")]


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_numbers_out_of_range(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "gpt2", option])
    assert stopped.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_what_does_not_run_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    """PyTorch would log a traceback of its own."""
    path = tmp_path / "config.json"
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 2**24}
    path.write_text(json.dumps({"model_type": "gpt2", **sizes}), encoding="utf-8")
    batch = ["--batch", "1000000000", "--sequence", str(2**24), "--attention", "eager"]
    log, logged = logging.getLogger("torch._subclasses.fake_tensor"), []
    monkeypatch.setattr(log, "handlers", [handler := logging.Handler()])
    monkeypatch.setattr(handler, "emit", logged.append)
    assert main(["estimate", str(path), *batch, "--optimizers", "adamw"]) == 0
    assert "ACTIVATIONS ARE NOT COUNTED: it does not run on fake ten" in capsys.readouterr().out
    assert not logged


@pytest.mark.parametrize("name", ["$\\foo{", "a\nb\x1b[2J", "漢字", "z" * 200])
@pytest.mark.filterwarnings("error")
def test_the_picture_draws_text_as_text(capsys, tmp_path, name):
    """Whatever the name, and whatever the user's matplotlibrc says."""
    import matplotlib

    weights = tmp_path / f"{name}.safetensors"
    save_file({"w": torch.zeros(300, 200)}, weights)
    path = tmp_path / "planner.png"
    with matplotlib.rc_context({"text.usetex": True}):
        code, text, err = run(capsys, str(weights), "--plot", str(path))
    assert (code, err) == (0, "")
    assert "The picture is in" in text
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_marks_what_fits():
    model = named("gpt2")
    plan = report.make_plan(model, planner.Setup(), ["adamw", "came8bit"], [2, 4], 0, paged=False)
    axes = plot.draw(plan).axes[0]
    texts = {text.get_text(): text for text in axes.texts}
    assert [text for text in texts if text.startswith("cheapest for")] == [
        "cheapest for 2 GB:\n" + report.title(plan.fits[0].way).replace(", ", ",\n", 1)
    ]
    marked = {text for text in axes.texts if text.get_color() == plot._FITS}
    fit = [e for e in [*plan.estimates, *plan.released] if e.peak <= plan.fits[0].usable]
    assert len(marked) == len(fit) + 3  # the name and number of the cheapest, and the GPU


def test_bars_are_as_long_as_their_sums():
    parts = dict.fromkeys(report.PARTS, 0) | {"parameters": 50, "state": 25, "gradients": 25}
    assert report.bar_of(parts, 100) == "P" * 20 + "S" * 10 + "G" * 10
    # Parts of a hundredth each are not rounded away.
    assert len(report.bar_of(dict.fromkeys(report.PARTS, 1), 100)) == round(40 * 7 / 100)


def test_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    text = capsys.readouterr().out
    for word in ("sana-1.6b", "--page-budget", "paged-came8bit", "docs/planner.md", "--details"):
        assert word in "".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_the_output_in_the_docs_is_what_is_printed(capsys):
    text = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    quoted = text.split("```text\n")[1].split("```")[0]
    _, printed, _ = run(capsys, *LLAMA)
    assert quoted == printed


def test_a_table_without_rich_has_the_same_words(capsys, monkeypatch):
    table = report.Table("T:", ("name", "a", "b"), [("x", "1", "22"), ("long", "", "3")], "note")
    estimate.print_table(table)
    with_rich = capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    estimate.print_table(table)
    assert capsys.readouterr().out.split() == with_rich.split()
