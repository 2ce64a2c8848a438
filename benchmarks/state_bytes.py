"""State bytes per parameter for shapes that matter, computed without allocating anything.

    python -m benchmarks.state_bytes

Prints the table of ``docs/internals/algorithm.md``. "Official view" is CAME8bit with
``factored_view="last_two"``.
"""

from __future__ import annotations

import math

from came8bit.state.layout import plan, state_bytes

Shape = tuple[int, ...]

LAYERS: list[tuple[str, Shape]] = [
    ("Llama matrix", (4096, 4096)),
    ("Llama feed-forward", (11008, 4096)),
    ("GPT-2 embedding", (50257, 768)),
    ("LoRA down, rank 8", (8, 4096)),
    ("LoRA up, rank 8", (4096, 8)),
    ("LoRA up, rank 64", (4096, 64)),
    ("two columns", (4096, 2)),
    ("n x 1", (4096, 1)),
    ("1 x n", (1, 4096)),
    ("norm or bias", (4096,)),
    ("small matrix", (63, 65)),
    ("3x3 convolution", (320, 320, 3, 3)),
    ("1x1 convolution", (640, 320, 1, 1)),
    ("first convolution", (64, 3, 7, 7)),
    ("depthwise 7x7", (768, 1, 7, 7)),
    ("1-D convolution", (512, 512, 3)),
    ("stacked experts", (8, 14336, 4096)),
]


def llama_7b() -> list[Shape]:
    """Parameter shapes of a 7B Llama: 32 layers, width 4096, feed-forward 11008, 32,000 words."""
    layer: list[Shape] = (
        [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008), (4096,), (4096,)]
    )
    return [(32000, 4096), (32000, 4096), *layer * 32, (4096,)]


def gpt2_small() -> list[Shape]:
    """Parameter shapes of GPT-2 small, 148 tensors."""
    layer: list[Shape] = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    layer += [(2304,), (768,), (3072,), (768,), *[(768,)] * 4]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def lora_7b(rank: int) -> list[Shape]:
    """Parameter shapes of LoRA on all matrices of the layers of a 7B Llama, 448 tensors."""
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [shape for out, into in layer * 32 for shape in ((rank, into), (out, rank))]


def vit_tiny() -> list[Shape]:
    """Parameter shapes of ViT-Ti/16, 152 tensors."""
    layer: list[Shape] = [(192,), (192,), (576, 192), (576,), (192, 192), (192,)]
    layer += [(192,), (192,), (768, 192), (768,), (192, 768), (192,)]
    first: list[Shape] = [(1, 1, 192), (1, 197, 192), (192, 3, 16, 16), (192,)]
    return [*first, *layer * 12, (192,), (192,), (1000, 192), (1000,)]


def row(name: str, shapes: list[Shape], **options: bool) -> str:
    """One line of the table; ``options`` are those of the optimizer."""
    numel = sum(map(math.prod, shapes))
    shape, view = "", ""
    if len(shapes) == 1:
        layout = plan(shapes[0], **options)
        shape = " x ".join(map(str, shapes[0]))
        b, n, k = layout.view
        view = f"{b} of {n} x {k}" if layout.factored else "unfactored"
        view += f", {layout.momentum_bits}-bit"
    per = [
        state_bytes(shapes, optim_bits=bits, factored_view=option, **options) / numel
        for bits, option in [(bits, "smallest") for bits in (32, 8, 4, 2)] + [(8, "last_two")]
    ]
    return f"| {name} | {shape} | {view} | {' | '.join(f'{each:.3f}' for each in per)} |"


def table() -> list[str]:
    """All lines."""
    lines = [
        "| parameter | shape | view, momentum | CAME32bit | CAME8bit | CAME4bit | CAME2bit "
        "| official view |",
        "|---" * 8 + "|",
    ]
    lines += [row(name, [shape]) for name, shape in LAYERS]
    lines += [row("flat shard, `quantize_vectors`", [(1 << 24,)], quantize_vectors=True)]
    lines += [row("**GPT-2 small**", gpt2_small()), row("**Llama 7B**", llama_7b())]
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
