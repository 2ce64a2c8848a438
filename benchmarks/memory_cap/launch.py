"""Starts the process in which jobs run, and limits its memory from outside."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_cap.job import Job
from benchmarks.process_memory import status

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {
    "cpu": {
        # What is freed goes back to the system at once, and threads get no memory in advance: the
        # size of the process is then that of what it holds.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        # What has threads cannot be forked: OpenMP, and autograd where it sees a GPU.
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    },
    "cuda": {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    },
}


class WorkerError(Exception):
    """The process did not do what it was asked to."""


class Worker:
    """A process for jobs, one after the other; as a context manager it ends at the end.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        corpus, data_dir: of the text.
        ready_seconds: how long it may take to import everything.

    Attributes:
        text: what the text is.
    """

    def __init__(
        self,
        device: str,
        corpus: str = "stdlib",
        data_dir: Path = Path("data"),
        ready_seconds: float = 120.0,
    ) -> None:
        self._device = device
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.memory_cap.worker", "--device", device]
        command += ["--corpus", corpus, "--data-dir", str(data_dir)]
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        settings = {**SETTINGS[device], "HF_HUB_OFFLINE": "1"}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        self._buffer = b""
        try:
            self.text = self._line(time.monotonic() + ready_seconds)["text"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self, job: Job, beyond: int | None = None, limit: int | None = None, seconds: float = 300.0
    ) -> dict[str, Any]:
        """Run ``job`` in a process of its own.

        Args:
            job: on the CPU any number after each other, on a GPU the only one.
            beyond: bytes of address space beyond what the process has before it begins; it is
                limited by this process (``prlimit``), and fails when it asks for more. None: as
                much as it wants.
            limit: in place of ``beyond``, bytes of all the process may have.
            seconds: how long it may take.

        Returns:
            What :func:`job.run` returns, and if there is a limit also ``limit``, in bytes.
            On the CPU ``outcome`` may also be ``"died"``: the process ended without an answer.

        Raises:
            WorkerError: it failed, or took too long.
        """
        deadline = time.monotonic() + seconds
        self._tell(json.dumps(job.to_dict()))
        pid = self._line(deadline)["pid"]
        if beyond is not None:
            limit = status("VmSize", pid) + beyond
        if limit is not None:
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        self._tell("go")
        said = self._line(deadline)
        result: dict[str, Any] = said.get("result", {})
        if self._device == "cpu":
            code: int = said["exit"] if "exit" in said else self._line(deadline)["exit"]
            if not result:
                said_last = (self._said().splitlines() or [""])[-1]
                message = f"the process ended with {code}: {said_last}"
                result = {"outcome": "died", "message": message}
        if result["outcome"] == "failed":
            raise WorkerError(f"{job} failed:\n{result['message']}")
        return result if limit is None else {**result, "limit": limit}

    def close(self) -> None:
        """Let the process end, or after a few seconds end it and the job that is still running."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((line + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"the process is gone:\n{self._said()}") from error

    def _line(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise WorkerError(f"no answer in time:\n{self._said()}")
            new = os.read(descriptor, 1 << 16)
            if not new:
                raise WorkerError(f"the process is gone:\n{self._said()}")
            self._buffer += new
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _said(self) -> str:
        """Return the end of its human-readable output."""
        self._log.seek(0)
        return self._log.read()[-2000:]
