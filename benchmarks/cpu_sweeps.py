"""Time of the sweeps of a CPU step apart from each other, on one matrix.

    python -m benchmarks.cpu_sweeps                # one thread, 8 bits
    python -m benchmarks.cpu_sweeps --threads 2 --bits 8,4

A step of a sharded parameter calls an operator for each pass, and here one rank has all rows: sweep
A is the pass ``second_moment``, B ``instability`` and C ``apply``, each with the little that stands
before and behind it. Times are those of the fastest repetition.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import came8bit
from benchmarks.harness import some_of
from came8bit.ops import schema
from came8bit.reference import PASSES

SHAPES = {"1024": (1024, 1024), "25152": (25152, 1024), "rows of 8": (65536, 8)}
DTYPES = {
    "float32": (torch.float32, "nearest"),
    "bfloat16": (torch.bfloat16, "stochastic"),
    "bfloat16 nearest": (torch.bfloat16, "nearest"),
}
BITS = ("32", "8", "4", "2")
SWEEPS = {"A": "second_moment", "B": "instability", "C": "apply"}
SECONDS = 2.0


def fastest(shape: tuple[int, int], dtype: str, bits: int) -> dict[str, float]:
    """Return the shortest time in seconds of each pass over a matrix, and of a plain sum of it."""
    times: defaultdict[str, float] = defaultdict(lambda: float("inf"))

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = run(*args, **kwargs)
            times[name] = min(times[name], time.perf_counter() - begin)
            return result

        return call

    torch_dtype, rounding = DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (1,))
    values = [torch.randn(shape, generator=generator).to(torch_dtype) for _ in range(2)]
    param, grad = (distribute_tensor(value, mesh, [Shard(0)]) for value in values)
    param = torch.nn.Parameter(param)
    param.grad = grad
    optimizer = came8bit.CAME(
        [param], optim_bits=bits, rounding=rounding, bias_correction=True, nesterov=True
    )
    plain = timed("sum", values[1].sum)
    before = dict(schema.PASSES)
    for operator, passes in before.items():
        schema.PASSES[operator] = tuple(map(timed, PASSES, passes))
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            optimizer.step()
            plain()
    finally:
        schema.PASSES.update(before)
    return times


def main() -> None:
    """Print one row per matrix, dtype and width of momentum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", type=some_of(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=list(DTYPES))
    parser.add_argument("--bits", type=some_of(BITS), default=["8"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    print(f"{came8bit.kernel_status().cpu.isa}, {options.threads} threads, ns per element")
    print("| matrix | dtype | bits | A | B | C | sum | plain sum |")
    print("|---" * 8 + "|")
    for name in options.shapes:
        for dtype in options.dtypes:
            for bits in options.bits:
                times = fastest(SHAPES[name], dtype, int(bits))
                rows, columns = SHAPES[name]
                ns = {key: 1e9 * value / (rows * columns) for key, value in times.items()}
                sweeps = [ns[of] for of in SWEEPS.values()]
                cells = [f"{value:.2f}" for value in (*sweeps, sum(sweeps), ns["sum"])]
                print(f"| {rows} x {columns} | {dtype} | {bits} | {' | '.join(cells)} |")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
