"""Small parameters, gradients and training runs that the optimizer tests share."""

from concurrent.futures import ThreadPoolExecutor

import torch


def gradients(shape, *, noise=None, spikes=False, scale=1.0, steps=100, seed=0):
    """Independent gradients, or a fixed one with relative ``noise``; ``spikes`` of x1000."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randn(shape, generator=generator)
    for t in range(steps):
        g = torch.randn(shape, generator=generator)
        if noise is not None:
            g = fixed + noise * g
        yield g * (scale * (1000.0 if spikes and t % 17 == 5 else 1.0))


def start(shape, dtype=torch.float32, seed=99):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype).requires_grad_()


def run(optimizer, param, grads):
    for g in grads:
        param.grad = g.to(param.dtype)
        optimizer.step()
    return optimizer.state[param]


def same_bits(x, y):
    """Equal dtypes, shapes and bits; NaN equals itself."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x, y = (t.detach().contiguous().view(integer) for t in (x, y))
    return torch.equal(x, y)


def snapshot(optimizer):
    """Copies of every parameter and state tensor, in order, with the options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    state = {
        (i, name): tensor.clone()
        for i, p in enumerate(params)
        for name, tensor in optimizer.state.get(p, {}).items()
    }
    return [p.detach().clone() for p in params], state, options


def assert_same(before, after):
    """Two snapshots are equal to the last bit."""
    assert len(before[0]) == len(after[0])
    assert all(same_bits(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert before[1].keys() == after[1].keys()
    for key, value in before[1].items():
        assert same_bits(value, after[1][key]), key
    assert before[2] == after[2]


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


def with_gradient(*shape, dtype=torch.float32, seed=0):
    param = start(shape, dtype)
    param.grad = next(gradients(shape, steps=1, seed=seed)).to(dtype)
    return param


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def in_threads(*works):
    """Calls all of ``works`` at once; the first that fails fails the test."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()
