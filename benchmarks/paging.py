"""What paging costs on a CPU: processor time of a step, paged against dense, on one thread.

    python -m benchmarks.paging

Process time, not wall time: what is measured are page faults and mappings, not a disk. The table
of ``docs/paging.md``; rows are appended to ``results/paging.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cpu_step import about
from benchmarks.harness import append, quantiles
from came8bit import CAME8bit, PagedCAME8bit

RESULTS = Path(__file__).parent / "results" / "paging.csv"
MATRICES, SIDE = 48, 1024


def step_times(optimizer: CAME8bit, repeats: int) -> list[float]:
    """Seconds of processor time of each step after the first two."""
    times = []
    for _ in range(repeats + 2):
        begin = time.process_time()
        optimizer.step()
        times.append(time.process_time() - begin)
    return times[2:]


def main() -> None:
    """Measure dense, paged with room for all, and paged within the default budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folders", type=Path, nargs="*", default=[Path("/dev/shm")])
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = [torch.nn.Parameter(torch.randn(SIDE, SIDE) * 0.02) for _ in range(MATRICES)]
    for param in params:
        param.grad = torch.randn(SIDE, SIDE)
    everything = MATRICES * SIDE * SIDE * 2
    ways = {
        "dense": lambda: CAME8bit(params),
        "paged, all fits": lambda: PagedCAME8bit(params, page_budget=everything),
        "paged": lambda: PagedCAME8bit(params),
    }
    rows = []
    with contextlib.ExitStack() as folders:
        for folder in filter(Path.is_dir, options.folders):
            own = folders.enter_context(tempfile.TemporaryDirectory(dir=folder))
            ways[f"paged, {folder}"] = lambda own=own: PagedCAME8bit(params, page_dir=own)
        for name, make in ways.items():
            optimizer = make()
            found = {
                f"{q}_ms": f"{1e3 * t:.1f}"
                for q, t in quantiles(step_times(optimizer, options.repeats)).items()
            }
            del optimizer
            rows.append({**about(), "way": name, "matrices": MATRICES, "side": SIDE, **found})
            print(f"{name:24s} {' / '.join(found.values())} ms", flush=True)
    append(rows, options.csv)


if __name__ == "__main__":
    main()
