"""Small steps through every CUDA kernel, for compute-sanitizer: sizes with tails, odd strides.

    compute-sanitizer --tool memcheck python scripts/gpu_cases.py

Says nothing about results: ``tests/test_kernels_cuda.py`` compares those. ``--device cpu`` shows
that the cases themselves run.
"""

from __future__ import annotations

import argparse

import torch

import came8bit

SHAPES: list[tuple[int, ...]] = [
    (1, 1),
    (33, 7),
    (64, 256),
    (67, 259),
    (300, 1032),
    (130, 520),
    (2, 40, 300),
    (16, 16, 3, 3),
    (5000,),
    (3,),
    (),
]
OPTIONS: list[dict[str, object]] = [
    {},
    {"cautious": True, "rounding": "nearest"},
    {"optim_bits": 32, "nonfinite": "propagate", "bias_correction": True},
    {"factored_view": "last_two", "maximize": True, "weight_decay": 0.1},
]


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """A parameter with a gradient, in every second case not contiguous."""
    reverse = len(shape) > 1 and sum(shape) % 2 == 1
    sizes = shape[::-1] if reverse else shape
    values = [torch.randn(sizes).to(device, dtype) for _ in range(2)]
    if reverse:
        values = [x.permute(*range(x.dim() - 1, -1, -1)) for x in values]
    made = torch.nn.Parameter(values[0])
    made.grad = values[1]
    return made


def main() -> None:
    """Two steps for each dtype and set of options, then the codec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    steps = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in OPTIONS:
            params = [parameter(shape, dtype, device) for shape in SHAPES]
            bits = int(options.get("optim_bits", 8))  # type: ignore[call-overload]
            rest = {k: v for k, v in options.items() if k != "optim_bits"}
            optimizer = came8bit.CAME(params, optim_bits=bits, min_8bit_size=0, **rest)
            for _ in range(2):
                optimizer.step()
                steps += 1
    for sizes in ((3, 300), (2, 256), (1, 1)):
        codes, absmax = came8bit.quantize_blockwise(torch.randn(sizes).to(device))
        came8bit.dequantize_blockwise(codes, absmax)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{steps} steps of {len(SHAPES)} parameters on {device}")


if __name__ == "__main__":
    main()
