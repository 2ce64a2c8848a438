"""The report for GPU machines and its benchmark, as far as a machine without a GPU can try them.

What a part makes of the programs it runs is tried with programs that end as wished; the benchmark
runs tiny cases on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT


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
    made.gpu = {"gpu": "NVIDIA Moon", "capability": "9.0"}
    made.out.mkdir()
    made.work.mkdir()
    return made


def ends(status: int | None, text: str, also: Any = None) -> Any:
    """Stands in for ``Report.run``: every program prints ``text`` and gives ``status``."""

    def run(
        report: Any, part: Any, command: list[str], log: str, within: float = 0, **variables: str
    ) -> int | None:
        (report.work / log).write_text(text, encoding="utf-8")
        if also:
            also(command)
        return status

    return run


# --- time and programs ----------------------------------------------------------------------------


def test_the_parts_fit_their_budget(gpu_report: ModuleType) -> None:
    """Eight minutes, so that a lease of fifteen has room for a start and for a second call."""
    assert gpu_report.BUDGET <= 480
    assert sum(row.limit for row in gpu_report.PARTS) + gpu_report.MARGIN <= gpu_report.BUDGET
    names = [row.name for row in gpu_report.PARTS]
    assert names[:5] == ["facts", "build", "tests", "memcheck", "peers"]
    assert names[5:] == ["benchmarks", "scans", "racecheck", "capped", "others"]


def test_time_that_is_left_over_is_for_the_next(gpu_report: ModuleType, report: Any) -> None:
    now = time.monotonic()
    report.deadline, report.reserved = now + 105, 40.0
    left = [
        report.left(gpu_report.Part("x", limit, most))
        for limit, most in ((20, 30), (20, math.inf), (80, 80), (200, 200))
    ]
    # Up to what it may take; what others are not promised; its own; and never beyond the end.
    assert left == pytest.approx([30, 60, 80, 100], abs=1)
    late = gpu_report.Part("x", 20, 30, begun=now - 25)
    assert report.left(late) == pytest.approx(5, abs=1)


def test_a_program_that_takes_too_long(gpu_report: ModuleType, report: Any) -> None:
    part = gpu_report.Part("tests", 1, 1)
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert report.run(part, command, "tests.log") is None
    assert time.monotonic() - part.begun < 20
    assert "begun" in report.text("tests.log")
    assert "stopped after 1 s" in report.text("tests.log")
    assert report.run(part, ["/no/such/program"], "tests.log") == 127


def test_nothing_of_a_stopped_program_goes_on(gpu_report: ModuleType, report: Any) -> None:
    """It is asked first, and can write; its children do not survive it, deaf as they may be."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('what I know', flush=True)\n"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        part = gpu_report.Part("tests", 2, 2)
        assert report.run(part, [sys.executable, "-c", code], "tests.log") is None
    finally:
        signal.signal(signal.SIGINT, before)
    said = report.text("tests.log").splitlines()
    assert "what I know" in said
    (pid,) = filter(str.isdigit, said)
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_one_failure_does_not_stop_the_rest(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def breaks(report: Any, part: Any) -> None:
        """It breaks."""
        raise ValueError("the moon")

    def works(report: Any, part: Any) -> None:
        """It works."""
        (report.work / "works.log").write_text("all is well")
        part.end("ok", "fine")

    rows = (gpu_report.Row("first", 1, 1, breaks), gpu_report.Row("second", 1, 1, works))
    monkeypatch.setattr(gpu_report, "PARTS", rows)
    out = tmp_path / "report"
    options = ["--out", str(out), "--work", str(tmp_path / "work")]
    assert gpu_report.main(options) == 1
    content = json.loads((out / "report.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["FAILED", "ok"]
    assert "ValueError: the moon" in (out / "report.md").read_text()
    assert "===== works\nall is well" in (out / "logs.txt").read_text()
    assert gpu_report.main([*options, "--parts", "second"]) == 0
    assert gpu_report.main([*options, "--parts", "second", "--budget", "1"]) == 0
    assert "out of time" in (out / "report.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        gpu_report.main([*options, "--parts", "third"])
    assert "got third" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_the_work_folder_is_kept_if_wished(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keep: bool
) -> None:
    monkeypatch.setattr(gpu_report, "PARTS", ())
    installed = tmp_path / "work" / "site" / "peer.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    (tmp_path / "work" / "old.log").write_text("of another run")
    options = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu_report.main([*options, *["--keep"] * keep]) == 0
    assert installed.exists() == keep
    assert "another run" not in (tmp_path / "out" / "logs.txt").read_text()


def test_a_report_that_is_told_to_end_writes_what_it_knows(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def works(report: Any, part: Any) -> None:
        """It works."""
        part.end("ok", "fine")

    def waits(report: Any, part: Any) -> None:
        """It is stopped."""
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        program = report.start(command, "waits.log")
        os.kill(os.getpid(), signal.SIGTERM)
        program.wait(50)

    rows = (gpu_report.Row("first", 1, 1, works), gpu_report.Row("second", 60, 60, waits))
    monkeypatch.setattr(gpu_report, "PARTS", rows)
    begin = time.monotonic()
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert time.monotonic() - begin < 30
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [part["name"] for part in content["parts"]] == ["first", "second"]


def test_long_logs_keep_their_two_ends() -> None:
    from gpu_report_run import shortened

    text = shortened("first " + "x" * 1000 + " last", 100)
    assert text.startswith("first ")
    assert text.endswith(" last")
    assert len(text) < 200
    assert "[... 911 characters ...]" in text
    assert shortened("short") == "short"


# --- facts, build, peers --------------------------------------------------------------------------


def test_facts_without_a_gpu(gpu_report: ModuleType, report: Any) -> None:
    part = gpu_report.Part("facts", 10)
    gpu_report.facts(report, part)
    assert part.status == "ok"
    assert any("capability 9.0" in line for line in part.lines)
    report.gpu = {"problem": "no driver"}
    gpu_report.facts(report, part)
    assert part.status == "FAILED"
    assert "torch sees no GPU" in part.lines


@pytest.fixture
def builds(report: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of a build that works; nothing is put next to the Python files."""
    import gpu_report_build

    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        if "--install" in command:
            folder = Path(command[-1]) / "came8bit"
            folder.mkdir(parents=True, exist_ok=True)
            for name in gpu_report_build.LIBRARIES:
                (folder / name).write_text("library")

    said = "-- came8bit: nvcc 13.0.88, sm_90 compute_90\n"
    monkeypatch.setattr(type(report), "run", ends(0, said, run))
    monkeypatch.setattr(gpu_report_build, "install", lambda folder: commands.append(["install"]))
    return commands


def test_build_for_the_gpu_that_torch_sees(
    gpu_report: ModuleType, report: Any, builds: list[list[str]]
) -> None:
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.status == "ok"
    assert part.lines == ["came8bit: nvcc 13.0.88, sm_90 compute_90"]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in builds[0]
    assert builds[2][-2:] == ["--prefix", str(report.work / "libraries")]
    assert builds[3] == ["install"]


def test_a_kept_build_is_not_made_again(
    gpu_report: ModuleType, report: Any, builds: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for other sources or another GPU, or if it cannot be loaded."""
    gpu_report.build(report, gpu_report.Part("build", 10))
    report.keep = True

    def second() -> tuple[Any, int]:
        part, before = gpu_report.Part("build", 10), len(builds)
        gpu_report.build(report, part)
        return part, len(builds) - before

    part, commands = second()
    assert part.status == "ok"
    assert part.lines[0].startswith("kept:")
    assert commands == 2  # put into its place, and tried
    report.gpu = {"capability": "8.0"}
    part, commands = second()
    assert commands == 4
    report.keep = False
    assert second()[1] == 4
    report.keep = True
    import gpu_report_build

    right = gpu_report_build.stamp
    monkeypatch.setattr(gpu_report_build, "stamp", lambda gpu: {**right(gpu), "sources": "other"})
    assert second()[1] == 4
    assert second()[1] == 2
    works = type(report).run

    def fails_to_load(report: Any, part: Any, command: list[str], *rest: Any, **more: Any) -> Any:
        return 1 if "-c" in command else works(report, part, command, *rest, **more)

    monkeypatch.setattr(type(report), "run", fails_to_load)
    part, _ = second()
    assert part.lines[0] == "what was kept cannot be loaded here; built anew"
    assert part.status == "ok"


def test_a_stamp_changes_with_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_report_build

    monkeypatch.setattr(gpu_report_build, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source = tmp_path / "csrc" / "cuda" / "step.cu"
    source.write_text("1")
    first = gpu_report_build.stamp("90")
    assert gpu_report_build.stamp("90") == first
    assert gpu_report_build.stamp("80") != first
    source.write_text("2")
    assert gpu_report_build.stamp("90") != first


def test_libraries_for_a_gpu_that_is_elsewhere(
    gpu_report: ModuleType, report: Any, builds: list[list[str]]
) -> None:
    report.build_for, report.gpu = "9.0", {}
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.status == "ok"
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in builds[0]
    assert ["install"] not in builds
    # There, they are found.
    report.build_for, report.gpu, report.keep = "", {"capability": "9.0"}, True
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.lines[0].startswith("kept:")


def test_failed_build(gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(report), "run", ends(1, "step.cu(1): error: the moon"))
    part = gpu_report.Part("build", 10)
    gpu_report.build(report, part)
    assert part.status == "FAILED"
    assert "the moon" in "\n".join(part.lines)


def wheel(folder: Path, name: str) -> None:
    """A package with one module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "answer = 42\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")


def test_wheels_are_unpacked_beside_the_build(
    gpu_report: ModuleType, report: Any, tmp_path: Path
) -> None:
    """In earnest: one that is broken is not all of them, and nobody sees the GPU."""
    wheel(report.wheels, "lunar_optimizer")
    (report.wheels / "broken-1.0-py3-none-any.whl").write_text("no zip")
    (report.wheels / "hypothesis-1.0-py3-none-any.whl").write_text("it is there already")
    gpu_report.start_peers(report)
    part = gpu_report.Part("peers", 50)
    gpu_report.peers(report, part)
    assert part.status == "ok", report.text("peers.log")
    assert (report.site / "lunar_optimizer.py").exists()
    assert sorted(part.lines) == [
        "broken-1.0-py3-none-any.whl: NOT installed",
        "lunar_optimizer-1.0-py3-none-any.whl: installed",
    ]
    assert str(report.site) in report.environment()["PYTHONPATH"]


def test_what_still_compiles_goes_on(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time; print('-- x: installed\\nunpacked', flush=True); time.sleep(60)"
    report.installing = report.start([sys.executable, "-c", code], "peers.log")
    from gpu_report_build import wait_for_wheels

    begin = time.monotonic()
    wait_for_wheels(report, gpu_report.Part("tests", 50))
    part = gpu_report.Part("peers", 1, 1)
    gpu_report.peers(report, part)
    assert time.monotonic() - begin < 20
    assert part.status == "ok"
    assert part.lines == ["still compiling, beside the next parts", "x: installed"]
    assert report.installing.alive
    report.stop()
    assert not report.installing.alive


def test_a_program_that_unpacks_and_fails(gpu_report: ModuleType, report: Any) -> None:
    report.installing = report.start([sys.executable, "-c", "1 / 0"], "peers.log")
    part = gpu_report.Part("peers", 50)
    gpu_report.peers(report, part)
    assert part.status == "FAILED"
    assert "ZeroDivisionError" in "\n".join(part.lines)


def test_compilers_are_not_shown_the_gpu(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        type(report), "start", lambda self, command, log, **variables: seen.append(variables)
    )
    gpu_report.start_peers(report)
    assert seen == [{"CUDA_VISIBLE_DEVICES": ""}]
    assert report.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0"


# --- tests ----------------------------------------------------------------------------------------

TESTS = """
import os, time
import pytest
pytestmark = pytest.mark.cuda

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "the moon"

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_broken(broken):
    pass

def test_skipped():
    pytest.skip("no GPU")

def test_no_search_for_smaller_examples():
    from hypothesis import Phase, settings
    assert Phase.shrink not in settings.default.phases
"""

DIES = """
def test_dies():
    print("it dies", flush=True)
    os._exit(9)

def test_after_death():
    pass
"""

HANGS = """
def test_hangs():
    time.sleep(60)

def test_after_hang():
    pass
"""

LOSES = """
def test_loses_the_device():
    import gpu_report_pytest
    gpu_report_pytest.device_lost = lambda: "an illegal memory access"
    raise RuntimeError("CUDA error")

def test_after_loss():
    pass
"""


def run_tests(report: Any, text: str, within: float = 50.0, shard: str = "0/1") -> Any:
    from gpu_report_run import Part
    from gpu_report_tests import Job, run_job

    path = report.work / "test_it.py"
    path.write_text(text)
    job = Job("tests", [str(path)], shard)
    run_job(report, Part("tests", 50), job, within)
    return job


def outcomes(job: Any) -> dict[str, str]:
    return {name.split("::")[1]: entry["outcome"] for name, entry in job.results.items()}


def test_every_kind_of_result(gpu_report: ModuleType, report: Any) -> None:
    import gpu_report_tests

    job = run_tests(report, TESTS)
    assert outcomes(job) == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_broken": "broken",
        "test_skipped": "skipped",
        "test_no_search_for_smaller_examples": "passed",
    }
    assert (job.status, job.starts, job.finished, job.collected) == (1, 1, True, 5)
    part = gpu_report.Part("tests", 50)
    gpu_report_tests.judge(report, part, [job])
    said = "\n".join(part.lines)
    assert part.status == "FAILED"
    assert "2 passed, 1 failed, 1 broken, 0 hung, 0 crashed, 1 skipped, 0 not reached" in said
    for text in ("AssertionError: the moon", "no fixture", "skipped: ", "test_it.py::test_fails"):
        assert text in said
    gpu_report.write(report)
    logs = (report.out / "logs.txt").read_text()
    assert logs.startswith("===== failures")  # the first thing that one looks for
    assert "AssertionError: the moon" in logs


def test_a_dead_process_is_started_again(report: Any) -> None:
    job = run_tests(report, TESTS + DIES)
    assert outcomes(job)["test_dies"] == "crashed"
    assert outcomes(job)["test_after_death"] == "passed"
    assert outcomes(job)["test_fails"] == "failed"
    (message,) = (e["message"] for n, e in job.results.items() if n.endswith("test_dies"))
    assert message == "the process ended with 9"
    assert (job.starts, job.finished, len(job.results)) == (2, True, 7)


def test_a_test_that_hangs_is_left_behind(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_REPORT_HANG_SECONDS", "1")
    job = run_tests(report, TESTS + HANGS)
    assert outcomes(job)["test_hangs"] == "hung"
    assert outcomes(job)["test_after_hang"] == "passed"
    assert job.finished
    (message,) = (e["message"] for n, e in job.results.items() if n.endswith("test_hangs"))
    assert "time.sleep(60)" in message  # where it was
    assert message.endswith("no end after 1 s")


def test_a_lost_device_is_fetched_back_by_a_new_process(
    gpu_report: ModuleType, report: Any
) -> None:
    import gpu_report_tests

    job = run_tests(report, TESTS + LOSES)
    assert outcomes(job)["test_loses_the_device"] == "failed"
    assert outcomes(job)["test_after_loss"] == "passed"
    assert (job.starts, job.finished, job.lost) == (2, True, ["an illegal memory access"])
    part = gpu_report.Part("tests", 50)
    gpu_report_tests.judge(report, part, [job])
    assert "the device was lost: an illegal memory access" in part.lines


def test_results_before_the_time_is_up_are_kept(gpu_report: ModuleType, report: Any) -> None:
    import gpu_report_tests

    job = run_tests(report, TESTS + HANGS, within=6.0)
    assert job.status is None
    assert outcomes(job)["test_fails"] == "failed"
    assert outcomes(job)["test_hangs"] == "crashed"
    part = gpu_report.Part("tests", 50)
    gpu_report_tests.judge(report, part, [job])
    assert part.status == "FAILED"
    assert "1 not reached" in part.lines[0]
    assert "out of time" in "\n".join(part.lines)


def test_a_module_that_cannot_be_imported(gpu_report: ModuleType, report: Any) -> None:
    import gpu_report_tests

    job = run_tests(report, "import no_such_module")
    part = gpu_report.Part("tests", 50)
    gpu_report_tests.judge(report, part, [job])
    assert part.status == "FAILED"
    assert "No module named 'no_such_module'" in "\n".join(part.lines)


def test_shards_are_everything_once(report: Any) -> None:
    parts = [set(outcomes(run_tests(report, TESTS, shard=f"{i}/2"))) for i in range(2)]
    assert len(parts[0]) == 3
    assert len(parts[1]) == 2
    assert len(parts[0] | parts[1]) == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"outcome": "skipped"}, "FAILED"),  # it could have run there
        ({"outcome": "failed"}, "FAILED"),
        ({"outcome": "hung"}, "FAILED"),
        ({"finished": False, "status": 2}, "FAILED"),  # pytest itself failed
        ({"collected": 3}, "FAILED"),  # there are more
    ],
)
def test_only_tests_that_all_pass_are_good(
    gpu_report: ModuleType, report: Any, changes: dict[str, Any], expected: str
) -> None:
    import gpu_report_tests

    outcome = changes.pop("outcome", "passed")
    results = {"t::a": {"outcome": "passed"}, "t::b": {"outcome": outcome}}
    values = {"collected": 2, "finished": True, "results": results, **changes}
    part = gpu_report.Part("tests", 10)
    gpu_report_tests.judge(report, part, [gpu_report_tests.Job("tests", [], **values)])
    assert part.status == expected
    if outcome != "passed":
        assert f"{outcome}: t::b" in part.lines


def test_all_marked_tests_are_run(gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report_tests

    shared, alone = gpu_report_tests.jobs(3)
    assert [job.shard for job in shared] == ["0/3", "1/3", "2/3"]
    assert {tuple(job.files) for job in shared} == {("tests/kernels/test_cuda.py",)}
    # What looks at the memory or the time of the device has it for itself.
    assert "tests/kernels/test_cuda_device.py" in alone.files
    assert "tests/paging/test_cuda.py" in alone.files
    assert "tests/kernels/test_cuda.py" not in alone.files


def test_no_pytest_at_all(
    gpu_report: ModuleType, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(report), "run", ends(1, "No module named pytest"))
    part = gpu_report.Part("tests", 10)
    gpu_report.tests(report, part)
    assert part.status == "FAILED"
    assert "No module named pytest" in "\n".join(part.lines)


# --- sanitizer ------------------------------------------------------------------------------------


@pytest.fixture
def no_sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither on the path nor in a toolkit."""
    import gpu_report_sanitizer

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(gpu_report_sanitizer, "CUDA", tmp_path / "usr")
    monkeypatch.setattr(
        gpu_report_sanitizer.sysconfig, "get_path", lambda name: str(tmp_path / "site")
    )
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)


HELP = "--tool --error-exitcode --print-limit --report-api-errors --kernel-name"


def program(path: Path, text: str = HELP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "place",
    [
        "usr/cuda-13.0/bin/compute-sanitizer",
        "usr/cuda/compute-sanitizer/compute-sanitizer",
        "usr/cuda/extras/compute-sanitizer/compute-sanitizer",
        "site/nvidia/cu13/bin/compute-sanitizer",
        "home/bin/compute-sanitizer",
        "toolkit/bin/compute-sanitizer",
        "real/bin/compute-sanitizer",
        "path/compute-sanitizer",
    ],
)
@pytest.mark.usefixtures("no_sanitizer")
def test_where_the_sanitizer_is_looked_for(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_report_sanitizer import find_sanitizer

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    # nvcc on the path, a link to the one in its toolkit.
    real = program(tmp_path / "real" / "bin" / "nvcc")
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").symlink_to(real)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{tmp_path / 'toolkit' / 'bin'}")
    assert find_sanitizer() == ""
    path = program(tmp_path / place)
    assert find_sanitizer() == str(path)
    path.chmod(0o644)
    assert find_sanitizer() == ""


@pytest.mark.usefixtures("no_sanitizer")
def test_missing_sanitizer_is_said(gpu_report: ModuleType, report: Any) -> None:
    part = gpu_report.Part("racecheck", 10)
    gpu_report.sanitizer("racecheck")(report, part)
    assert part.status == "not run"
    assert part.lines == ["compute-sanitizer is not on this machine: racecheck did NOT run"]


def test_options_that_a_sanitizer_does_not_know_are_left_out(tmp_path: Path) -> None:
    from gpu_report_sanitizer import flags

    new = flags(str(program(tmp_path / "new")), "memcheck")
    assert new[new.index("--report-api-errors") + 1] == "no"
    assert "kernel_substring=came8bit" in new
    assert new[:2] == ["--tool", "memcheck"]
    old = flags(str(program(tmp_path / "old", "--tool --print-limit")), "memcheck")
    assert old == ["--tool", "memcheck", "--print-limit", "20"]
    assert flags(str(program(tmp_path / "mute", "")), "memcheck") == new
    assert flags("/no/such/program", "memcheck") == new


BANNER = "========= COMPUTE-SANITIZER\n"


@pytest.mark.parametrize(
    ("status", "text", "expected", "line"),
    [
        (0, "case 7 of 7 is done\n========= ERROR SUMMARY: 0 errors", "ok", "0 errors"),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 3 errors", "FAILED", "Invalid read"),
        (None, "case 3 of 7: flat", "FAILED", "nothing was found up to here"),
        (None, "case 3 of 7: flat\n========= Invalid read", "FAILED", "Invalid read"),
        (None, "case 3 of 7: flat", "FAILED", "case 3 of 7: flat"),
        (1, "========= Error: Device not supported", "not run", "memcheck did NOT run"),
    ],
)
def test_sanitizer(
    gpu_report: ModuleType,
    report: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int | None,
    text: str,
    expected: str,
    line: str,
) -> None:
    import gpu_report_sanitizer

    found = str(program(tmp_path / "compute-sanitizer"))
    monkeypatch.setattr(gpu_report_sanitizer, "find_sanitizer", lambda: found)
    monkeypatch.setattr(type(report), "run", ends(status, BANNER + text))
    part = gpu_report.Part("memcheck", 10)
    gpu_report.sanitizer("memcheck")(report, part)
    assert part.status == expected
    assert line in "\n".join(part.lines)


# --- all of it ------------------------------------------------------------------------------------


def test_dry_run(tmp_path: Path) -> None:
    """In earnest, without the parts that take long: nothing pretends to have run on a GPU."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_report.py"), "--dry-run"]
    out, work = tmp_path / "out", tmp_path / "work"
    command += ["--out", str(out), "--work", str(work), "--wheels", str(tmp_path / "nowhere")]
    command += ["--parts", "facts,peers,memcheck,scans"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((out / "report.json").read_text())
    assert content["dry_run"] is True
    assert [p["status"] for p in content["parts"]] == ["ok", "not run", "not run", "not run"]
    assert "no GPU; the cases ran on the CPU" in (out / "report.md").read_text()
    assert "is done, on cpu" in (out / "logs.txt").read_text()
    # Whatever carries it may count files.
    files = {path.name for path in out.iterdir()}
    assert files == {"report.md", "report.json", "logs.txt", "gpu.json"}
    assert sum(path.stat().st_size for path in out.iterdir()) < 1 << 20
