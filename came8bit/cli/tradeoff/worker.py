"""Runs one training run in a process of its own, so that its peak memory is its own.

The processes are forked from a small server that has imported torch and transformers but never used
them (multiprocessing's ``forkserver``), so a run starts in a fraction of a second. Where that is
not to be had, each process starts from nothing (``spawn``).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

from came8bit.cli.tradeoff.config import RunSpec
from came8bit.cli.tradeoff.data import Data
from came8bit.cli.tradeoff.measure import give_back_freed_memory
from came8bit.cli.tradeoff.train import Progress, RunResult, failed_run, train

_PRELOAD = [
    "came8bit.cli.tradeoff.train",
    "accelerate",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
]


def run_here(spec: RunSpec, data: Data, progress: Progress) -> RunResult:
    """Run in this process. An exception becomes a failed result; KeyboardInterrupt does not."""
    try:
        return train(spec, data, progress)
    except Exception as error:  # whatever an optimizer raises is that optimizer's result
        return failed_run(spec, _describe(error))


def run_isolated(spec: RunSpec, data: Data, progress: Progress) -> RunResult:
    """Run in a new process. If that dies, or this one is interrupted, no process is left behind."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, spec), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.send(data)
        while True:
            kind, content = ours.recv()
            if kind == "done":
                result: RunResult = content
                return result
            progress(*content)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        process.join(10)
        return failed_run(spec, f"its process ended without a result ({_exit(process.exitcode)})")
    finally:
        ours.close()
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def distributed() -> bool:
    """Return whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _child(connection: Connection, spec: RunSpec) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    data = connection.recv()
    if spec.purpose == "memory":
        give_back_freed_memory()
        # Once for nothing: pages of code that are read in at first use are no memory of training.
        run_here(spec, data, lambda step, loss: None)
        gc.collect()

    def report(step: int, loss: float) -> None:
        connection.send(("progress", (step, loss)))

    result = run_here(spec, data, report)
    # If the parent has gone, there is nobody to tell.
    with contextlib.suppress(BrokenPipeError):
        connection.send(("done", result))


def _describe(error: BaseException) -> str:
    """Return the error's type, message and the last place in the code it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    where = (
        f" (in {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    )
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _exit(code: int | None) -> Any:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}; too little memory?"
    return f"exit code {code}"
