"""``came8bit tradeoff``: what is refused, and the folder of results."""

import os
import resource
import sys
from pathlib import Path

import pytest
from small_study import read

from came8bit.cli import main
from came8bit.tradeoff import results, train

# ---- what goes wrong ----


def refused(words, capsys):
    """Return what a command line that is wrong prints."""
    try:
        code = main(["tradeoff", "--cpu", "--in-process", *words])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert "came8bit tradeoff: error: " in error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no/such/file.txt"], "no/such/file.txt: cannot be read"),
        (["--text", "."], "is a folder"),
        (["--text", "/dev/zero"], "/dev/zero: is not a regular file"),
        (["--text", "pipe"], "pipe: is not a regular file"),
        (["--text", "large"], "large: has more than the 1,073,741,824 bytes"),
        (["--corpus", "gcide", "--data-dir", "nowhere"], "make data"),
        (["--data-dir", "nowhere"], "not a folder"),
        (["--optimizers", "adamw,sgdw"], "got 'sgdw', expected some of adamw, nadamw, "),
        (["--optimizers", ","], "got none"),
        (["--tasks", "sound"], "expected some of text, "),
        (["--tasks", "vision", "--tune", "--data-dir", "nowhere"], "make data"),
        (["--tasks", "vision"], "no learning rate on vision"),
        (["--lr", "came8bit=fast"], "expected NAME=NUMBER"),
        (["--lr", "came9bit=1e-3"], "got 'came9bit'"),
        (["--lr", "came8bit,adamw=1e-3"], "expected NAME=NUMBER"),
        (["--lr", "came8bit=1e10"], "positive numbers up to 1e+09"),
        (["--width", "30", "--heads", "4"], "not a multiple"),
        (["--batch-size", "1000000"], "less than one batch"),
        (["--context", "1000000"], "smaller --context"),
        (["--steps", "1000000", "--batch-size", "8000"], "more than 1,000,000,000"),
        (["--out", "/proc/no"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    if "/proc/no" in arguments and sys.platform != "linux":
        arguments = ["--out", str(Path(sys.executable) / "out")]
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with open("large", "wb") as file:
        file.truncate(2**30 + 1)  # a hole: it takes no room
    assert message in refused(["--optimizers", "adamw", *arguments], capsys)


NUMBERS = ["--seeds", "--slow-seeds", "--steps", "--batch-size", "--accumulate", "--context"]
NUMBERS += ["--eval-items", "--layers", "--heads", "--width"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        *((option, ["0", "-1", "nan", "inf", "1.5", "1e3", "x", "9" * 30]) for option in NUMBERS),
        *((option, ["-1", "nan", "1.5"]) for option in ("--warmup-steps", "--eval-every")),
        ("--first-seed", ["-1", "nan", "1.5", "1001"]),
        *((f"{option}", ["-1", "nan", "inf", "x"]) for option in ("--weight-decay", "--margin")),
        ("--equal-lr", ["-1e-3", "nan", "inf", "1e10"]),
        ("--lr", [f"came8bit={lr}" for lr in ("nan", "inf", "0", "-1e-3", "", "1e-3,1e-4")]),
        ("--grid", [f"adamw={lr}" for lr in ("nan", "1e-3,inf", "1e-3,0", "1e-3,,1")]),
    ],
)
def test_every_number_is_checked_with_the_command_line(option, values, capsys):
    for value in values:
        error = refused([f"{option}={value}", "--out", "never-made"], capsys)
        assert f"argument {option}: got " in error
        assert "expected" in error
    assert not Path("never-made").exists()


# ---- the folder ----


def test_a_study_goes_on_where_it_stopped(small, monkeypatch, capsys):
    """The rows are those of a study that was never stopped; a run that was killed is done again."""
    two = ["--optimizers", "adamw,came8bit", "--equal-lr", "0"]
    _, whole = small(*two, out="whole")
    calls, real = [], train.run_here

    def stops(spec, data, progress):
        calls.append(spec.seed)
        if len(calls) == 2:
            return train.RunResult.of(spec, "its process ended without a result")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(spec, data, progress)

    monkeypatch.setattr(train, "run_here", stops)
    assert small(*two)[0] == 130
    assert len(calls) == 4
    code, folder = small(*two)
    assert code == 0
    assert len(calls) == 6  # the killed one and the one that never ended
    assert "2 finished runs are in" in capsys.readouterr().out
    losses = [
        {(r["optimizer"], r["seed"]): r["train_losses"] for r in read(where)["runs"]}
        for where in (whole, folder)
    ]
    assert losses[0] == losses[1]
    assert read(folder)["state"] == "complete"
    assert "Partial" not in (folder / "report.md").read_text()
    small(*two, "--seeds", "3")
    assert len(calls) == 8  # one more seed of two optimizers
    small(*two, "--fresh")
    assert len(calls) == 12


def test_other_settings_set_the_earlier_results_aside(small, capsys):
    _, folder = small("--optimizers", "adamw", "--seeds", "1")
    before = (folder / "results.json").read_text()
    code, _ = small("--optimizers", "adamw", "--seeds", "1", "--steps", "5")
    assert code == 0
    (earlier,) = folder.glob("earlier-*")
    assert (earlier / "results.json").read_text() == before
    assert str(earlier) in capsys.readouterr().out
    assert len(read(folder)["runs"][0]["train_losses"]) == 5


def test_results_that_cannot_be_read_are_not_overwritten(small, capsys):
    _, folder = small("--optimizers", "adamw", "--seeds", "1")
    (folder / "results.json").write_text('{"schema": 2, ')
    assert small("--optimizers", "adamw", "--seeds", "1")[0] == 2
    assert "cannot be read" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == '{"schema": 2, '
    assert small("--optimizers", "adamw", "--seeds", "1", "--fresh")[0] == 0


def test_a_second_study_in_the_same_folder_is_refused(small, tmp_path, capsys):
    with results.Folder(tmp_path / "out"):
        assert small("--optimizers", "adamw")[0] == 2
        assert "another study is writing to this folder" in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.json").exists()
    assert small("--optimizers", "adamw", "--seeds", "1")[0] == 0


def test_links_in_the_folder_lead_nowhere(small, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    for name in ("results.json.tmp", "runs.csv", "report.md", "tradeoff.png"):
        (out / name).symlink_to(victim)
    assert small("--optimizers", "adamw", "--seeds", "1")[0] == 0
    assert victim.read_text() == "precious"
    assert read(out)["state"] == "complete"
    (out / ".lock").symlink_to(victim)
    assert small("--optimizers", "adamw", "--seeds", "1")[0] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_named_and_leaves_nothing_by_half(small, capsys):
    _, folder = small("--optimizers", "adamw", "--seeds", "1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        code, _ = small("--optimizers", "adamw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert code == 1
    assert "results cannot be written" in error
    assert "results.json" in error
    assert "wanted" in error
    assert "are free in" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
