"""Memory that a step takes beyond what is there before it, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

_MEASURE = """
    import ctypes, json, re, sys
    import torch
    from came8bit import CAME8bit

    def status(name):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{name}:\\s+(\\d+) kB", file.read())[1]) * 1024

    torch.manual_seed(0)
    shapes, dtype, transposed, options = json.loads(sys.argv[1])
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
    # Memory that was freed but not given back would be used again without being seen.
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak back to what is in use now
    optimizer.step()
    print(json.dumps([status("VmHWM") - before, sum(p.nbytes for p in params)]))
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
    question = json.dumps([shapes, dtype, transposed, options])
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra, nbytes = json.loads(done.stdout)
    return extra, nbytes
