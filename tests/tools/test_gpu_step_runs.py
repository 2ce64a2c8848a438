"""Whole runs of the benchmark for GPUs, as far as a machine without one can try them."""

import contextlib
import csv
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT

from benchmarks.gpu_step import __main__ as bench_gpu
from benchmarks.gpu_step import cases, peers, scans
from benchmarks.gpu_step.cases import CASES
from benchmarks.gpu_step.measure import Device, DeviceLost, make_params
from benchmarks.gpu_step.targets import judge
from benchmarks.peers import BITSANDBYTES, OURS, Peer


@pytest.fixture
def bench(monkeypatch):
    """With quick optimizers, one that is missing and one that fails."""
    chosen = {name: peers.OPTIMIZERS[name] for name in ("CAME8bit", "CAME32bit", "AdamW(fused)")}
    chosen["absent"] = Peer("no_such_module", "x")
    chosen["broken"] = Peer("torch.optim", "AdamW", {"the moon": 1})
    for module in (bench_gpu, scans):
        monkeypatch.setattr(module, "OPTIMIZERS", chosen)
    monkeypatch.setattr(bench_gpu, "MAIN", ("CAME8bit", "AdamW(fused)", "broken"))
    for module, name in (bench_gpu, "LONGEST_CASE"), (bench_gpu, "OF_OTHERS"), (scans, "OF_A_SCAN"):
        monkeypatch.setattr(module, name, 0.1)
    return bench_gpu


def run(bench, folder, *options):
    """One call of the benchmark on the CPU; its status and its file."""
    status = bench.main(["--device", "cpu", "--seconds", "60", "--out", str(folder), *options])
    return status, json.loads((folder / "gpu.json").read_text())


def measured(result):
    return {(row["case"], row["dtype"], row["optimizer"]) for row in result["rows"]}


# --- whole runs -----------------------------------------------------------------------------------


def test_benchmark_on_the_cpu(bench, tmp_path):
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


def test_pieces_go_into_one_file(bench, tmp_path):
    one = ("--cases", "tiny-matrix", "--dtypes", "float32", "--add", "--pieces")
    _, first = run(bench, tmp_path, *one, "benchmarks")
    _, second = run(bench, tmp_path, *one, "others")
    assert {row["optimizer"] for row in second["rows"]} == {"CAME8bit", "AdamW(fused)", "CAME32bit"}
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


OUT_OF_MEMORY, LAUNCH = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("launch failed")


@pytest.mark.parametrize(
    ("error", "lost"), [(OUT_OF_MEMORY, None), (LAUNCH, None), (LAUNCH, DeviceLost("unspecified"))]
)
def test_a_case_that_fails_is_not_the_rest(bench, tmp_path, monkeypatch, error, lost):
    """Unless it takes the device with it; then what is known is left."""

    def make(shapes, dtype, device):
        if shapes == [(256, 256)]:
            raise error
        return make_params(shapes, dtype, device)

    def check(device):
        if lost:
            raise lost

    monkeypatch.setattr(bench, "make_params", make)
    monkeypatch.setattr(Device, "check", check)
    del bench.OPTIMIZERS["broken"]
    status, result = run(bench, tmp_path, "--pieces", "benchmarks")
    assert status == (bench.LOST if lost else 1)  # ours could not be measured
    found = {(case, dtype) for case, dtype, _ in measured(result)}
    assert found == {("tiny", "bfloat16")} | (set() if lost else {("tiny", "float32")})
    said = {item["what"]: item["why"] for item in result["not_run"]}
    assert said["tiny-matrix bfloat16"] == f"{type(error).__name__}: {error}"
    last = said.get("everything that was left")
    assert last == ("the device is lost: unspecified" if lost else None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_what_it_knows(tmp_path, number):
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


def test_benchmark_out_of_time(bench, tmp_path):
    bench.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["rows"] == []
    late = [item for item in result["not_run"] if item["why"] == "out of time"]
    assert {"tiny bfloat16", "tiny float32 CAME32bit"} < {item["what"] for item in late}


def test_the_largest_tensor_is_stepped_alone(bench, tmp_path, monkeypatch):
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


def test_what_may_take_forever_comes_last():
    """torchao compiles within its first step, where no clock is looked at."""
    assert list(peers.OPTIMIZERS)[-1] == "torchao AdamW8bit"
    assert list(bench_gpu.PIECES)[-1] == "others"
    assert peers.MAIN == (OURS, "AdamW(fused)", BITSANDBYTES)


def test_benchmark_needs_a_gpu_or_to_be_told(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_gpu.parse([])
        assert "--device cpu tries the plumbing" in capsys.readouterr().err
    for name in ("moon", "gpt2"):
        with pytest.raises(SystemExit):
            bench_gpu.parse(["--device", "cpu", "--cases", name])
        assert ", tiny-matrix" in capsys.readouterr().err


# --- as on a GPU ----------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """The calls that the benchmark makes of a GPU, whose memory is the CPU's."""
    calls = []

    def call(name, result=None):
        def called(*_, **__):
            calls.append(name)
            return result

        return called

    def event(enable_timing):
        return SimpleNamespace(
            record=call("record"),
            query=call("query", False),
            synchronize=call("synchronize"),
            elapsed_time=lambda other: 2.0,
        )

    properties = SimpleNamespace(
        name="NVIDIA Moon", total_memory=80 << 30, L2_cache_size=1 << 16, major=9, minor=0
    )
    fakes = {
        "Event": event,
        "CUDAGraph": lambda: SimpleNamespace(replay=call("replay")),
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
        def __init__(self, name):
            super().__init__("cpu")
            self.is_cuda = True

        def copy_bandwidth(self, nbytes=None, repeats=3):
            return super().copy_bandwidth(1 << 10, repeats)

    small = {name: [(64, 64), (8,)] for name in bench_gpu.CASES}
    on_cpu = lambda shapes, dtype, _: make_params(shapes, dtype, "cpu")  # noqa: E731
    for module in (bench_gpu, scans):
        monkeypatch.setattr(module, "make_params", on_cpu)
    monkeypatch.setattr(bench_gpu, "Device", FakeDevice)
    monkeypatch.setattr(bench_gpu, "CASES", small)
    found = [("came8bit::instability_kernel<came8bit::Bf16>(int)", 1e-3)]
    monkeypatch.setattr(scans, "kernel_times", lambda step: found)
    return calls


def test_in_what_order_a_gpu_is_asked(bench, fake_gpu):
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


def test_everything_as_on_a_gpu(bench, fake_gpu, tmp_path, capsys):
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
