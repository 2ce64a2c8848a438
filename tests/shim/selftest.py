"""Runs the toy kernels of ``selftest.cu``: ``python selftest.py LIBRARY KERNEL...``.

In a process of its own, for a sanitizer that ends it; what is written to stderr is divided by
``== KERNEL ==``. The status is 1 if a result was wrong.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(sys.path[0]) / "support"))

from shim.control import Control

THREADS = 128


class SelfTest:
    """The toy kernels of one build."""

    def __init__(self, path: Path | str) -> None:
        library = ctypes.CDLL(str(path))
        self.control = Control(library)
        self._run = library.came8bit_selftest
        self._run.argtypes = [
            ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip

    def run(
        self, kernel: str, x: Tensor, out: Tensor, *, n: int = 0, blocks: int = 1,
        threads: int = THREADS,
    ) -> Tensor:  # fmt: skip
        """Launch ``kernel`` and return ``out``; an error of the shim is a RuntimeError."""
        counters = torch.zeros(4, dtype=torch.int32)
        message = ctypes.create_string_buffer(4096)
        pointers = (x.data_ptr(), out.data_ptr(), counters.data_ptr())
        if self._run(kernel.encode(), blocks, threads, *pointers, n, message, len(message)):
            raise RuntimeError(message.value.decode())
        return out

    def check(self, kernel: str) -> bool:
        """Run a kernel on data that suit it and say whether the result is right."""
        name = kernel.split(" without ")[0]
        generator = torch.Generator().manual_seed(0)
        if name == "sum":
            blocks = 4
            x = torch.randint(-99, 99, (blocks * THREADS - 5,), generator=generator).float()
            out = self.run(kernel, x, torch.zeros(blocks + 1), n=len(x), blocks=blocks)
            return float(out[-1]) == float(x.sum()) and float(out[:-1].sum()) == float(x.sum())
        if name == "transpose":
            x = torch.randn(64, 64, generator=generator)
            return torch.equal(self.run(kernel, x, torch.zeros(64, 64), n=64, blocks=4), x.T)
        x = torch.randn(THREADS, generator=generator)
        if name == "rotate":
            expected = torch.zeros(THREADS)
            for i in range(5):
                expected = expected + (x.roll(-1) + i)
            return torch.equal(self.run(kernel, x, torch.zeros(THREADS), n=5), expected)
        if name.startswith("exchange"):
            expected = x.view(-1, 2).flip(1).flatten()
            return torch.equal(self.run(kernel, x, torch.zeros(THREADS)), expected)
        if name == "through global":
            out = self.run(kernel, x, torch.full((2 * THREADS,), torch.nan))
            return torch.equal(out, torch.cat([x, x.roll(-40)]))
        self.run(kernel, x, torch.zeros(THREADS), n=THREADS - 1, blocks=2)
        return True


if __name__ == "__main__":
    test = SelfTest(sys.argv[1])
    test.control.configure(workers=4)
    wrong = []
    for name in sys.argv[2:]:
        print(f"== {name} ==", file=sys.stderr, flush=True)
        if not test.check(name):
            wrong.append(name)
    sys.exit(1 if wrong else 0)
