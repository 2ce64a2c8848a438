"""``came8bit tradeoff``: small studies from end to end, and its parts."""

import csv
import json
import os
import signal
import string
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import came8bit
from came8bit.cli import main
from came8bit.cli.tradeoff import command, noise, plot, stats, store
from came8bit.cli.tradeoff.config import ALL_OPTIMIZERS, PRESETS, TUNE_SEEDS, RunSpec, preset_config
from came8bit.cli.tradeoff.data import (
    Images,
    Windows,
    eval_items,
    load_images,
    load_text,
    split_text,
    train_items,
)
from came8bit.cli.tradeoff.measure import PeakMemory, state_bytes, wide_fraction
from came8bit.cli.tradeoff.models import build_model
from came8bit.cli.tradeoff.study import Study
from came8bit.cli.tradeoff.train import RunResult, failed_run, schedule
from came8bit.cli.tradeoff.worker import run_isolated

SMALL = ["--steps", "4", "--layers", "1", "--width", "64", "--heads", "2", "--context", "16"]
SMALL += ["--batch-size", "2", "--eval-items", "16", "--seeds", "2"]


@pytest.fixture
def text_file(tmp_path):
    """Some 90 kB of real text."""
    source = Path(torch.nn.functional.__file__)
    path = tmp_path / "text.txt"
    path.write_bytes(source.read_bytes()[:90_000])
    return path


@pytest.fixture
def small(text_file, tmp_path):
    """Runs a small study in this process: arguments → (exit code, folder)."""

    def run(*arguments, out="out"):
        folder = tmp_path / out
        words = [
            "tradeoff",
            "--text",
            str(text_file),
            "--out",
            str(folder),
            "--in-process",
            "--cpu",
        ]
        return main([*words, *SMALL, *arguments]), folder

    return run


def results(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    with open(folder / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- from end to end ----


def test_all_optimizers_from_end_to_end(small, capsys):
    code, folder = small()
    assert code == 0
    content = results(folder)
    assert content["schema"] == store.SCHEMA
    assert content["state"] == "complete"
    assert content["skipped"] == {}
    assert content["planned_runs"] == len(content["runs"]) == 2 * len(ALL_OPTIMIZERS)
    assert set(content) >= {"config", "versions", "hardware", "kernels", "git", "data", "started"}
    assert content["data"]["text"]["sha256"]
    for run in content["runs"]:
        assert run["status"] == "ok"
        assert len(run["train_losses"]) == 4
        assert 0 < run["loss"] < 8
        assert 0 <= run["accuracy"] <= 1
        assert run["state_bytes"] > run["parameters"]
        assert (
            run["optimizer_ms"]["p20"] <= run["optimizer_ms"]["p50"] <= run["optimizer_ms"]["p80"]
        )
        assert run["optimizer_ms"]["p50"] < run["step_ms"]["p50"]
        assert np.mean(run["loss_parts"]) == pytest.approx(run["loss"], abs=1e-4)
    table = rows(folder)
    assert len(table) == len(content["runs"])
    assert tuple(table[0]) == store.CSV_COLUMNS
    assert [r["optimizer"] for r in table[:5]] == list(ALL_OPTIMIZERS)
    # The state of AdamW is two fp32 moments and one fp32 step count per tensor.
    adamw = content["runs"][0]
    assert 8 < adamw["bytes_per_parameter"] < 8.01
    report = (folder / "report.md").read_text()
    assert report in capsys.readouterr().out
    for name in ("AdamW8bit", "came-pytorch", "CAME8bit − CAME", "noise", "`came8bit tradeoff"):
        assert name in report
    assert "Partial" not in report
    assert {path.name for path in folder.iterdir()} == set(store.FILES)


def test_the_picture_shows_every_optimizer(small):
    from matplotlib import colors, image

    _, folder = small("--optimizers", "adamw,came,came8bit")
    pixels = image.imread(folder / "tradeoff.png")[..., :3]
    height, width, _ = pixels.shape
    assert width > 1500
    assert height > 800
    white = (pixels > 0.99).all(axis=-1).mean()
    assert 0.5 < white < 0.97
    for name in ("adamw", "came", "came8bit"):
        colour = np.array(colors.to_rgb(plot.STYLE[name][0]))
        assert (np.abs(pixels - colour).max(axis=-1) < 0.01).sum() > 500, name
    absent = np.array(colors.to_rgb(plot.STYLE["adamw8bit"][0]))
    assert (np.abs(pixels - absent).max(axis=-1) < 0.01).sum() == 0


def test_same_seed_same_start_same_batches_same_result(small):
    _, first = small("--optimizers", "adamw,came8bit", out="a")
    _, again = small("--optimizers", "came8bit,adamw", out="b")
    one = {(r["optimizer"], r["seed"]): r for r in results(first)["runs"]}
    two = {(r["optimizer"], r["seed"]): r for r in results(again)["runs"]}
    for key, run in one.items():
        assert run["train_losses"] == two[key]["train_losses"]
        assert run["loss"] == two[key]["loss"]
    for seed in (0, 1):
        assert one["adamw", seed]["train_losses"][0] == one["came8bit", seed]["train_losses"][0]
    assert one["adamw", 0]["train_losses"] != one["adamw", 1]["train_losses"]


def test_accumulation_gives_the_same_step_as_one_batch(small):
    """Two batches of 2 accumulated are one batch of 4: the same windows, in the same order."""
    _, whole = small("--optimizers", "adamw", "--batch-size", "4", out="a")
    _, parts = small("--optimizers", "adamw", "--accumulate", "2", out="b")
    for one, two in zip(results(whole)["runs"], results(parts)["runs"], strict=True):
        assert one["train_losses"] == pytest.approx(two["train_losses"], abs=2e-4)


def test_isolated_runs_measure_their_own_memory(text_file, tmp_path):
    """In bf16, too: accelerate allows one precision per process."""
    folder = tmp_path / "out"
    words = ["tradeoff", "--text", str(text_file), "--out", str(folder), "--cpu", *SMALL]
    words += ["--width", "256", "--layers", "2", "--seeds", "1", "--optimizers", "adamw,came8bit"]
    words += ["--mixed-precision", "bf16"]
    assert main(words) == 0
    adamw, ours = results(folder)["runs"][:2]
    assert [run["purpose"] for run in results(folder)["runs"]] == ["memory"] * 2 + ["final"] * 2
    if sys.platform == "linux":
        assert "VmHWM" in adamw["memory_method"]
        # Weights, gradients and two moments in fp32 have to be in there, and little else.
        count = adamw["parameters"]
        assert 16 * count < adamw["peak_memory"] < 16 * count + 50 * 2**20
        saved = adamw["state_bytes"] - ours["state_bytes"]
        assert 0.5 * saved < adamw["peak_memory"] - ours["peak_memory"] < 1.5 * saved


def test_several_processes_do_not_change_the_run(text_file, tmp_path):
    """Two gloo processes share each batch; the data and the result stay those of one process."""
    outputs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
        words = ["-m", "came8bit", "tradeoff", "--text", str(text_file), "--out", str(folder)]
        words += ["--cpu", "--in-process", "--optimizers", "adamw,came8bit", *SMALL, "--seeds", "1"]
        done = subprocess.run(
            [*launch, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(results(folder)["runs"])
    for one, two in zip(*outputs, strict=True):
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["train_losses"] == pytest.approx(two["train_losses"], abs=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)
        assert two["eval_items"] == one["eval_items"]


# ---- learning rates ----


def test_the_search_picks_the_best_mean_and_uses_it(small):
    code, folder = small("--optimizers", "adamw", "--tune", "--grid", "adamw=1e-9,3e-2,3e-3")
    assert code == 0
    runs = results(folder)["runs"]
    tuned = [run for run in runs if run["purpose"] == "tune"]
    assert {(r["seed"], r["lr"]) for r in tuned} == {
        (seed, lr) for seed in TUNE_SEEDS for lr in (1e-9, 3e-2, 3e-3)
    }
    means = {
        lr: np.mean([run["loss"] for run in tuned if run["lr"] == lr]) for lr in (1e-9, 3e-2, 3e-3)
    }
    best = min(means, key=means.get)
    final = [run for run in runs if run["purpose"] == "final"]
    assert best != 1e-9
    assert {run["lr"] for run in final} == {best}
    assert [row["purpose"] for row in rows(folder)] == ["tune"] * 6 + ["final"] * 2


def test_a_learning_rate_that_diverges_in_the_search_is_no_failure(small):
    code, folder = small("--optimizers", "adamw", "--tune", "--grid", "adamw=1e-3,1e30")
    assert code == 0
    runs = results(folder)["runs"]
    assert {run["lr"] for run in runs if run["purpose"] == "final"} == {1e-3}
    assert {run["status"] for run in runs if run["lr"] == 1e30} == {"failed"}
    assert "1e+30: failed" in (folder / "report.md").read_text()


def test_warm_up_then_cosine():
    task = replace(PRESETS["quick"].tasks[0], steps=100, warmup_steps=9, schedule="cosine")
    factors = [schedule(task, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0.1 < factors[-1] < 0.102
    assert schedule(replace(task, schedule="constant"), 99) == 1.0
    assert schedule(replace(task, warmup_steps=0), 0) == 1.0


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no/such/file.txt"], "no/such/file.txt: cannot be read"),
        (["--text", "."], "is a folder"),
        (["--corpus", "gcide", "--data-dir", "nowhere"], "make data"),
        (["--optimizers", "adamw,sgdw"], "unknown optimizer 'sgdw'; known: adamw, adamw8bit, "),
        (["--optimizers", ","], "got none"),
        (["--tasks", "sound"], "expected some of text, vision"),
        (["--tasks", "vision", "--tune", "--data-dir", "nowhere"], "make data"),
        (["--tasks", "vision"], "no learning rate on vision"),
        (["--lr", "came8bit=fast"], "expected NAME=NUMBER"),
        (["--lr", "came9bit=1e-3"], "unknown optimizer 'came9bit'"),
        (["--width", "30", "--heads", "4"], "not a multiple"),
        (["--batch-size", "1000000"], "less than one batch"),
        (["--context", "10000000"], "smaller --context"),
        (["--out", "/proc/no"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    if "/proc/no" in arguments and sys.platform != "linux":
        arguments = ["--out", str(Path(sys.executable) / "out")]
    monkeypatch.chdir(tmp_path)
    words = ["tradeoff", "--cpu", "--in-process", "--optimizers", "adamw", *arguments]
    code = main(words)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("came8bit tradeoff: error: ")
    assert message in error
    assert "Traceback" not in error


def test_what_is_missing_for_the_command_itself_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["tradeoff"]) == 2
    assert "needs accelerate: pip install 'came8bit[demo]'" in capsys.readouterr().err


def test_a_missing_baseline_is_named_as_skipped(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, folder = small("--optimizers", "adamw,adamw8bit")
    assert code == 0
    assert "pip install 'bitsandbytes'" in results(folder)["skipped"]["adamw8bit"]
    assert {run["optimizer"] for run in results(folder)["runs"]} == {"adamw"}
    out = capsys.readouterr().out
    assert "SKIPPED adamw8bit" in out
    assert "AdamW8bit: not installed" in (folder / "report.md").read_text()


def test_nothing_installed_is_an_error(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, _ = small("--optimizers", "adamw8bit")
    assert code == 1
    assert "none of the optimizers is installed" in capsys.readouterr().err


def test_an_optimizer_that_fails_is_reported_and_the_others_go_on(small, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(came8bit, "CAME", fail)
    code, folder = small("--optimizers", "came,adamw", "--lr", "came=1")
    assert code == 1
    content = results(folder)
    assert [run["status"] for run in content["runs"]] == ["failed", "ok", "failed", "ok"]
    assert content["state"] == "complete"
    report = (folder / "report.md").read_text()
    assert "## Failed" in report
    assert "CAME on text, seed 0, lr 1: RuntimeError: no such instruction" in report
    assert rows(folder)[0]["error"].startswith("RuntimeError: no such instruction")


def test_a_run_that_diverges_is_a_failure(small):
    code, folder = small("--optimizers", "adamw", "--lr", "adamw=1e30")
    assert code == 1
    assert "DivergedError" in results(folder)["runs"][0]["error"]
    assert not (folder / "tradeoff.png").exists()


def test_ctrl_c_keeps_what_is_finished(small, monkeypatch, capsys):
    calls = []

    def interrupted(spec, data, progress):
        calls.append(spec)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(spec, data, progress)

    real = command.run_here
    monkeypatch.setattr(command, "run_here", interrupted)
    code, folder = small("--optimizers", "adamw,came8bit")
    assert code == 130
    content = results(folder)
    assert content["state"] == "interrupted"
    assert [(r["optimizer"], r["seed"]) for r in content["runs"]] == [
        ("adamw", 0),
        ("came8bit", 0),
        ("adamw", 1),
    ]
    assert len(rows(folder)) == 3
    assert "Partial: interrupted after 3 of 4 runs" in (folder / "report.md").read_text()
    assert (folder / "tradeoff.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_a_real_sigint_stops_the_study_and_its_child(text_file, tmp_path):
    folder = tmp_path / "out"
    words = [sys.executable, "-m", "came8bit", "tradeoff", "--text", str(text_file), "--cpu"]
    words += ["--out", str(folder), "--optimizers", "adamw", *SMALL, "--seeds", "1000"]
    study = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert study.stderr is not None
    for line in study.stderr:
        if line.startswith("[3/1001]"):
            break
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to every process at once
    out, err = study.communicate(timeout=120)
    assert study.returncode == 130, err
    assert "Traceback" not in err
    content = results(folder)
    assert content["state"] == "interrupted"
    assert 2 <= len(content["runs"]) < 1001
    assert "Partial: interrupted" in out
    for _ in range(100):  # the fork server ends a moment after its client
        try:
            os.killpg(study.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes of the study are left")


class _KillsItsReader:
    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_dies_is_a_failed_run():
    spec = RunSpec("final", PRESETS["quick"].tasks[0], "adamw", 0, 1e-3, cpu=True)
    result = run_isolated(spec, _KillsItsReader(), lambda step, loss: None)
    assert result.status == "failed"
    assert "exit code 3" in result.error


def test_earlier_results_are_moved_not_lost(small, capsys):
    _, folder = small("--optimizers", "adamw", "--seeds", "1")
    before = (folder / "results.json").read_text()
    code, _ = small("--optimizers", "adamw", "--seeds", "1")
    assert code == 0
    (earlier,) = folder.glob("earlier-*")
    assert (earlier / "results.json").read_text() == before
    assert str(earlier) in capsys.readouterr().out
    assert results(folder)["state"] == "complete"


# ---- presets ----


def test_quick_preset_keeps_its_promises():
    config = preset_config("quick")
    (task,) = config.tasks
    assert len(config.seeds) >= 2
    assert task.steps >= 200
    assert not config.tune
    for name in ALL_OPTIMIZERS:
        assert config.learning_rates["text"][name] in config.grids["text"][name]
    with torch.device("meta"):
        model = build_model(task)
    assert wide_fraction(model) >= 0.8
    with pytest.raises(AssertionError):  # the measure can say no
        assert wide_fraction(torch.nn.Linear(1000, 255)) >= 0.8


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_build_and_can_be_searched(name):
    config = preset_config(name)
    for task in config.tasks:
        assert task.kind in config.grids
        assert task.width % task.heads == 0
        with torch.device("meta"):
            assert wide_fraction(build_model(task)) >= 0.8
        if not config.tune:
            assert set(config.learning_rates[task.kind]) == set(ALL_OPTIMIZERS)


def test_slow_baselines_run_fewer_seeds_and_are_marked(small):
    code, folder = small("--optimizers", "adamw,came-pytorch", "--slow-seeds", "1")
    assert code == 0
    assert [r["optimizer"] for r in results(folder)["runs"]] == ["adamw", "came-pytorch", "adamw"]
    report = (folder / "report.md").read_text()
    assert "came-pytorch*" in report
    assert "fewer seeds than the others" in report
    assert "slow on a CPU: came-pytorch" in report


# ---- data ----


def test_the_split_is_contiguous_and_does_not_leak():
    data = split_text(b"a" * 900 + b"b" * 50 + b"c" * 50, {})
    task = replace(PRESETS["quick"].tasks[0], context=4, steps=50, batch_size=2, eval_items=100)
    for items, letter in (
        (train_items(data, task, seed=0), "a"),
        (eval_items(data, task, "tune"), "b"),
        (eval_items(data, task, "validation"), "c"),
    ):
        seen = {int(value) for window in items for part in window for value in part}
        assert seen == {ord(letter)}


def test_windows_predict_the_next_byte_and_evaluation_windows_do_not_overlap():
    text = string.printable.encode() * 40
    data = split_text(text, {})
    task = replace(PRESETS["quick"].tasks[0], context=10, batch_size=4, eval_items=1000)
    items = eval_items(data, task, "validation")
    assert isinstance(items, Windows)
    assert len(items) == 16  # of 200 bytes: 19 windows with a target each, in whole batches
    covered = []
    for inputs, targets in items:
        assert inputs.tolist()[1:] == targets.tolist()[:-1]
        covered.append(bytes(targets.tolist()))
    tail = text[-200:]
    places = [tail.find(piece) for piece in covered]
    assert len(covered) == 16
    assert all(place >= 0 for place in places)


def test_training_windows_depend_on_the_seed_alone():
    data = split_text(bytes(range(256)) * 20, {})
    task = replace(PRESETS["quick"].tasks[0], context=8, steps=5, batch_size=2)

    def first_inputs(seed):
        return torch.stack([window[0] for window in train_items(data, task, seed)])

    assert torch.equal(first_inputs(3), first_inputs(3))
    assert not torch.equal(first_inputs(3), first_inputs(4))
    assert first_inputs(3).shape == (10, 8)


def test_the_standard_library_is_text_that_every_machine_has():
    one = load_text(None, "stdlib", Path("nowhere"))
    two = load_text(None, "stdlib", Path("nowhere"))
    assert one.about == two.about
    assert one.about["bytes"] > 3_000_000
    assert len(one.train) + len(one.tune) + len(one.validation) == one.about["bytes"]


def test_files_are_joined_in_the_order_given(tmp_path):
    for name, content in (("b.txt", b"second"), ("a.txt", b"first")):
        (tmp_path / name).write_bytes(content)
    text = load_text([tmp_path / "b.txt", tmp_path / "a.txt"], "stdlib", tmp_path)
    whole = np.concatenate([text.train, text.tune, text.validation]).tobytes()
    assert whole == b"second\nfirst"


def write_fashion_mnist(folder):
    """Write small files in the format of Fashion-MNIST: 5,200 and 40 random images."""
    import gzip
    import struct

    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, count in (("train", 5200), ("t10k", 40)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8) // 4
        images += 19 * labels[:, None, None]  # something to learn
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            raw = gzip.compress(head + array.tobytes(), compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(raw)


def test_vision_from_end_to_end(tmp_path):
    write_fashion_mnist(tmp_path / "data" / "fashion-mnist")
    words = ["tradeoff", "--tasks", "vision", "--data-dir", str(tmp_path / "data"), "--cpu"]
    words += ["--out", str(tmp_path / "out"), "--in-process", "--optimizers", "adamw,came8bit"]
    words += [*SMALL, "--batch-size", "16", "--lr", "adamw=1e-3", "--lr", "came8bit=1e-4"]
    assert main(words) == 0
    content = results(tmp_path / "out")
    assert content["data"]["vision"]["source"] == "Fashion-MNIST"
    assert {run["task"] for run in content["runs"]} == {"vision"}
    assert all(run["status"] == "ok" for run in content["runs"])
    assert "nat per image" in (tmp_path / "out" / "report.md").read_text()


def test_images_are_split_apart(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    data = load_images(tmp_path)
    assert isinstance(data, Images)
    assert [len(part[1]) for part in (data.train, data.tune, data.validation)] == [200, 5000, 40]
    task = replace(PRESETS["standard"].tasks[1], steps=10, batch_size=50, eval_items=40)
    items = train_items(data, task, seed=0)
    assert len(items) == 500  # two and a half passes over 200
    image, label = items[0]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    assert 0 <= int(label) < 10


def test_a_preset_without_its_images_skips_them_by_name(text_file, tmp_path, capsys):
    words = ["tradeoff", "--preset", "standard", "--no-tune", "--lr", "adamw=1e-3", "--cpu"]
    words += ["--text", str(text_file), "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    words += ["--in-process", "--optimizers", "adamw", *SMALL]
    assert main(words) == 0
    assert "make data" in results(tmp_path / "o")["skipped"]["vision"]
    assert "SKIPPED vision" in capsys.readouterr().out
    assert "task vision: Fashion-MNIST is not in" in (tmp_path / "o" / "report.md").read_text()


# ---- measures ----


def parameters(*shapes):
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def stepped(make, params):
    optimizer = make(params)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_has_eight_bytes_and_a_step_count(fused):
    params = parameters((300, 400), (400,))
    counted = state_bytes(stepped(lambda p: torch.optim.AdamW(p, fused=fused), params))
    assert counted.total == 8 * (300 * 400 + 400) + 4 * 2
    assert counted.by_dtype == {"float32": counted.total}
    assert counted.python_numbers == 0


def test_tables_that_parameters_share_count_once():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters((256, 256), (512, 256))
    elements = 256 * 256 + 512 * 256
    counted = state_bytes(stepped(bitsandbytes.optim.AdamW8bit, params))
    blocks = elements // 256
    assert counted.total == 2 * elements + 2 * 4 * blocks + 2 * 256 * 4
    assert counted.by_dtype["uint8"] == 2 * elements
    assert counted.python_numbers == 2  # its step counts


def test_came8bit_has_one_byte_and_its_statistics():
    params = parameters((512, 768), (100,))
    counted = state_bytes(stepped(came8bit.CAME8bit, params))
    codes, blocks = 512 * 768, 512 * 3
    factored = codes + 4 * blocks + 4 * 2 * (512 + 768) + 4 + 8 + 8  # rms_ratio, step, skipped
    unfactored = 8 * 100 + 8 + 8
    assert counted.total == factored + unfactored
    assert counted.by_dtype["int8"] == codes


def test_views_count_their_whole_storage_once():
    params = parameters((4,), (4,))
    optimizer = torch.optim.SGD(params, lr=1.0)
    buffer = torch.zeros(100)
    optimizer.state[params[0]] = {"half": buffer[:4], "nested": [{"more": buffer[4:8]}], "n": 3}
    optimizer.state[params[1]] = {"half": buffer[8:12], "flag": True, "none": None, "name": "x"}
    counted = state_bytes(optimizer)
    assert counted.total == 400
    assert counted.python_numbers == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_touched_and_given_back():
    memory = PeakMemory(torch.device("cpu"))
    size = 64 * 2**20
    touched = torch.ones(size, dtype=torch.uint8)
    del touched
    above = memory.above_start()
    assert above is not None
    assert size * 0.95 < above < size * 1.3
    assert PeakMemory(torch.device("cpu")).above_start() < size / 4  # and is set back


# ---- noise ----


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062047), (2, 4.30265273), (4, 2.77644511), (29, 2.04522964)]
)
def test_quantiles_of_student_t(degrees, expected):
    assert stats.t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-8)


def test_paired_interval_by_hand():
    result = stats.paired({0: 1.0, 1: 2.0, 2: 4.0, 9: 0.0}, {0: 0.5, 1: 1.0, 2: 2.5})
    assert result.pairs == 3  # seed 9 has no partner
    assert result.difference == pytest.approx(1.0)
    assert result.deviation == pytest.approx(0.5)
    half = 4.30265273 * 0.5 / 3**0.5
    assert (result.low, result.high) == pytest.approx((1 - half, 1 + half))
    assert result.outside_noise is False
    assert stats.paired({0: 1.0}, {1: 1.0}) is None
    assert stats.paired({0: 1.0}, {0: 3.0}).outside_noise is None


def study_with(losses):
    """Return a finished study with these losses: optimizer → seed → loss."""
    config = replace(preset_config("quick"), seeds=(0, 1, 2, 3))
    study = Study(config, state="complete")
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            run = failed_run(RunSpec("final", config.tasks[0], name, seed, 1e-3), "")
            run.status, run.error, run.loss, run.loss_parts = "ok", None, loss, [loss] * 32
            study.runs.append(run)
    return study


def test_words_tell_noise_from_difference():
    level = {0: 2.0, 1: 2.3, 2: 1.9, 3: 2.1}  # seeds differ by far more than optimizers
    study = study_with(
        {
            "adamw": {seed: loss + 0.05 + 0.001 * seed for seed, loss in level.items()},
            "came": {seed: loss + 0.003 * (-1) ** seed for seed, loss in level.items()},
            "came8bit": level,
        }
    )
    words = "\n".join(noise.in_words(study, study.config.tasks[0]))
    assert "CAME8bit − AdamW: -0.0515 nat per byte [-0.0536, -0.0494], 4 seeds: " in words
    assert "**outside the noise**, CAME8bit is better" in words
    assert "0.0000 nat per byte [-0.0055, +0.0055], 4 seeds: **inside the noise**" in words
    assert "Not shown to be equal: up to 0.0055 apart" in words


def test_words_are_honest_about_two_seeds_and_one():
    two = study_with({"came": {0: 2.0, 1: 2.1}, "came8bit": {0: 2.01, 1: 2.12}})
    assert "± 9.0 standard deviations" in "\n".join(noise.in_words(two, two.config.tasks[0]))
    one = study_with({"came": {0: 2.0}, "came8bit": {0: 2.5, 1: 2.1}})
    assert "no interval" in "\n".join(noise.in_words(one, one.config.tasks[0]))
    alone = study_with({"came8bit": {0: 2.5}})
    assert "nothing to compare" in "\n".join(noise.in_words(alone, alone.config.tasks[0]))


def test_results_hold_no_nan(tmp_path):
    study = study_with({"came8bit": {0: 2.5}})
    study.runs[0].optimizer_ms = {"p20": float("nan"), "p50": 1.0, "p80": float("inf")}
    store.save(study, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert RunResult("final", "text", "came", 0, 1e-3).bytes_per_parameter is None
