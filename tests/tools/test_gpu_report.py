"""The report for GPU machines, as far as a machine without a GPU can try it.

What a part makes of the programs it runs is tried with programs that end as wished.
"""

import json
import math
import sys
import time
import zipfile
from pathlib import Path

import gpu_report
import gpu_report_parts as parts
import gpu_report_tests
import pytest
from gpu_report_run import FAILED, NOT_RUN, OK, Part, Report, shortened
from gpu_report_tests import Session
from paths import ROOT
from processes import run_python


@pytest.fixture
def report(tmp_path):
    made = Report(tmp_path / "out", tmp_path / "work", tmp_path / "wheels")
    made.gpu = {"gpu": "NVIDIA Moon", "capability": "9.0"}
    for folder in (made.out, made.work, made.wheels):
        folder.mkdir()
    return made


def part_of(seconds=50.0):
    return Part("part", time.monotonic() + seconds)


def ended(function, report, *arguments, seconds=50.0):
    """The part that ``function`` has run; its lines are one text, too."""
    part = part_of(seconds)
    function(report, part, *arguments)
    part.said = "\n".join(part.lines)
    return part


@pytest.fixture
def programs(monkeypatch):
    """Have every program print a text and give a status; returns their commands."""

    def make(status, text):
        commands = []

        def run(report, part, *command, **_):
            commands.append([str(word) for word in command])
            (report.work / f"{part.name}.log").write_text(text)
            if "--install" in command:
                folder = Path(commands[-1][-1]) / "came8bit"
                folder.mkdir(parents=True, exist_ok=True)
                for name in parts.LIBRARIES:
                    (folder / name).write_text("library")
            return status

        monkeypatch.setattr(Report, "run", run)
        return commands

    return make


# --- time and programs ----------------------------------------------------------------------------


def test_parts_share_the_budget():
    assert gpu_report.share([60, 600, 940], math.inf) == 60
    assert gpu_report.share([60, 600, 940], 800) == 30
    assert gpu_report.share([600, 400], 900) == 540  # what the first has not taken is for all
    assert gpu_report.share([400], 900) == 400
    assert gpu_report.share([400, 10], -3) < 0
    order = "facts build tests memcheck peers benchmarks scans racecheck capped others"
    assert [row.name for row in gpu_report.PARTS] == order.split()
    assert gpu_report.parse(["--out", "x"]).budget == math.inf


def test_nothing_of_a_stopped_program_goes_on(report):
    """It is asked first, and can write; its children do not survive it, deaf as they may be."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('what I know', flush=True)\n"
    )
    part = part_of(3)
    assert report.run(part, sys.executable, "-c", code) is None
    said = report.text(part).splitlines()
    assert {"what I know", "stopped after 3 s"} < set(said)
    (pid,) = filter(str.isdigit, said)
    status, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while status.exists() and status.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)
    assert report.run(part_of(), "/no/such/program") == 127


def test_what_is_kept_of_parts_that_fail(monkeypatch, tmp_path):
    def breaks(report, part):
        """Break."""
        raise ValueError("the moon")

    def works(report, part):
        """Work."""
        (report.work / "works.log").write_text("all is well")
        part.end(OK, "fine")

    def ends(report, part):
        """Be told to end."""
        kill = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
        report.run(part, sys.executable, "-c", kill)

    rows = [gpu_report.Row(f.__name__, 60, f) for f in (breaks, works, ends)]
    monkeypatch.setattr(gpu_report, "PARTS", rows)
    out, work = tmp_path / "out", tmp_path / "work"
    options = ["--out", str(out), "--work", str(work), "--parts"]
    assert gpu_report.main([*options, "breaks,works"]) == 1
    content = json.loads((out / "report.json").read_text())
    assert [part["status"] for part in content["parts"]] == [FAILED, OK]
    assert "ValueError: the moon" in (out / "report.md").read_text()
    assert "===== works\nall is well" in (out / "logs.txt").read_text()
    (work / "installed").write_text("")
    (work / "old.log").write_text("of another run")
    assert gpu_report.main([*options, "works", "--keep"]) == 0
    assert "another run" not in (out / "logs.txt").read_text()
    assert (work / "installed").exists()
    assert gpu_report.main([*options, "works", "--budget", "1"]) == 0
    assert "out of time" in (out / "report.md").read_text()
    assert not (work / "installed").exists()
    for names, error in (("works,ends", "1"), ("third", "2")):
        with pytest.raises(SystemExit, match=error):
            gpu_report.main([*options, names])
    content = json.loads((out / "report.json").read_text())
    assert [part["name"] for part in content["parts"]] == ["works", "ends"]
    assert shortened("first " + "x" * 10 + " last", 10) == "first\n[... 11 characters ...]\n last"


# --- facts, build, peers --------------------------------------------------------------------------


def test_facts(report):
    part = ended(parts.facts, report)
    assert part.status == OK
    assert "capability 9.0" in part.said
    report.gpu = {"problem": "no driver"}
    part = ended(parts.facts, report)
    assert (part.status, part.lines[-1]) == (FAILED, "torch sees no GPU")


def test_a_kept_build_is_not_made_again(report, programs, monkeypatch, tmp_path):
    """But for other sources or another GPU, or if it cannot be loaded."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    source, installed = tmp_path / "csrc" / "step.cu", tmp_path / "came8bit" / "_C_cuda.so"
    source.parent.mkdir()
    installed.parent.mkdir()
    source.write_text("1")

    def built(capability, keep, *, kept):
        report.gpu, report.keep = {"capability": capability}, keep
        commands = programs(0, "-- came8bit: nvcc 13.0.88, sm_90\n")
        part = ended(parts.build, report)
        assert part.status == OK
        assert part.lines[0].startswith("kept:" if kept else "came8bit: nvcc 13.0.88")
        return commands

    report.build_for = "9.0"
    commands = built("", False, kept=False)
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in commands[0]
    assert commands[2][-2:] == ["--prefix", str(report.work / "libraries")]
    assert not installed.exists()  # it is for another machine,
    report.build_for = ""
    built("9.0", True, kept=True)  # which finds it
    assert installed.exists()
    built("8.0", True, kept=False)
    built("8.0", False, kept=False)
    built("8.0", True, kept=True)
    source.write_text("2")
    built("8.0", True, kept=False)
    programs(1, "step.cu(1): error: the moon")
    part = ended(parts.build, report)
    assert part.lines[0] == "what was kept cannot be loaded here; built anew"
    assert part.status == FAILED
    assert "the moon" in part.said


def test_wheels_are_unpacked_beside_the_build(report):
    """In earnest: one that is broken is not all of them."""
    for name in ("broken", "hypothesis"):  # of which the second is there already
        (report.wheels / f"{name}-1.0-py3-none-any.whl").write_text("not a zip")
    info = "lunar_optimizer-1.0.dist-info"
    with zipfile.ZipFile(report.wheels / "lunar_optimizer-1.0-py3-none-any.whl", "w") as file:
        file.writestr("lunar_optimizer.py", "answer = 42\n")
        metadata = "Metadata-Version: 2.1\nName: lunar_optimizer\nVersion: 1.0\n"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"lunar_optimizer.py,,\n{info}/METADATA,,\n")
    report.peers.start()
    lines = ended(parts.peers, report).lines
    found = [line.replace("-1.0-py3-none-any.whl:", "") for line in lines]
    assert found == ["broken NOT installed", "lunar_optimizer installed"]
    assert report.peers.unpacked.is_set()
    assert (report.work / "site" / "lunar_optimizer.py").exists()
    assert str(report.work / "site") in report.environment()["PYTHONPATH"]
    assert report.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0"


# --- tests ----------------------------------------------------------------------------------------

OUTCOMES = """
import os, time
import pytest
pytestmark = pytest.mark.cuda
def test_passed(): pass
def test_failed(): assert 1 == 2, "the moon"
@pytest.fixture
def broken(): raise ValueError("without a fixture")
def test_error(broken): pass
def test_skipped(): pytest.skip("without a GPU")
def test_crashed(): os._exit(9)
def test_crashed_since_it_hangs(): time.sleep(60)
def test_failed_and_lost_the_device():
    import gpu_worker
    gpu_worker.device_lost = lambda: "an illegal memory access"
    raise RuntimeError("CUDA error")
def test_passed_after_all_that(): pass
"""


def run_tests(report, text, seconds=50.0):
    path = report.work / "test_it.py"
    path.write_text(text)
    part = part_of(seconds)
    session = gpu_report_tests.run_pytest(report, part, "tests", [path], 1, part.left())
    part = ended(gpu_report_tests.judge, report, [session])
    assert part.status == FAILED
    return session, part


def test_every_kind_of_result(report, monkeypatch):
    """Tests are named after what becomes of them."""
    monkeypatch.setattr(gpu_report_tests, "HANG_SECONDS", 3)
    session, part = run_tests(report, OUTCOMES, 150)
    found = {test.split("::test_")[1]: kind for test, kind in session.kinds.items()}
    assert len(found) == 8
    assert all(name.startswith(kind) for name, kind in found.items())
    assert session.finished
    assert "2 passed, 2 failed, 1 error, 2 crashed, 1 skipped, 0 not reached" in part.lines
    for text in ("AssertionError: the moon", "ValueError: without", "skipped: ", "without a GPU"):
        assert text in part.said
    assert "the device was lost: an illegal memory access" in part.lines
    assert "in test_crashed_since_it_hangs" in report.text(part)  # where it was


def test_results_before_the_time_is_up_are_kept(report):
    text = "import pytest, time\npytestmark = pytest.mark.cuda\ndef test_a(): pass\n"
    text += "def test_b(): time.sleep(60)\ndef test_c(): pass\n"
    _, part = run_tests(report, text, 15)
    assert part.lines[0] == "1 passed, 0 failed, 0 error, 0 crashed, 0 skipped, 2 not reached"
    assert "pytest (tests) ran out of time:" in part.lines
    _, part = run_tests(report, "import no_such_module")
    assert "No module named 'no_such_module'" in part.said


@pytest.mark.parametrize(
    ("outcome", "finished", "expected"),
    [
        ("passed", True, (OK, NOT_RUN)),
        ("skipped", True, (FAILED, NOT_RUN)),  # it could have run there
        ("failed", True, (FAILED, FAILED)),
        ("not reached", True, (FAILED, FAILED)),
        ("passed", False, (FAILED, FAILED)),  # pytest itself failed
    ],
)
def test_only_tests_that_all_pass_are_good(report, outcome, finished, expected):
    session = Session("tests", 2, finished, {"t::a": "passed", "t::b": outcome})
    for report.dry, status in zip((False, True), expected, strict=True):
        assert ended(gpu_report_tests.judge, report, [session]).status == status


def test_all_marked_tests_are_run(report, programs):
    commands = programs(1, "No module named pytest")
    part = ended(gpu_report_tests.tests, report)
    assert part.status == FAILED
    assert "No module named pytest" in part.said
    shared, alone = ([w for w in command if w.endswith(".py")] for command in commands)
    assert shared == [f"{ROOT}/tests/kernels/test_cuda.py"]
    wanted = {
        f"{ROOT}/tests/{name}.py" for name in ("kernels/test_cuda_device", "paging/test_cuda")
    }
    assert wanted < set(alone) - set(shared)


# --- sanitizer, benchmarks ------------------------------------------------------------------------


def test_where_the_sanitizer_is_looked_for(report, monkeypatch, tmp_path):
    for name in ("CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(parts, "CUDA", tmp_path / "usr")
    monkeypatch.setattr(parts.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{tmp_path / 'toolkit/bin'}")
    places = "usr/cuda-13.0/bin usr/cuda/compute-sanitizer usr/cuda/extras/compute-sanitizer "
    places += "site/nvidia/cu13/bin home/bin toolkit/bin real/bin path"
    for place in places.split():
        (tmp_path / place).mkdir(parents=True)
    # nvcc on the path, a link to the one in its toolkit.
    (tmp_path / "real/bin/nvcc").touch(0o755)
    (tmp_path / "toolkit/bin/nvcc").symlink_to(tmp_path / "real/bin/nvcc")
    for place in places.split():
        found = tmp_path / place / "compute-sanitizer"
        found.touch(0o644)
        part = ended(parts.sanitizer("racecheck"), report)
        assert part.status == NOT_RUN
        assert part.lines == ["compute-sanitizer is not on this machine: racecheck did NOT run"]
        found.chmod(0o755)
        assert parts.find_sanitizer() == str(found)
        found.unlink()


@pytest.mark.parametrize(
    ("status", "text", "expected", "line"),
    [
        (0, "case 7 of 7 is done\n========= ERROR SUMMARY: 0 errors", OK, "0 errors"),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 3 errors", FAILED, "Invalid read"),
        (None, "case 3 of 7: flat", FAILED, "nothing was found up to here"),
        (None, "case 3 of 7: flat\n========= Invalid read", FAILED, "Invalid read"),
        (None, "case 3 of 7: flat", FAILED, "case 3 of 7: flat"),
        (1, "========= Error: Device not supported", NOT_RUN, "memcheck did NOT run"),
    ],
)
def test_sanitizer(report, programs, monkeypatch, status, text, expected, line):
    commands = programs(status, f"========= COMPUTE-SANITIZER\n{text}")
    monkeypatch.setattr(parts, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    part = ended(parts.sanitizer("memcheck"), report)
    assert commands[0][1:3] == ["--tool", "memcheck"]
    assert part.status == expected
    assert line in part.said


@pytest.mark.parametrize("status", [0, 1, 3, None])
def test_benchmarks(report, programs, status):
    said = ["tiny float32 CAME8bit 1.0 ms 1.00 x ours", "holds  target: it fits", "MISSED goal: x"]
    said += ["not run: y: out of time", "    X=1: 3 ms", "cap llama-7b 16 GB: ok, 7 tokens/s"]
    for run, options in (
        (parts.step_times("benchmarks"), "benchmarks.gpu_step --pieces benchmarks --add"),
        (parts.capped, "benchmarks.memory_cap"),
    ):
        commands = programs(status, "\n".join([*said, "something else"]))
        part = ended(run, report, seconds=40)
        expected = f"{sys.executable} -m {options} --out {report.out} --seconds 30"
        assert " ".join(commands[0]) == expected
        assert part.status == (OK if status == 0 else FAILED)
        assert part.lines[-len(said) :] == said
        assert ("what was measured before is kept" in part.said) == (status != 0)


def test_dry_run(tmp_path):
    """In earnest, without the parts that take long: nothing pretends to have run on a GPU."""
    out = tmp_path / "out"
    command = [ROOT / "tools" / "gpu_report.py", "--dry-run", "--out", out]
    command += ["--work", tmp_path / "work", "--wheels", tmp_path / "nowhere"]
    command += ["--parts", "facts,peers,memcheck,scans"]
    done = run_python(*command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((out / "report.json").read_text())
    assert content["dry_run"] is True
    assert [p["status"] for p in content["parts"]] == [OK, NOT_RUN, NOT_RUN, NOT_RUN]
    assert "no GPU; the cases ran on the CPU" in (out / "report.md").read_text()
    assert "is done, on cpu" in (out / "logs.txt").read_text()
    assert "gpu.json" in {path.name for path in out.iterdir()}
