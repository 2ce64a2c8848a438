"""What the GPU benchmark steps: parameter lists, and the bytes a step has to move for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.state_bytes import Shape, gpt2_small

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def gpt2_layers() -> list[Shape]:
    """GPT-2 small without its embeddings: every matrix fits the cache of a large GPU."""
    return [shape for shape in gpt2_small() if shape not in ((50257, 768), (1024, 768))]


def llama_1b() -> list[Shape]:
    """Shapes of a 1B Llama: 16 layers, width 2048, feed-forward 8192, 128,256 words, tied."""
    layer: list[Shape] = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    layer += [(8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), *layer * 16, (2048,)]


def llama_7b_layers() -> list[Shape]:
    """Six of the 32 layers of a 7B Llama: width 4096, feed-forward 11008."""
    layer: list[Shape] = [(4096, 4096)] * 4 + [(11008, 4096)] * 2
    layer += [(4096, 11008), (4096,), (4096,)]
    return layer * 6


def lora_7b() -> list[Shape]:
    """Rank 16 on every matrix of a 7B Llama: 448 small matrices."""
    layer: list[Shape] = [(16, 4096), (4096, 16)] * 4
    layer += [(16, 4096), (11008, 16)] * 2 + [(16, 11008), (4096, 16)]
    return layer * 32


#: In the order of their importance, should time run out.
CASES: dict[str, list[Shape]] = {
    "gpt2-layers": gpt2_layers(),
    "llama-7b-layers": llama_7b_layers(),
    "8192x8192": [(8192, 8192)],
    "gpt2": gpt2_small(),
    "llama-1b": llama_1b(),
    "lora-7b": lora_7b(),
    "128256x4096": [(128256, 4096)],
    "16384x8192": [(16384, 8192)],
}

#: Stepped by CAME8bit alone and in bf16 alone: for the memory of a step, which the largest tensor
#: decides.
ALONE = ("128256x4096",)

#: For machines without a GPU: that everything runs, not how fast.
TINY: dict[str, list[Shape]] = {
    "tiny": [(96, 128), (64, 64), (128,), (17, 5)],
    "tiny-matrix": [(256, 256)],
}


@dataclass(frozen=True)
class Sweep:
    """One of the three sweeps: how its kernels are called, and bytes per element of a matrix."""

    name: str
    kernels: str
    """A regular expression."""
    gradient: int
    momentum: int
    param: int
    """How often each is read or written."""

    def bytes_per_element(self, dtype: str) -> int:
        """Bytes read and written; ``dtype`` of parameters and gradients."""
        return (self.gradient + self.param) * ITEM[dtype] + self.momentum


# The scales of the momentum (1/64 byte per element) and rows and columns are left out.
SWEEPS = (
    Sweep("A: second moment", r"second_moment_kernel", gradient=1, momentum=0, param=0),
    Sweep("B: instability", r"instability_kernel", gradient=1, momentum=1, param=0),
    Sweep("C: apply", r"(?<!flat_)apply_kernel", gradient=1, momentum=2, param=2),
)


def streamed_bytes(shapes: list[Shape], dtype: str) -> int:
    """Bytes of a step when every sweep reads from memory: 13 per element in bf16, 23 in fp32.

    Vectors have fp32 momentum and second moment, and two sweeps.
    """
    matrix = sum(sweep.bytes_per_element(dtype) for sweep in SWEEPS)
    vector = 4 * ITEM[dtype] + 20
    return sum(math.prod(s) * (matrix if len(s) > 1 else vector) for s in shapes)


def cached_bytes(shapes: list[Shape], dtype: str) -> int:
    """Return the same when gradient and codes are read once: 8 per element in bf16, 14 in fp32."""
    matrix = 3 * ITEM[dtype] + 2
    return sum(math.prod(s) * (matrix if len(s) > 1 else matrix + 14) for s in shapes)


def adamw8bit_bytes(shapes: list[Shape], dtype: str) -> int:
    """Bytes of a step of an 8-bit AdamW: 10 per element in bf16, 16 in fp32."""
    return sum(map(math.prod, shapes)) * (3 * ITEM[dtype] + 4)


def largest_swept(shapes: list[Shape], dtype: str) -> int:
    """Bytes of gradient and codes of the largest matrix, which a cache has to hold."""
    return max((math.prod(s) for s in shapes if len(s) > 1), default=0) * (ITEM[dtype] + 1)
