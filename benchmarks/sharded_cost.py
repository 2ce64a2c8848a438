"""What a step of sharded parameters sends, next to what FSDP2 sends in any case.

A model on paper: bytes are exact, times are those of a ring for bandwidth and of a tree for latency
with the figures below. ``python -m benchmarks.sharded_cost`` prints the table of
``docs/several_gpus.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log2, prod

from came8bit.reference import sums_sizes
from came8bit.reference.quant import slice_shape
from came8bit.state.layout import plan

BANDWIDTH = 50e9
"""Bytes per second and rank: a network of 400 Gbit/s."""

HOP = 5e-6
"""Seconds from one rank to the next."""

Shapes = list[tuple[int, ...]]


def llama(width: int, hidden: int, values: int, layers: int, vocabulary: int = 32000) -> Shapes:
    """Return the shapes of a Llama; ``values`` is the width of keys and values."""
    attention = [(width, width), (values, width), (values, width), (width, width)]
    block = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(vocabulary, width), *block * layers, (width,), (vocabulary, width)]


MODELS = {
    "Llama 7B": llama(4096, 11008, 4096, 32),
    "Llama 70B": llama(8192, 28672, 1024, 80),
}


def collective_bytes(shapes: Iterable[tuple[int, ...]], *, cautious: bool = False) -> list[int]:
    """Return the bytes of the three collectives of a step, as ``came8bit.ops.sharded`` makes them.

    Eight for each sum, and in the first one for each parameter, whether it has a gradient.
    """
    totals = [0, 0, 0]
    for shape in shapes:
        layout = plan(shape)
        columns = layout.view[2] if layout.view == (1, *slice_shape(shape)) else 0
        sizes = sums_sizes(columns if layout.factored else -1, cautious)
        totals = [total + 8 * size for total, size in zip(totals, sizes, strict=True)]
        totals[0] += 8
    return totals


def all_reduce_seconds(nbytes: int, ranks: int) -> float:
    """Return the time of an all-reduce."""
    return 2 * nbytes * (ranks - 1) / ranks / BANDWIDTH + 2 * log2(ranks) * HOP


def fsdp_bytes(shapes: Iterable[tuple[int, ...]], ranks: int) -> float:
    """Return what a rank sends for two gathers in bf16 and one reduction of gradients in bf16."""
    return 3 * 2 * sum(map(prod, shapes)) * (ranks - 1) / ranks


def main() -> None:
    """Print the table."""
    print("| model | ranks | FSDP2 sends | came8bit sends | part | FSDP2 takes | came8bit takes |")
    print("|---|---|---|---|---|---|---|")
    for name, shapes in MODELS.items():
        for ranks in (8, 64, 256, 1024):
            sizes = collective_bytes(shapes)
            own = 2 * sum(sizes) * (ranks - 1) / ranks
            theirs = fsdp_bytes(shapes, ranks)
            seconds = sum(all_reduce_seconds(size, ranks) for size in sizes)
            print(
                f"| {name} | {ranks} | {theirs / 1e9:.1f} GB | {own / 1e6:.0f} MB | "
                f"{own / theirs:.2%} | {theirs / BANDWIDTH * 1e3:.0f} ms | {seconds * 1e3:.1f} ms |"
            )


if __name__ == "__main__":
    main()
