"""``came8bit tradeoff``: small studies from end to end, and its parts."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from processes import run_python
from small_images import write_fashion_mnist
from small_study import SMALL, read

import came8bit
from came8bit.cli import main
from came8bit.tradeoff import results, train
from came8bit.tradeoff.config import OPTIMIZERS, PRESETS, TUNE_SEEDS, RunSpec
from came8bit.tradeoff.train import run_isolated, schedule


def rows(folder):
    with open(folder / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- from end to end ----


def test_all_optimizers_from_end_to_end(small, capsys):
    code, folder = small("--optimizers", ",".join(OPTIMIZERS), "--equal-lr", "0")
    assert code == 0
    content = read(folder)
    assert content["schema"] == results.SCHEMA
    assert content["state"] == "complete"
    assert content["skipped"] == {}
    assert content["planned_runs"] == len(content["runs"]) == 2 * len(OPTIMIZERS)
    assert set(content) >= {"config", "versions", "hardware", "kernels", "git", "data", "started"}
    assert content["data"]["text"]["sha256"]
    for run in content["runs"]:
        assert run["status"] == "ok"
        assert len(run["train_losses"]) == 4
        assert 0 < run["loss"] < 8
        assert 0 <= run["accuracy"] <= 1
        small_state = run["optimizer"] in ("adafactor", "came4bit", "came2bit", "came0bit")
        assert small_state or run["state_bytes"] > run["parameters"]
        assert run["cpu_seconds"] > 0
        assert (
            run["optimizer_ms"]["p20"] <= run["optimizer_ms"]["p50"] <= run["optimizer_ms"]["p80"]
        )
        assert run["optimizer_ms"]["p50"] < run["step_ms"]["p50"]
        assert np.mean(run["loss_parts"]) == pytest.approx(run["loss"], abs=1e-4)
    table = rows(folder)
    assert len(table) == len(content["runs"])
    assert tuple(table[0]) == results.CSV_COLUMNS
    assert [r["optimizer"] for r in table[: len(OPTIMIZERS)]] == list(OPTIMIZERS)
    # The state of AdamW is two fp32 moments and one fp32 step count per tensor.
    adamw = content["runs"][0]
    assert 8 < adamw["bytes_per_parameter"] < 8.01
    report = (folder / "report.md").read_text()
    assert report in capsys.readouterr().out
    for name in (
        "AdamW8bit",
        "came-pytorch",
        "CAME8bit, Nesterov − CAME, Nesterov",
        "noise",
        "`came8bit tradeoff",
    ):
        assert name in report
    assert "Partial" not in report
    assert {path.name for path in folder.iterdir()} == set(results.FILES)


def test_the_picture_shows_every_optimizer(small):
    from matplotlib import colors, image

    _, folder = small("--optimizers", "adamw,came-published,came8bit")
    pixels = image.imread(folder / "tradeoff.png")[..., :3]
    height, width, _ = pixels.shape
    assert width > 1500
    assert height > 800
    white = (pixels > 0.99).all(axis=-1).mean()
    assert 0.5 < white < 0.97
    for name in ("adamw", "came-published", "came8bit"):
        colour = np.array(colors.to_rgb(OPTIMIZERS[name].colour))
        assert (np.abs(pixels - colour).max(axis=-1) < 0.01).sum() > 500, name
    absent = np.array(colors.to_rgb(OPTIMIZERS["adamw8bit"].colour))
    assert (np.abs(pixels - absent).max(axis=-1) < 0.01).sum() == 0


def test_same_seed_same_start_same_batches_same_result(small):
    _, first = small("--optimizers", "adamw,came8bit", "--equal-lr", "0", out="a")
    _, again = small("--optimizers", "came8bit,adamw", "--equal-lr", "0", out="b")
    one = {(r["optimizer"], r["seed"]): r for r in read(first)["runs"]}
    two = {(r["optimizer"], r["seed"]): r for r in read(again)["runs"]}
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
    for one, two in zip(read(whole)["runs"], read(parts)["runs"], strict=True):
        assert one["train_losses"] == pytest.approx(two["train_losses"], abs=2e-4)


def test_isolated_runs_measure_their_own_memory(text_file, tmp_path):
    """In bf16, too: accelerate allows one precision per process."""
    folder = tmp_path / "out"
    words = ["tradeoff", "--text", str(text_file), "--out", str(folder), "--cpu", *SMALL]
    words += ["--width", "256", "--layers", "2", "--seeds", "1", "--optimizers", "adamw,came8bit"]
    words += ["--mixed-precision", "bf16", "--equal-lr", "0"]
    assert main(words) == 0
    adamw, ours = read(folder)["runs"][:2]
    assert [run["purpose"] for run in read(folder)["runs"]] == ["memory"] * 2 + ["final"] * 2
    if sys.platform == "linux":
        assert "VmHWM" in adamw["memory_method"]
        # Weights, gradients and two moments in fp32 have to be in there, and little else.
        count = adamw["parameters"]
        assert 16 * count < adamw["peak_memory"] < 16 * count + 50 * 2**20
        saved = adamw["state_bytes"] - ours["state_bytes"]
        assert 0.8 * saved < adamw["peak_memory"] - ours["peak_memory"] < 1.2 * saved


def test_several_processes_do_not_change_the_run(text_file, tmp_path):
    """Two gloo processes share each batch; the data and the result stay those of one process."""
    outputs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        words = ["-m", "came8bit", "tradeoff", "--text", str(text_file), "--out", str(folder)]
        words += ["--cpu", "--in-process", "--optimizers", "adamw,came8bit", *SMALL, "--seeds", "1"]
        done = run_python(*launch, *words, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(read(folder)["runs"])
    for one, two in zip(*outputs, strict=True):
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["train_losses"] == pytest.approx(two["train_losses"], abs=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)
        assert two["eval_items"] == one["eval_items"]


# ---- learning rates ----


def test_the_search_picks_the_best_mean_and_uses_it(small):
    code, folder = small("--optimizers", "adamw", "--tune", "--grid", "adamw=1e-9,3e-2,3e-3")
    assert code == 0
    runs = read(folder)["runs"]
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
    code, folder = small("--optimizers", "adamw", "--tune", "--grid", "adamw=1e-3,1e9")
    assert code == 0
    runs = read(folder)["runs"]
    assert {run["lr"] for run in runs if run["purpose"] == "final"} == {1e-3}
    assert {run["status"] for run in runs if run["lr"] == 1e9} == {"failed"}
    assert "1e+09: failed" in (folder / "report.md").read_text()


def test_every_optimizer_runs_at_the_common_rate_as_well(small):
    code, folder = small("--optimizers", "adamw,came-corrected,came-published", "--seeds", "1")
    assert code == 0
    runs = {(run["optimizer"], run["lr"]) for run in read(folder)["runs"]}
    both = {("came-published", 5e-5), ("came-published", 1e-3)}
    assert runs == {("adamw", 1e-3), ("came-corrected", 1e-3)} | both
    report = (folder / "report.md").read_text()
    assert "loss at lr 0.001" in report
    assert "1 seeds" not in report


def test_warm_up_then_cosine():
    task = replace(PRESETS["quick"].tasks[0], steps=100, warmup_steps=9, schedule="cosine")
    factors = [schedule(task, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0.1 < factors[-1] < 0.102
    assert schedule(replace(task, schedule="constant"), 99) == 1.0
    assert schedule(replace(task, warmup_steps=0), 0) == 1.0


# ---- what goes wrong ----


def test_what_is_missing_for_the_command_itself_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["tradeoff"]) == 2
    assert "needs accelerate: pip install 'came8bit[cli]'" in capsys.readouterr().err


def test_a_missing_baseline_is_named_as_skipped(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, folder = small("--optimizers", "adamw,adamw8bit")
    assert code == 0
    assert "pip install 'bitsandbytes'" in read(folder)["skipped"]["adamw8bit"]
    assert {run["optimizer"] for run in read(folder)["runs"]} == {"adamw"}
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
    code, folder = small("--optimizers", "came,adamw", "--lr", "came=1", "--equal-lr", "0")
    assert code == 1
    content = read(folder)
    assert [run["status"] for run in content["runs"]] == ["failed", "ok", "failed", "ok"]
    assert content["state"] == "complete"
    report = (folder / "report.md").read_text()
    assert "## Failed" in report
    assert report.count("RuntimeError: no such instruction") == 1
    assert "CAME, Nesterov on text, seeds 0, 1: RuntimeError: no such instruction" in report
    assert rows(folder)[0]["error"].startswith("RuntimeError: no such instruction")


def test_a_run_that_diverges_is_a_failure(small):
    code, folder = small("--optimizers", "adamw", "--lr", "adamw=1e9")
    assert code == 1
    assert "DivergedError" in read(folder)["runs"][0]["error"]
    assert not (folder / "tradeoff.png").exists()


def test_ctrl_c_keeps_what_is_finished(small, monkeypatch, capsys):
    calls = []

    def interrupted(spec, data, progress):
        calls.append(spec)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(spec, data, progress)

    real = train.run_here
    monkeypatch.setattr(train, "run_here", interrupted)
    code, folder = small("--optimizers", "adamw,came8bit", "--equal-lr", "0")
    assert code == 130
    content = read(folder)
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
    # A shell has its background jobs ignore SIGINT, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        study = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert study.stderr is not None
    for line in study.stderr:
        if line.startswith("[3/1001]"):
            break
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to every process at once
    out, err = study.communicate(timeout=120)
    assert study.returncode == 130, err
    assert "Traceback" not in err
    content = read(folder)
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


# ---- fewer seeds, other tasks ----


def test_slow_baselines_run_fewer_seeds_and_are_marked(small):
    code, folder = small(
        "--optimizers", "adamw,came-pytorch", "--slow-seeds", "1", "--equal-lr", "0"
    )
    assert code == 0
    assert [r["optimizer"] for r in read(folder)["runs"]] == ["adamw", "came-pytorch", "adamw"]
    report = (folder / "report.md").read_text()
    assert "came-pytorch*" in report
    assert "fewer seeds than the others" in report
    assert "slow on a CPU: came-pytorch" in report


def test_images_from_end_to_end(tmp_path):
    """Vision transformer, convolutions and denoising, at sizes of a second or two."""
    write_fashion_mnist(tmp_path / "data" / "fashion-mnist")
    words = ["tradeoff", "--tasks", "vision,cnn,ddpm", "--data-dir", str(tmp_path / "data")]
    words += ["--out", str(tmp_path / "out"), "--in-process", "--optimizers", "adamw,came8bit"]
    words += [*SMALL, "--cpu", "--width", "16", "--batch-size", "16", "--seeds", "1"]
    assert main([*words, "--lr", "adamw=1e-3", "--lr", "came8bit=1e-3"]) == 0
    content = read(tmp_path / "out")
    assert content["data"]["ddpm"]["source"] == "Fashion-MNIST"
    assert [run["task"] for run in content["runs"]] == ["vision"] * 2 + ["cnn"] * 2 + ["ddpm"] * 2
    assert all(run["status"] == "ok" for run in content["runs"])
    assert [run["accuracy"] is None for run in content["runs"]] == [False] * 4 + [True] * 2
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nat per image" in report
    assert "squared error of the noise" in report


def test_a_preset_without_its_images_skips_them_by_name(text_file, tmp_path, capsys):
    words = ["tradeoff", "--preset", "standard", "--no-tune", "--lr", "adamw=1e-3", "--cpu"]
    words += ["--text", str(text_file), "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    words += ["--in-process", "--optimizers", "adamw", *SMALL]
    assert main(words) == 0
    assert "make data" in read(tmp_path / "o")["skipped"]["vision"]
    assert "SKIPPED vision" in capsys.readouterr().out
    assert "task vision: Fashion-MNIST is not in" in (tmp_path / "o" / "report.md").read_text()
