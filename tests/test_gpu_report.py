"""The report for GPU machines and its benchmark, as far as a machine without a GPU can try them.

What a part makes of the programs it runs is tried with programs that end as wished; the benchmark
runs tiny cases on the CPU.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _scripts_are_importable() -> Any:
    folders = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture
def gpu_report() -> ModuleType:
    import gpu_report

    return gpu_report


@pytest.fixture
def report(gpu_report: ModuleType, tmp_path: Path) -> Any:
    made = gpu_report.Report(
        out=tmp_path / "out",
        dry=False,
        deadline=time.monotonic() + 60,
        wheels=tmp_path / "wheels",
        work=tmp_path / "work",
    )
    made.out.mkdir()
    made.work.mkdir()
    return made


def ends(status: int | None, text: str, also: Any = None) -> Any:
    """Stands in for ``Report.run``: every program prints ``text`` and gives ``status``."""

    def run(report: Any, part: Any, command: list[str], log: str, **variables: str) -> int | None:
        (report.out / log).write_text(text, encoding="utf-8")
        if also:
            also(command)
        return status

    return run


# --- parts of the report --------------------------------------------------------------------------


def test_the_parts_fit_into_ten_minutes(gpu_report: ModuleType) -> None:
    assert sum(limit for _, limit, _ in gpu_report.PARTS) <= 600


def junit(*inner: str) -> str:
    cases = "".join(
        f'<testcase classname="t" name="n{i}">{x}</testcase>' for i, x in enumerate(inner)
    )
    return f"<testsuites><testsuite>{cases}</testsuite></testsuites>"


@pytest.mark.parametrize(
    ("inner", "status", "expected"),
    [
        (["", ""], 0, "ok"),
        (["", '<skipped message="no GPU"/>'], 0, "FAILED"),  # it could have run there
        (["", '<failure message="x"/>'], 1, "FAILED"),
        (["", '<error message="x"/>'], 1, "FAILED"),
        (["", ""], 2, "FAILED"),  # pytest itself failed
    ],
)
def test_skipped_tests_fail(
    gpu_report: ModuleType,
    report: Any,
    monkeypatch: pytest.MonkeyPatch,
    inner: list[str],
    status: int,
    expected: str,
) -> None:
    def results(command: list[str]) -> None:
        (report.work / "tests.xml").write_text(junit(*inner))
        assert any(part.endswith("test_kernels_cuda.py") for part in command)
        assert any(part.endswith("test_kernels_cuda_device.py") for part in command)

    monkeypatch.setattr(gpu_report.Report, "run", ends(status, "log", results))
    part = gpu_report.Part("tests", 10)
    gpu_report.tests(report, part)
    assert part.status == expected
    if inner[1]:
        assert any("t::n1" in line for line in part.lines)


def test_pytest_without_results(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report.Report, "run", ends(None, "stopped after 3 s"))
    part = gpu_report.Part("tests", 10)
    gpu_report.tests(report, part)
    assert part.status == "FAILED"
    assert "stopped after 3 s" in "\n".join(part.lines)


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (9, "========= ERROR SUMMARY: 3 errors", "FAILED"),
        (None, "", "FAILED"),
        (1, "========= Error: Device not supported", "not run"),
    ],
)
def test_sanitizer(
    gpu_report: ModuleType,
    report: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: int | None,
    text: str,
    expected: str,
) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_report.Report, "run", ends(status, text))
    part = gpu_report.Part("memcheck", 10)
    gpu_report.sanitizer("memcheck")(report, part)
    assert part.status == expected


def test_missing_sanitizer_is_said(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    part = gpu_report.Part("racecheck", 10)
    gpu_report.sanitizer("racecheck")(report, part)
    assert part.status == "not run"
    assert part.lines == ["compute-sanitizer is not on this machine"]


def test_build_for_the_gpu_that_torch_sees(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    said = "-- came8bit: nvcc 13.0.88, sm_90 compute_90\n"
    monkeypatch.setattr(gpu_report.Report, "run", ends(0, said, commands.append))
    monkeypatch.setattr(gpu_report, "first_line", lambda command: "90")
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.status == "ok"
    assert part.lines == ["came8bit: nvcc 13.0.88, sm_90 compute_90"]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in commands[0]
    assert commands[2][-2:] == ["--prefix", str(ROOT)]  # next to the Python files


def test_failed_build(gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.Report, "run", ends(1, "step.cu(1): error: the moon"))
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.status == "FAILED"
    assert "the moon" in "\n".join(part.lines)


def test_a_program_that_takes_too_long(gpu_report: ModuleType, report: Any) -> None:
    part = gpu_report.Part("tests", 1)
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert report.run(part, command, "tests.log") is None
    assert part.seconds < 20
    text = (report.out / "tests.log").read_text()
    assert "begun" in text
    assert "stopped after 1 s" in text
    assert report.run(part, ["/no/such/program"], "tests.log") == 127


def test_one_failure_does_not_stop_the_rest(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def breaks(report: Any, part: Any) -> None:
        """It breaks."""
        raise ValueError("the moon")

    def works(report: Any, part: Any) -> None:
        """It works."""
        part.end("ok", "fine")

    monkeypatch.setattr(gpu_report, "PARTS", (("first", 1, breaks), ("second", 1, works)))
    out = tmp_path / "report"
    options = ["--out", str(out), "--work", str(tmp_path / "work")]
    assert gpu_report.main(options) == 1
    content = json.loads((out / "report.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["FAILED", "ok"]
    assert "ValueError: the moon" in (out / "report.md").read_text()
    assert gpu_report.main([*options, "--parts", "second"]) == 0
    assert gpu_report.main([*options, "--parts", "second", "--budget", "1"]) == 0
    assert "out of time" in (out / "report.md").read_text()
    capsys.readouterr()


def test_dry_run(tmp_path: Path) -> None:
    """In earnest, without the parts that take long: nothing pretends to have run on a GPU."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu_report.py"), "--dry-run"]
    out, work = tmp_path / "out", tmp_path / "work"
    command += ["--out", str(out), "--work", str(work), "--wheels", str(tmp_path / "nowhere")]
    command += ["--parts", "facts,peers,memcheck"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "report.json").read_text())
    assert content["dry_run"] is True
    assert [part["status"] for part in content["parts"]] == ["ok", "not run", "not run"]
    assert "no GPU; the cases ran on the CPU" in (out / "report.md").read_text()
    assert "24 steps of 11 parameters on cpu" in (out / "sanitizer.log").read_text()
    assert sum(1 for _ in out.iterdir()) <= 8


# --- the benchmark --------------------------------------------------------------------------------


def test_counted_bytes() -> None:
    import bench_gpu_cases as cases

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
    # On an H200 the layers of GPT-2 fit half of the cache, and its embedding does not.
    assert cases.largest_swept(cases.CASES["gpt2-layers"], "float32") < 30e6
    assert cases.largest_swept(cases.CASES["gpt2"], "bfloat16") > 30e6


def test_kernels_are_assigned_to_sweeps() -> None:
    from bench_gpu_measure import by_sweep

    shapes = [(1000, 1000), (1000,), (16, 16)]
    kernels = [
        ("void came8bit::(anonymous namespace)::second_moment_kernel<came8bit::Bf16, true>", 1e-3),
        ("came8bit::(anonymous namespace)::second_moment_combine_kernel", 1e-4),
        ("void came8bit::residual_kernel<came8bit::Bf16, signed char, true>", 2e-3),
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
    import bench_gpu_cases as cases

    text = sources()
    for sweep in cases.SWEEPS:
        name = sweep.kernels.split(")")[-1]
        assert f"{name}(const Parameter" in text, name


def test_state_of_tensor_subclasses_is_counted() -> None:
    """torchao keeps its state in tensors without a storage of their own."""
    from bench_gpu_measure import state_bytes
    from torch.testing._internal.two_tensor import TwoTensor

    param = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([param])
    shared = torch.ones(8)
    inside = TwoTensor(torch.ones(10), torch.ones(10))
    optimizer.state[param] = {"m": inside, "v": shared, "w": shared[2:], "step": 3}
    assert state_bytes(optimizer) == 40 + 40 + 32


def test_targets() -> None:
    from bench_gpu_targets import judge

    def row(optimizer: str, **changes: Any) -> dict[str, Any]:
        values = dict(
            case="8192x8192", dtype="bfloat16", optimizer=optimizer, tensors=1, numel=64 << 20,
            param_bytes=128 << 20, largest_swept_bytes=192 << 20, p50_ms=0.2, ms_per_1e9=2.9,
            time_over_ours_p50=1.0, extra_bytes=5_000_000, of_copy=0.9, remark="",
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
    assert judge({**result, "about": {}}) == []  # no GPU, nothing to judge


def test_benchmark_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing and failing optimizers are said, the others measured; the files can be read."""
    import bench_gpu
    import bench_gpu_peers as peers

    def fails(params: Any) -> torch.optim.Optimizer:
        raise RuntimeError("the moon")

    chosen = {name: peers.OPTIMIZERS[name] for name in ("CAME8bit", "CAME32bit", "AdamW(fused)")}
    chosen["absent"] = peers.Entry(fails, "no_such_module")
    chosen["broken"] = peers.Entry(fails, slow=True)
    for module in (bench_gpu, peers):
        monkeypatch.setattr(module, "OPTIMIZERS", chosen)
    for _ in range(2):
        bench_gpu.main(["--device", "cpu", "--seconds", "60", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert "plumbing only" in result["about"]["device"]
    assert result["targets"] == []
    measured = {(r["case"], r["dtype"], r["optimizer"]) for r in result["rows"]}
    names = ("CAME8bit", "CAME32bit", "AdamW(fused)")
    cases = [(case, dtype) for case in ("tiny", "tiny-matrix") for dtype in bench_gpu.DTYPES]
    assert measured == {(*case, name) for case in cases for name in names}
    for row in result["rows"]:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        if row["optimizer"] == "CAME8bit":
            assert row["time_over_ours_p50"] == 1.0
    said = {item["what"]: item["why"] for item in result["not_run"]}
    assert said["absent"] == "no_such_module is not installed"
    assert said["tiny bfloat16 broken"] == "RuntimeError: the moon"
    assert said["tiny bfloat16: sweeps"] == "no GPU"
    assert {group["case"] for group in result["group_bytes"]} == {"tiny"}
    with (tmp_path / "gpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(measured)
    capsys.readouterr()
    (tmp_path / "gpu.csv").write_text("other,columns\n")
    with pytest.raises(SystemExit, match="move it away first"):
        bench_gpu.write(result, tmp_path)


def test_benchmark_out_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_gpu
    import bench_gpu_peers as peers

    chosen = {"CAME8bit": peers.OPTIMIZERS["CAME8bit"]}
    for module in (bench_gpu, peers):
        monkeypatch.setattr(module, "OPTIMIZERS", chosen)
    bench_gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["rows"] == []
    assert {item["why"] for item in result["not_run"]} == {"out of time"}
    capsys.readouterr()


def test_benchmark_needs_a_gpu_or_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_gpu

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_gpu.parse([])
        assert "--device cpu tries the plumbing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_gpu.parse(["--device", "cpu", "--cases", "moon"])
    assert "expected some of tiny, tiny-matrix" in capsys.readouterr().err
