"""The benchmark for GPUs as far as a machine without one can try it: tiny cases, and fakes."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

from benchmarks.gpu_step import __main__ as bench_gpu
from benchmarks.gpu_step import cases, peers, scans
from benchmarks.gpu_step.cases import CASES, largest_swept
from benchmarks.gpu_step.measure import Device, DeviceLost, by_name, by_sweep, make_params
from benchmarks.gpu_step.run import Case, start
from benchmarks.gpu_step.targets import judge
from benchmarks.harness import state_bytes
from benchmarks.peers import BITSANDBYTES, OURS, Peer


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With quick optimizers, one that is missing and one that fails."""
    chosen = {name: peers.OPTIMIZERS[name] for name in ("CAME8bit", "CAME32bit", "AdamW(fused)")}
    chosen["absent"] = Peer("no_such_module", "x")
    chosen["broken"] = Peer("torch.optim", "AdamW", {"the moon": 1})
    for module in (bench_gpu, scans):
        monkeypatch.setattr(module, "OPTIMIZERS", chosen)
    monkeypatch.setattr(bench_gpu, "MAIN", ("CAME8bit", "AdamW(fused)", "broken"))
    for module, name in (
        (bench_gpu, "LONGEST_CASE"),
        (bench_gpu, "OF_OTHERS"),
        (scans, "OF_A_SCAN"),
    ):
        monkeypatch.setattr(module, name, 0.1)
    return bench_gpu


def run(bench: ModuleType, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """One call of the benchmark on the CPU; its status and its file."""
    status = bench.main(["--device", "cpu", "--seconds", "60", "--out", str(folder), *options])
    return status, json.loads((folder / "gpu.json").read_text())


def measured(result: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(row["case"], row["dtype"], row["optimizer"]) for row in result["rows"]}


# --- what is counted ------------------------------------------------------------------------------


def test_counted_bytes() -> None:
    for dtype, streamed, cached, adamw in (("bfloat16", 13, 8, 10), ("float32", 23, 14, 16)):
        assert cases.streamed_bytes([(10, 10)], dtype) == 100 * streamed
        assert cases.cached_bytes([(10, 10)], dtype) == 100 * cached
        assert cases.adamw8bit_bytes([(10, 10)], dtype) == 100 * adamw
    sizes = {
        name: sum(torch.Size(s).numel() for s in shapes) for name, shapes in cases.CASES.items()
    }
    assert sizes["gpt2"] == 124_439_808
    assert sizes["llama-1b"] == 1_235_814_400
    assert sizes["llama-7b-layers"] == 6 * (6_738_415_616 - 2 * 32000 * 4096 - 4096) // 32
    assert sizes["8192x8192"] == 64 << 20
    assert sizes["128256x4096"] == 128256 * 4096
    # On an H200 the layers of GPT-2 fit half of the cache, and its embedding does not.
    assert cases.largest_swept(cases.CASES["gpt2-layers"], "float32") < 30e6
    assert cases.largest_swept(cases.CASES["gpt2"], "bfloat16") > 30e6


def test_kernels_are_assigned_to_sweeps() -> None:
    shapes = [(1000, 1000), (1000,), (16, 16)]
    kernels = [
        ("void came8bit::(anonymous namespace)::second_moment_kernel<came8bit::Bf16, true>", 1e-3),
        ("came8bit::(anonymous namespace)::second_moment_combine_kernel", 1e-4),
        ("void came8bit::instability_kernel<came8bit::Bf16, signed char, true>", 2e-3),
        ("void came8bit::apply_kernel<came8bit::Bf16, came8bit::Bf16, signed char, true>", 3e-3),
        ("void came8bit::apply_kernel<came8bit::Bf16, came8bit::Bf16, signed char, true>", 1e-3),
        ("void came8bit::flat_apply_kernel<float, true>", 5e-4),
        ("came8bit::small_flat_kernel", 5e-4),
    ]
    found = {sweep.sweep[0]: sweep for sweep in by_sweep(kernels, shapes, "bfloat16")}
    assert [found[name].launches for name in "ABCe"] == [1, 1, 2, 3]
    assert [found[name].bytes for name in "ABCe"] == [2_000_000, 3_000_000, 8_000_000, 0]
    assert found["C"].seconds == pytest.approx(4e-3)
    assert found["A"].flat(4e9)["of_copy"] == 0.5


def sources() -> str:
    return "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")))


def test_the_kernels_are_still_called_that() -> None:
    text = sources()
    for sweep in cases.SWEEPS:
        name = sweep.kernels.split(")")[-1]
        assert f"{name}(const Parameter" in text, name


def test_state_of_tensor_subclasses_is_counted() -> None:
    """torchao keeps its state in tensors without a storage of their own."""
    from torch.testing._internal.two_tensor import TwoTensor

    param = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([param])
    shared = torch.ones(8)
    inside = TwoTensor(torch.ones(10), torch.ones(10))
    optimizer.state[param] = {"m": inside, "v": shared, "w": shared[2:], "step": 3}
    assert state_bytes(optimizer) == 40 + 40 + 32


def test_targets() -> None:
    def row(optimizer: str, **changes: Any) -> dict[str, Any]:
        values = dict(
            case="8192x8192", dtype="bfloat16", optimizer=optimizer, tensors=1, numel=64 << 20,
            param_bytes=128 << 20, largest_swept_bytes=192 << 20, p50_ms=0.2, ms_per_1e9=2.9,
            covered=1.0, time_over_ours_p50=1.0, extra_bytes=5_000_000, of_copy=0.9, remark="",
            adamw8bit_bytes=640 << 20,
        )  # fmt: skip
        return {**values, **changes}

    rows = [
        row("CAME8bit"),
        row("bitsandbytes AdamW8bit", time_over_ours_p50=0.9),
        row("came-pytorch", time_over_ours_p50=12.0),
        row("adafactor8bit CAME", time_over_ours_p50=1.2),
    ]
    result = {"about": {"l2_bytes": 60 << 20}, "copy": {"bytes_per_second": 4e12}, "rows": rows}
    found = {t["what"].split(": ")[1]: t for t in judge(result)}
    assert found["CAME8bit / bitsandbytes AdamW8bit"]["kind"] == "goal"  # does not fit the cache
    assert not found["CAME8bit / bitsandbytes AdamW8bit"]["holds"]
    assert found["came-pytorch / CAME8bit"]["holds"]
    assert not found["adafactor8bit / CAME8bit"]["holds"]
    assert found["bandwidth of the counted bytes over copy bandwidth"]["holds"]
    assert found["extra MB of a step"]["limit"] == pytest.approx(8.67, abs=0.01)
    bound = found["time over that of AdamW8bit's bytes at copy bandwidth"]
    assert bound["got"] == pytest.approx(0.2e-3 / ((640 << 20) / 4e12))
    assert bound["limit"] == 1.3
    assert found["ms per 10⁹ parameters"]["kind"] == "stretch"
    rows[1]["largest_swept_bytes"] = 1 << 20
    rows[3]["remark"] = "without its CUDA kernels"  # a comparison with Python proves nothing
    found = {t["what"].split(": ")[1]: t for t in judge(result)}
    assert found["CAME8bit / bitsandbytes AdamW8bit"]["kind"] == "target"
    assert "adafactor8bit / CAME8bit" not in found
    rows[2]["covered"] = 0.0
    (what,) = (t["what"] for t in judge(result) if "came-pytorch" in t["what"])
    assert what == "8192x8192 bfloat16 (plain times): came-pytorch / CAME8bit"
    assert judge({**result, "about": {}}) == []  # no GPU, nothing to judge


def test_kernels_by_name() -> None:
    kernels = [
        ("void came8bit::(anonymous namespace)::apply_kernel<came8bit::Bf16, signed char, "
         "(came8bit::Access)2>(came8bit::Parameter const*, int)", 2e-3),
        ("came8bit::describe(came8bit::ParameterBatch, int)", 1e-3),
        ("came8bit::describe(came8bit::ParameterBatch, int)", 2e-3),
    ]  # fmt: skip
    assert by_name(kernels) == [
        {"kernel": "describe", "launches": 2, "ms": 3.0},
        {"kernel": "apply_kernel<Bf16, signed char, Access 2>", "launches": 1, "ms": 2.0},
    ]


# --- how steps are timed --------------------------------------------------------------------------


def waiting_device(host: float, queued_in: float) -> Any:
    """A device on which a step takes ``host`` seconds to return and ``queued_in`` to be queued."""

    class Waiting(Device):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.pauses: list[float] = []

        def plain(self, step: Callable[[], object]) -> tuple[float, float]:
            return 3.0, host

        def covered(self, step: Callable[[], object], pause: float) -> tuple[float, bool]:
            self.pauses.append(pause)
            return 1.0, pause > queued_in

    return Waiting("cpu")


def test_the_device_sleeps_until_all_is_queued() -> None:
    device = waiting_device(host=0.01, queued_in=0.0)
    assert device.pause_for(lambda: None) == pytest.approx(0.025, rel=0.1)  # 2 to 3 times the host
    device = waiting_device(host=0.01, queued_in=0.04)
    assert device.pause_for(lambda: None) == pytest.approx(0.05, rel=0.1)
    assert len(device.pauses) >= 3
    device = waiting_device(host=0.01, queued_in=1e9)  # it waits for the device, whatever one does
    assert device.pause_for(lambda: None) is None
    assert max(device.pauses) <= 0.2


def test_kernels_are_timed_covered_and_both_are_told(bench: ModuleType) -> None:
    times = bench.Times(pause=0.1)
    times.measure(waiting_device(0.01, 0.0), "CAME8bit", lambda: None)
    assert (times.covered, times.plain, times.host, times.hidden) == ([1.0], [3.0], [0.01], 1)
    times = bench.Times(pause=None)
    times.measure(waiting_device(0.01, 0.0), "came-pytorch", lambda: None)
    assert (times.covered, times.plain, times.hidden) == ([3.0], [3.0], 0)


@pytest.mark.parametrize("pause", [0.1, None])
def test_plain_times_are_compared_with_plain_times(
    bench: ModuleType, tmp_path: Path, pause: float | None
) -> None:
    run = start(Device("cpu"), 10, tmp_path, add=False)
    case = Case("tiny", "float32", make_params([(8, 8)], "float32", "cpu"))
    optimizer = torch.optim.SGD(case.params)
    ours = bench.Times(0.1, covered=[1.0], plain=[10.0], host=[1.0], hidden=1)
    theirs = bench.Times(pause, covered=[2.0 if pause else 50.0], plain=[50.0], host=[1.0])
    row = bench.row_of(run, case, "x", optimizer, {"CAME8bit": ours, "x": theirs})
    assert row["time_over_ours_p50"] == (2.0 if pause else 5.0)
    assert row["plain_over_ours_p50"] == 5.0
    assert row["plain_p50_ms"] == 50_000.0


def test_bitsandbytes_does_not_wait_while_kernels_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []
    module = SimpleNamespace(sync_gpu=waited.append)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.optimizer", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    with peers.unhindered("CAME8bit"):
        module.sync_gpu("a")

    def fails() -> None:
        with peers.unhindered(BITSANDBYTES):
            module.sync_gpu("b")
            raise ValueError("moon")

    with pytest.raises(ValueError, match="moon"):
        fails()
    module.sync_gpu("c")
    assert waited == ["a", "c"]


def test_bitsandbytes_still_waits_there() -> None:
    """Where it is installed: what is replaced is what its step calls."""
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")
    assert "sync_gpu" in optimizer.Optimizer8bit.step.__wrapped__.__code__.co_names


# --- scans ----------------------------------------------------------------------------------------


def test_the_library_sees_what_a_scan_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``getenv`` of C, as csrc/cuda/step.cu asks."""
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_char_p
    name = "CAME8BIT_CUDA_GROUP_BYTES"
    monkeypatch.delenv(name, raising=False)
    with scans.environment(name, "123"):
        assert library.getenv(name.encode()) == b"123"
        with scans.environment(name, ""):
            assert library.getenv(name.encode()) == b""
        assert library.getenv(name.encode()) == b"123"
    assert library.getenv(name.encode()) is None
    assert name not in os.environ


def test_scans_are_of_what_decides_something() -> None:
    of = {(scan.variable, scan.case): scan for scan in scans.SCANS}
    groups = [case for variable, case in of if variable == scans.GROUP]
    l2 = 50 << 20
    fits = {case: largest_swept(CASES[case], "bfloat16") <= l2 / 2 for case in groups}
    assert sorted(fits.values()) == [False, True]
    assert all(len(CASES[case]) > 1 for case in groups)  # or there is nothing to group
    values = of[scans.GROUP, groups[0]].settings(l2)
    assert values[0] == ""
    assert str(l2 // 2) in values
    assert of[scans.SMALL, "lora-7b"].values == ("0", "4096", "16384", "65536")
    assert of[scans.ROUNDS, "llama-7b-layers"].values == ("8", "16", "32")


def test_a_variable_that_a_library_does_not_ask_for(tmp_path: Path) -> None:
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"\0CAME8BIT_CUDA_GROUP_BYTES\0")
    assert scans.is_known("CAME8BIT_CUDA_GROUP_BYTES", str(library))
    assert not scans.is_known("CAME8BIT_CUDA_APPLY_ROUNDS", str(library))
    assert not scans.is_known("CAME8BIT_CUDA_GROUP_BYTES", None)


def test_every_value_is_set_while_it_is_timed(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watching(Device):
        def covered(self, step: Callable[[], object], pause: float) -> tuple[float, bool]:
            seen.append(os.environ.get("X_VARIABLE", "1"))
            return float(seen[-1] or 0), True

    run = start(Watching("cpu"), 10, tmp_path, add=False)
    case = Case("tiny", "float32", make_params([(8, 8)], "float32", "cpu"))
    seen.clear()
    scans.run_scan(run, scans.Scan("X_VARIABLE", "tiny", ("1", "2")), case, 0.1)
    assert set(seen) == {"", "1", "2"}
    assert [row["p50_ms"] for row in run.scans] == [0.0, 1000.0, 2000.0]
    assert "X_VARIABLE" not in os.environ


# --- whole runs -----------------------------------------------------------------------------------


def test_benchmark_on_the_cpu(bench: ModuleType, tmp_path: Path) -> None:
    """Missing and failing optimizers are said, the others measured; the files can be read."""
    for _ in range(2):
        status, result = run(bench, tmp_path)
        assert status == 0
    assert "plumbing only" in result["about"]["device"]
    assert result["targets"] == []
    names = ("CAME8bit", "CAME32bit", "AdamW(fused)")
    every = [(case, dtype) for case in ("tiny", "tiny-matrix") for dtype in bench.DTYPES]
    assert measured(result) == {(*case, name) for case in every for name in names}
    for row in result["rows"]:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["plain_p20_ms"] <= row["plain_p50_ms"] <= row["plain_p80_ms"]
        if row["optimizer"] == "CAME8bit":
            assert row["time_over_ours_p50"] == 1.0
    said = {item["what"]: item["why"] for item in result["not_run"]}
    assert said["absent"] == "no_such_module is not installed"
    assert said["tiny bfloat16 broken"].startswith("TypeError: ")
    assert said["sweeps"] == "no GPU"
    assert {scan["variable"] for scan in result["scans"]} == {
        "CAME8BIT_CUDA_GROUP_BYTES",
        "CAME8BIT_CUDA_SMALL_ELEMENTS",
    }
    with (tmp_path / "gpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(result["rows"])
    (tmp_path / "gpu.csv").write_text("other,columns\n")
    with pytest.raises(SystemExit, match="move it away first"):
        run(bench, tmp_path, "--pieces", "benchmarks", "--cases", "tiny")


def test_pieces_go_into_one_file(bench: ModuleType, tmp_path: Path) -> None:
    one = ("--cases", "tiny-matrix", "--dtypes", "float32", "--add", "--pieces")
    _, first = run(bench, tmp_path, *one, "benchmarks")
    _, second = run(bench, tmp_path, *one, "others")
    assert {row["optimizer"] for row in second["rows"]} == {
        "CAME8bit",
        "AdamW(fused)",
        "CAME32bit",
    }
    (ours,) = (row for row in first["rows"] if row["optimizer"] == "CAME8bit")
    assert ours in second["rows"]  # not that of the short round
    assert second["copy"] == first["copy"]
    assert {item["piece"] for item in second["not_run"]} == {"benchmarks", "others"}
    _, again = run(bench, tmp_path, *one, "benchmarks")
    assert len(again["rows"]) == len(second["rows"])
    assert ours not in again["rows"]
    assert again["not_run"].count(second["not_run"][0]) == 1
    # Figures of other sources are not mixed with these.
    (tmp_path / "gpu.json").write_text(json.dumps({**again, "about": {"git": "other"}}))
    _, new = run(bench, tmp_path, *one, "others")
    assert {row["optimizer"] for row in new["rows"]} == {"CAME8bit", "CAME32bit"}


@pytest.fixture
def failing(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What happens when the second case's parameters are made."""
    wish: dict[str, Any] = {}
    right = bench.make_params
    del bench.OPTIMIZERS["broken"]

    def make(shapes: Any, dtype: str, device: str) -> Any:
        if shapes == [(256, 256)]:
            raise wish["error"]
        return right(shapes, dtype, device)

    def check(device: Any) -> None:
        if "lost" in wish:
            raise wish["lost"]

    monkeypatch.setattr(bench, "make_params", make)
    monkeypatch.setattr(Device, "check", check)
    return wish


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("launch failed")]
)
def test_a_case_that_fails_is_not_the_rest(
    bench: ModuleType, tmp_path: Path, failing: dict[str, Any], error: Exception
) -> None:
    failing["error"] = error
    status, result = run(bench, tmp_path, "--pieces", "benchmarks")
    assert status == 1  # ours could not be measured
    cases = {(case, dtype) for case, dtype, _ in measured(result)}
    assert cases == {("tiny", "bfloat16"), ("tiny", "float32")}
    said = {item["what"]: item["why"] for item in result["not_run"]}
    assert said["tiny-matrix bfloat16"] == f"{type(error).__name__}: {error}"


def test_a_lost_device_ends_the_run_and_leaves_what_is_known(
    bench: ModuleType, tmp_path: Path, failing: dict[str, Any]
) -> None:
    failing |= {"error": RuntimeError("illegal access"), "lost": DeviceLost("unspecified launch")}
    status, result = run(bench, tmp_path)
    assert status == bench.LOST
    assert {(case, dtype) for case, dtype, _ in measured(result)} == {("tiny", "bfloat16")}
    said = {item["what"]: item["why"] for item in result["not_run"]}
    assert said["tiny-matrix bfloat16"] == "RuntimeError: illegal access"
    assert said["everything that was left"] == "the device is lost: unspecified launch"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_what_it_knows(tmp_path: Path, number: signal.Signals) -> None:
    """However it ends: in the middle of the second case there are rows of the first."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu_step import __main__ as bench_gpu\n"
        "right = bench_gpu.make_params\n"
        "def make(shapes, *rest):\n"
        "    if shapes == [(256, 256)]:\n"
        "        print('now', flush=True); time.sleep(60)\n"
        "    return right(shapes, *rest)\n"
        "bench_gpu.make_params = make\n"
        "del bench_gpu.OPTIMIZERS['bitsandbytes AdamW8bit']\n"
        f"bench_gpu.main(['--device', 'cpu', '--seconds', '60', '--out', {str(tmp_path)!r}])\n"
    )
    restore = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                if line.strip() == "now":
                    break
            process.send_signal(number)
            process.communicate(timeout=30)
    finally:
        signal.signal(signal.SIGINT, restore)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {(case, dtype) for case, dtype, _ in measured(result)} == {("tiny", "bfloat16")}
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == 1 + len(result["rows"])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["gpu.csv", "gpu.json"]


def test_benchmark_out_of_time(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["rows"] == []
    late = [item for item in result["not_run"] if item["why"] == "out of time"]
    assert {"tiny bfloat16", "tiny float32 CAME32bit"} < {item["what"] for item in late}


def test_the_largest_tensor_is_stepped_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 only: for the extra memory of its step, which has a target."""
    (name,) = cases.ALONE
    assert CASES[name] == [(128256, 4096)]
    monkeypatch.setattr(bench, "ALONE", ("tiny-matrix",))
    _, result = run(bench, tmp_path, "--pieces", "benchmarks")
    found = {found for found in measured(result) if found[0] == "tiny-matrix"}
    assert found == {("tiny-matrix", "bfloat16", "CAME8bit")}
    row = {**result["rows"][0], "case": name, "param_bytes": 128256 * 4096 * 2, "tensors": 1}
    row |= {"numel": 128256 * 4096, "extra_bytes": 14_000_000, "optimizer": "CAME8bit"}
    found = judge({**result, "about": {"l2_bytes": 50 << 20}, "rows": [row]})
    (memory,) = (t for t in found if "extra MB" in t["what"])
    assert memory["limit"] == pytest.approx(13.25, abs=0.01)
    assert not memory["holds"]


def test_what_may_take_forever_comes_last() -> None:
    """torchao compiles within its first step, where no clock is looked at."""
    assert list(peers.OPTIMIZERS)[-1] == "torchao AdamW8bit"
    assert list(bench_gpu.PIECES)[-1] == "others"
    assert peers.MAIN == (OURS, "AdamW(fused)", BITSANDBYTES)


def test_benchmark_needs_a_gpu_or_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_gpu.parse([])
        assert "--device cpu tries the plumbing" in capsys.readouterr().err
    for name in ("moon", "gpt2"):
        with pytest.raises(SystemExit):
            bench_gpu.parse(["--device", "cpu", "--cases", name])
        assert ", tiny-matrix" in capsys.readouterr().err


# --- as on a GPU ----------------------------------------------------------------------------------


class FakeEvent:
    """An event of :func:`fake_gpu`."""

    calls: list[str]

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.calls.append("record")

    def query(self) -> bool:
        self.calls.append("query")
        return False

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def elapsed_time(self, other: object) -> float:
        return 2.0


class FakeGraph:
    """A CUDA graph that does nothing when it is replayed."""

    def replay(self) -> None:
        FakeEvent.calls.append("replay")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The calls that the benchmark makes of a GPU, whose memory is the CPU's."""
    calls: list[str] = []
    monkeypatch.setattr(FakeEvent, "calls", calls, raising=False)

    def call(name: str, result: object = None) -> Callable[..., object]:
        def called(*_: object, **__: object) -> object:
            calls.append(name)
            return result

        return called

    properties = SimpleNamespace(
        name="NVIDIA Moon", total_memory=80 << 30, L2_cache_size=1 << 16, major=9, minor=0
    )
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph: contextlib.nullcontext(calls.append("capture")),
        "_sleep": call("sleep"),
        "synchronize": call("wait"),
        "empty_cache": call("empty"),
        "reset_peak_memory_stats": call("reset"),
        "memory_allocated": call("memory", 1000),
        "max_memory_allocated": call("memory", 1_001_000),
        "is_available": call("available", True),
        "get_device_properties": call("properties", properties),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"CAME8BIT_CUDA_GROUP_BYTES CAME8BIT_CUDA_SMALL_ELEMENTS")
    status = SimpleNamespace(loaded=True, path=str(library), isa="sm_90", reason="")
    for module in (scans.came8bit, torch.cuda):
        kernels = lambda: SimpleNamespace(cuda=status)  # noqa: E731
        monkeypatch.setattr(module, "kernel_status", kernels, raising=False)

    class FakeDevice(Device):
        def __init__(self, name: str) -> None:
            super().__init__("cpu")
            self.is_cuda = True

        def copy_bandwidth(self, nbytes: int | None = None, repeats: int = 3) -> dict[str, Any]:
            return super().copy_bandwidth(1 << 10, repeats)

    right = make_params
    small = {name: [(64, 64), (8,)] for name in bench_gpu.CASES}
    for module in (bench_gpu, scans):
        monkeypatch.setattr(
            module, "make_params", lambda shapes, dtype, _: right(shapes, dtype, "cpu")
        )
    monkeypatch.setattr(bench_gpu, "Device", FakeDevice)
    monkeypatch.setattr(bench_gpu, "CASES", small)
    found = [("came8bit::instability_kernel<came8bit::Bf16>(int)", 1e-3)]
    monkeypatch.setattr(scans, "kernel_times", lambda step: found)
    return calls


def test_in_what_order_a_gpu_is_asked(bench: ModuleType, fake_gpu: list[str]) -> None:
    """The pause comes before the event that begins, and all is queued before anyone waits."""
    device = bench.Device("cuda")
    fake_gpu.clear()
    step = lambda: fake_gpu.append("step")  # noqa: E731
    assert device.covered(step, 0.01) == (pytest.approx(0.002), True)
    asked = fake_gpu[fake_gpu.index("sleep") :]
    calibration = ["sleep", "record", "sleep", "record", "synchronize"]
    assert asked == [*calibration, "sleep", "record", "step", "record", "query", "synchronize"]
    fake_gpu.clear()
    assert device.plain(step)[0] == pytest.approx(0.002)
    assert fake_gpu == ["record", "step", "record", "synchronize"]
    fake_gpu.clear()
    device.captured(step)()
    assert fake_gpu == ["capture", "step", "replay"]
    assert device.extra_bytes(step) == 1_000_000


def test_everything_as_on_a_gpu(
    bench: ModuleType, fake_gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All lines that only a GPU reaches, but for the calls of CUDA themselves."""
    out = tmp_path / "out"
    assert bench.main(["--seconds", "100", "--out", str(out)]) == 0
    result = json.loads((out / "gpu.json").read_text())
    assert result["about"]["device"] == "NVIDIA Moon"
    assert {row["case"] for row in result["rows"]} == set(bench.CASES)
    assert all(row["covered"] == 1.0 for row in result["rows"])
    assert all(row["extra_bytes"] == 1_000_000 for row in result["rows"])
    of = {(scan["variable"], scan["case"]) for scan in result["scans"]}
    assert len(of) == 3  # a library that knows two variables
    assert all(scan["graph_p50_ms"] == 2.0 for scan in result["scans"])
    said = {item["what"]: item["why"] for item in result["not_run"]}
    name = "CAME8BIT_CUDA_APPLY_ROUNDS llama-7b-layers"
    assert said[name] == "the library does not ask for this variable"
    profiles = [sweep for sweep in result["sweeps"] if sweep["optimizer"] == "CAME8bit"]
    assert len(profiles) == 9
    assert profiles[0]["sweeps"][1]["sweep"] == "B: instability"
    assert profiles[0]["kernels"][0]["kernel"] == "instability_kernel<Bf16>"
    assert any("extra MB" in target["what"] for target in result["targets"])
    assert "x ours" in capsys.readouterr().out
