"""What the benchmark for GPUs counts, how it times, what it scans and judges."""

import ctypes
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT

from benchmarks.gpu_step import __main__ as bench_gpu
from benchmarks.gpu_step import cases, peers, scans
from benchmarks.gpu_step.cases import CASES, largest_swept
from benchmarks.gpu_step.measure import Device, by_name, by_sweep, make_params
from benchmarks.gpu_step.run import Case, start
from benchmarks.gpu_step.targets import judge
from benchmarks.harness import state_bytes
from benchmarks.peers import BITSANDBYTES

# --- what is counted ------------------------------------------------------------------------------


def test_counted_bytes():
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


def test_kernels_are_assigned_to_sweeps():
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


def sources():
    return "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")))


def test_the_kernels_are_still_called_that():
    text = sources()
    for sweep in cases.SWEEPS:
        name = sweep.kernels.split(")")[-1]
        assert f"{name}(const Parameter" in text, name


def test_state_of_tensor_subclasses_is_counted():
    """torchao keeps its state in tensors without a storage of their own."""
    from torch.testing._internal.two_tensor import TwoTensor

    param = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([param])
    shared = torch.ones(8)
    inside = TwoTensor(torch.ones(10), torch.ones(10))
    optimizer.state[param] = {"m": inside, "v": shared, "w": shared[2:], "step": 3}
    assert state_bytes(optimizer) == 40 + 40 + 32


def test_targets():
    def row(optimizer, **changes):
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


def test_kernels_by_name():
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


def waiting_device(host, queued_in):
    """A device on which a step takes ``host`` seconds to return and ``queued_in`` to be queued."""

    class Waiting(Device):
        def __init__(self, name):
            super().__init__(name)
            self.pauses = []

        def plain(self, step):
            return 3.0, host

        def covered(self, step, pause):
            self.pauses.append(pause)
            return 1.0, pause > queued_in

    return Waiting("cpu")


def test_the_device_sleeps_until_all_is_queued():
    device = waiting_device(host=0.01, queued_in=0.0)
    assert device.pause_for(lambda: None) == pytest.approx(0.025, rel=0.1)  # 2 to 3 times the host
    device = waiting_device(host=0.01, queued_in=0.04)
    assert device.pause_for(lambda: None) == pytest.approx(0.05, rel=0.1)
    assert len(device.pauses) >= 3
    device = waiting_device(host=0.01, queued_in=1e9)  # it waits for the device, whatever one does
    assert device.pause_for(lambda: None) is None
    assert max(device.pauses) <= 0.2


def test_kernels_are_timed_covered_and_both_are_told():
    times = bench_gpu.Times(pause=0.1)
    times.measure(waiting_device(0.01, 0.0), "CAME8bit", lambda: None)
    assert (times.covered, times.plain, times.host, times.hidden) == ([1.0], [3.0], [0.01], 1)
    times = bench_gpu.Times(pause=None)
    times.measure(waiting_device(0.01, 0.0), "came-pytorch", lambda: None)
    assert (times.covered, times.plain, times.hidden) == ([3.0], [3.0], 0)


@pytest.mark.parametrize("pause", [0.1, None])
def test_plain_times_are_compared_with_plain_times(tmp_path, pause):
    run = start(Device("cpu"), 10, tmp_path, add=False)
    case = Case("tiny", "float32", make_params([(8, 8)], "float32", "cpu"))
    optimizer = torch.optim.SGD(case.params)
    ours = bench_gpu.Times(0.1, covered=[1.0], plain=[10.0], host=[1.0], hidden=1)
    theirs = bench_gpu.Times(pause, covered=[2.0 if pause else 50.0], plain=[50.0], host=[1.0])
    row = bench_gpu.row_of(run, case, "x", optimizer, {"CAME8bit": ours, "x": theirs})
    assert row["time_over_ours_p50"] == (2.0 if pause else 5.0)
    assert row["plain_over_ours_p50"] == 5.0
    assert row["plain_p50_ms"] == 50_000.0


def test_bitsandbytes_does_not_wait_while_kernels_are_timed(monkeypatch):
    waited = []
    module = SimpleNamespace(sync_gpu=waited.append)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.optimizer", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    with peers.unhindered("CAME8bit"):
        module.sync_gpu("a")

    def fails():
        with peers.unhindered(BITSANDBYTES):
            module.sync_gpu("b")
            raise ValueError("moon")

    with pytest.raises(ValueError, match="moon"):
        fails()
    module.sync_gpu("c")
    assert waited == ["a", "c"]


def test_bitsandbytes_still_waits_there():
    """Where it is installed: what is replaced is what its step calls."""
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")
    assert "sync_gpu" in optimizer.Optimizer8bit.step.__wrapped__.__code__.co_names


# --- scans ----------------------------------------------------------------------------------------


def test_the_library_sees_what_a_scan_sets(monkeypatch):
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


def test_scans_are_of_what_decides_something():
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


def test_a_variable_that_a_library_does_not_ask_for(tmp_path):
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"\0CAME8BIT_CUDA_GROUP_BYTES\0")
    assert scans.is_known("CAME8BIT_CUDA_GROUP_BYTES", str(library))
    assert not scans.is_known("CAME8BIT_CUDA_APPLY_ROUNDS", str(library))
    assert not scans.is_known("CAME8BIT_CUDA_GROUP_BYTES", None)


def test_every_value_is_set_while_it_is_timed(tmp_path):
    seen = []

    class Watching(Device):
        def covered(self, step, pause):
            seen.append(os.environ.get("X_VARIABLE", "1"))
            return float(seen[-1] or 0), True

    run = start(Watching("cpu"), 10, tmp_path, add=False)
    case = Case("tiny", "float32", make_params([(8, 8)], "float32", "cpu"))
    seen.clear()
    scans.run_scan(run, scans.Scan("X_VARIABLE", "tiny", ("1", "2")), case, 0.1)
    assert set(seen) == {"", "1", "2"}
    assert [row["p50_ms"] for row in run.scans] == [0.0, 1000.0, 2000.0]
    assert "X_VARIABLE" not in os.environ
