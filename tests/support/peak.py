"""Memory that a step takes beyond what is there before it, measured in a process of its own."""

from __future__ import annotations

from benchmarks.process_memory import in_a_process

_MEASURE = """
    import torch
    from came8bit import CAME8bit

    torch.manual_seed(0)
    shapes, dtype, transposed, options = question
    params = []
    for shape in shapes:
        param = torch.randn(shape).to(getattr(torch, dtype))
        grad = torch.randn(shape).to(getattr(torch, dtype))
        if transposed:
            param, grad = param.t(), grad.t()
        params.append(torch.nn.Parameter(param))
        params[-1].grad = grad
    optimizer = CAME8bit(params, **options)
    optimizer.step()
    answer = peak_of(optimizer.step), sum(p.nbytes for p in params)
"""


def step_peak(
    shapes: list[list[int]], dtype: str, *, transposed: bool = False, **options: object
) -> tuple[int, int]:
    """Peak bytes of the second step of CAME8bit above the level before it; bytes of all parameters.

    Args:
        shapes: of the parameters, as they are stored.
        dtype: name of the dtype of parameters and gradients.
        transposed: step their transposes, which are not contiguous.
        options: of the optimizer.
    """
    extra, nbytes = in_a_process(_MEASURE, [shapes, dtype, transposed, options])
    return extra, nbytes
