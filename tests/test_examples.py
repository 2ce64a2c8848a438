"""The examples: they learn as with AdamW, and resume to the last bit."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from paths import ROOT
from processes import run_python

from came8bit import CAME

EXAMPLES = ROOT / "examples"
ADAMW = (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.01})
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")
STEPS, HALF = 16, 8


@pytest.fixture(autouse=True)
def from_the_folder(monkeypatch):
    """As for ``python examples/NAME.py``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def same_parameters(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_resumes(name, tmp_path):
    example = importlib.import_module(name)
    losses, model = example.train(STEPS, tmp_path / "whole")
    adamw, _ = example.train(STEPS, tmp_path / "adamw", ADAMW)
    assert issubclass(example.CAME[0], CAME)
    assert len(losses) == len(adamw) == STEPS
    assert losses[0] == adamw[0]
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < 1.1 * adamw[-1]
    example.train(HALF, tmp_path / "parts")
    rest, resumed = example.train(STEPS, tmp_path / "parts")
    assert rest[-HALF:] == losses[-HALF:]
    assert same_parameters(model, resumed)


def test_every_scheduler(tmp_path):
    """The same learning rates as AdamW's, and a resume to the last bit."""
    example = importlib.import_module("schedulers")
    every = {
        name
        for name, thing in vars(torch.optim.lr_scheduler).items()
        if isinstance(thing, type) and issubclass(thing, torch.optim.lr_scheduler.LRScheduler)
    }
    assert set(example.SCHEDULERS) == every - {"LRScheduler", "_LRScheduler"}
    for name in example.SCHEDULERS:
        _, model = example.train(10, tmp_path / name, scheduler=name)
        example.train(5, tmp_path / f"{name} in parts", scheduler=name)
        _, resumed = example.train(10, tmp_path / f"{name} in parts", scheduler=name)
        assert same_parameters(model, resumed), name
        example.train(10, tmp_path / f"{name} of AdamW", ADAMW, scheduler=name)
        rates = [
            torch.load(tmp_path / folder / "checkpoint.pt")["optimizer"]["param_groups"][0]["lr"]
            for folder in (name, f"{name} of AdamW")
        ]
        assert rates[0] == rates[1], name


def test_tensorboard_has_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    example = importlib.import_module("tensorboard_logging")
    example.train(8, tmp_path)
    log = EventAccumulator(str(tmp_path)).Reload()
    values = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    assert set(values) == {"loss", "lr", "update_rms", "grad_norm", "skipped_steps"}
    assert values["lr"] == pytest.approx([3e-3, 3e-3])
    assert all(1e-3 < x < 1e-2 for x in values["update_rms"])
    assert all(x > 0 for x in values["grad_norm"])
    assert values["skipped_steps"] == [0, 0]


TWO_PROCESSES = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
from accelerate_loop import train
folder = Path(sys.argv[1])
for name in ("whole", "parts"):
    (folder / name).mkdir(exist_ok=True)
runs = [train(8, folder / "whole")]
train(4, folder / "parts")
runs.append(train(8, folder / "parts"))
for losses, model in runs:
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    # In one piece: torchrun's processes do not buffer, and share the standard output.
    sys.stdout.write(str((losses[-4:], sums)) + "\\n")
"""


@pytest.mark.slow
def test_accelerate_with_two_processes(tmp_path):
    """Resumed to the last bit; every process prints, and ends with, the same parameters."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = run_python(*launch, script, tmp_path)
    assert done.returncode == 0, done.stderr
    # In torch 2.10, gloo says there who is connected.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_every_example_is_named_in_the_docs():
    page = Path(ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"examples/{name}.py" not in page] == []
