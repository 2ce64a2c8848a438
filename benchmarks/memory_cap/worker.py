"""The process in which jobs run; ``launch.py`` starts it and talks to it in lines of JSON.

    python -m benchmarks.memory_cap.worker --device cpu --corpus stdlib --data-dir data

For each line that it reads, a job, it answers with the number of the process that will run it,
waits for another line, so that another process can limit that one, and runs the job. On a CPU
that process is a fork, which has imported everything; a limit then concerns the training alone. A
GPU does not survive a fork: there, this process runs the job, and should get one only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_cap import job, model
from came8bit.tradeoff.data import Text


def answer(channel: int, what: dict[str, Any]) -> None:
    """Write a line."""
    os.write(channel, (json.dumps(what) + "\n").encode())


def work(line: str, text: Text, channel: int) -> None:
    """Run one job in this process."""
    answer(channel, {"pid": os.getpid()})
    sys.stdin.readline()
    try:
        result = job.run(job.Job.from_dict(json.loads(line)), text)
    except BaseException:
        result = {"outcome": "failed", "message": traceback.format_exc()[-4000:]}
    answer(channel, {"result": result})


def main() -> None:
    """Serve until there is no more input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    # What libraries print must not come between the lines.
    channel = os.dup(1)
    os.dup2(2, 1)
    text = model.text(options.corpus, options.data_dir)
    forks = options.device == "cpu"
    if forks:
        torch.set_num_threads(1)
        job.warm_up(text)
    answer(channel, {"text": text.about})
    while line := sys.stdin.readline():
        if not forks:
            work(line, text, channel)
            continue
        pid = os.fork()
        if pid == 0:
            work(line, text, channel)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        answer(channel, {"exit": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
