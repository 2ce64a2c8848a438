"""Groups and the step of the optimizer classes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import (
    assert_same,
    gradients,
    parameter,
    run,
    same_bits,
    snapshot,
    start,
    with_gradient,
)

from came8bit import CAME, CAME8bit, CAME32bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSE = [CAME, CAME8bit, CAME32bit]


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", DENSE)
def test_every_kind_of_parameter(cls, dtype):
    shapes = [(), (1,), (7,), (64, 96), (3, 5), (4096, 1), (16, 8, 3, 3), (4, 32, 40), (0, 3), (0,)]
    params = [start(shape, dtype) for shape in shapes]
    frozen, unused = parameter(5, dtype=dtype), parameter(6, dtype=dtype)
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in params]
    optimizer = cls([frozen, *params, unused], lr=1e-3, weight_decay=0.1)
    for seed in range(2):
        for p in params:
            p.grad = next(gradients(p.shape, steps=1, seed=seed)).to(dtype)
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, old)
        assert (p in optimizer.state) == (p.numel() > 0)
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert frozen not in optimizer.state
    assert unused not in optimizer.state
    assert all(isinstance(t, torch.Tensor) for s in optimizer.state.values() for t in s.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    "restride",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(0, 3).contiguous().transpose(0, 3), id="transposed"),
        pytest.param(
            lambda x: torch.stack([x, x], -1).reshape(*x.shape[:-1], -1)[..., ::2], id="every other"
        ),
        pytest.param(lambda x: torch.cat([x, x])[: x.shape[0]], id="slice"),
    ],
)
def test_strides_do_not_matter_and_stay(restride, bits, dtype):
    shape = (32, 16, 3, 3)
    plain = start(shape, dtype)
    view = restride(plain.detach().clone())
    base = view._base if view._base is not None else view
    view = view.detach().requires_grad_()
    strides, address = view.stride(), view.data_ptr()
    optimizers = CAME([plain], lr=1e-2, optim_bits=bits), CAME([view], lr=1e-2, optim_bits=bits)
    base_before = base.clone()
    for g in gradients(shape, steps=3):
        run(optimizers[0], plain, [g])
        view.grad = g.to(dtype)  # contiguous, other strides than the parameter
        optimizers[1].step()
    assert (view.stride(), view.data_ptr()) == (strides, address)
    assert torch.equal(plain, view)
    assert not torch.equal(base, base_before)
    for name, value in optimizers[0].state[plain].items():
        assert same_bits(value, optimizers[1].state[view][name]), name


def test_gradient_strides_do_not_matter():
    plain, other = start((8, 6, 4, 4)), start((8, 6, 4, 4))
    g = next(gradients((8, 6, 4, 4), steps=1))
    run(CAME8bit([plain]), plain, [g])
    run(CAME8bit([other]), other, [g.to(memory_format=torch.channels_last)])
    assert torch.equal(plain, other)
    expanded, full = start((8, 6)), start((8, 6))
    run(CAME8bit([expanded]), expanded, [torch.ones(1, 1).expand(8, 6)])
    run(CAME8bit([full]), full, [torch.ones(8, 6)])
    assert torch.equal(expanded, full)


@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_another_float_type(grad_dtype):
    param, wanted = start((16, 24), torch.bfloat16), start((16, 24), torch.bfloat16)
    g = next(gradients((16, 24), steps=1)).to(grad_dtype)
    param.grad_dtype = None
    param.grad = g
    assert param.grad.dtype == grad_dtype
    optimizer, other = CAME8bit([param], lr=1e-2), CAME8bit([wanted], lr=1e-2)
    optimizer.step()
    wanted.grad_dtype = None
    wanted.grad = g.float()
    other.step()
    assert torch.equal(param, wanted)


def test_bad_gradients_change_nothing():
    first, second = with_gradient(64, 64), with_gradient(8, 8)
    optimizer = CAME8bit([first, second])
    optimizer.step()
    before = snapshot(optimizer)

    def refused(error, message):
        with pytest.raises(error, match=message):
            optimizer.step()
        assert_same(before, snapshot(optimizer))
        second.grad = None

    second.grad = torch.zeros(8, 8).to_sparse()
    refused(TypeError, "parameter 1 .* layout torch.sparse_coo")
    second.grad_dtype = None
    second.grad = torch.zeros(8, 8, dtype=torch.complex64)
    refused(TypeError, "parameter 1 .* got a gradient of torch.complex64")
    second.grad = torch.zeros(8, 8, dtype=torch.int64)
    refused(TypeError, "parameter 1 .* got a gradient of torch.int64")
    second.grad = torch.zeros(8, 8)
    second.grad.data = torch.zeros(4, 8)
    refused(ValueError, "parameter 1 .* shape \\(4, 8\\) on cpu, expected")


def test_gradient_on_another_device_changes_nothing():
    class Elsewhere(torch.nn.Parameter):
        @property
        def device(self):
            return torch.device("meta")

    first, second = with_gradient(64, 64), Elsewhere(torch.ones(4))
    second.grad = torch.ones(4)
    optimizer = CAME8bit([first, second])
    with pytest.raises(ValueError, match=r"parameter 1 .* on meta: got a gradient .* on cpu"):
        optimizer.step()
    assert not optimizer.state


def test_meta_parameters_are_accepted_until_they_step():
    first = with_gradient(8, 8)
    meta = torch.nn.Parameter(torch.empty(3, 3, device="meta"))
    optimizer = CAME8bit([first, meta])
    before = first.detach().clone()
    meta.grad = torch.empty(3, 3, device="meta")
    with pytest.raises(NotImplementedError, match="parameter 1 is a Parameter on meta"):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state
    meta.grad = None
    optimizer.step()
    assert not torch.equal(first, before)


@pytest.mark.parametrize("bits", [32, 8, 4, 2, 0])
def test_a_parameter_that_changed_shape_or_type_is_refused(bits):
    param = with_gradient(64, 128)
    optimizer = CAME([param], optim_bits=bits)
    optimizer.step()
    param.grad = None
    param.data = torch.ones(128, 64)
    param.grad = torch.ones(128, 64)
    with pytest.raises(ValueError, match=r"has shape \(128, 64\).* made for shape \(64, 128\)"):
        optimizer.step()
    param.grad = None
    param.data = torch.ones(64, 128, dtype=torch.float64)
    param.grad = torch.ones(64, 128, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"parameter 0 is torch.float64"):
        optimizer.step()


def test_casting_the_model_after_a_step_keeps_the_state():
    model = torch.nn.Linear(64, 64)
    optimizer = CAME8bit(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    dtypes = [t.dtype for s in optimizer.state.values() for t in s.values()]
    model.bfloat16()
    optimizer.zero_grad()
    model(torch.randn(2, 64).bfloat16()).sum().backward()
    optimizer.step()
    assert dtypes == [t.dtype for s in optimizer.state.values() for t in s.values()]
    assert all(int(s["step"]) == 2 for s in optimizer.state.values())


def test_closure_runs_with_gradients():
    """In another optimizer, a closure called under ``no_grad`` raises in backward()."""
    param = parameter(4, 4)
    optimizer = CAME8bit([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 16.0
    assert not torch.equal(param, torch.ones(4, 4))
    assert param.requires_grad
    assert param.grad_fn is None
    assert CAME8bit([parameter(2)]).step() is None


def test_tied_parameters():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    optimizer = CAME8bit(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 3
    model["b"](model["a"](torch.randn(2, 8))).sum().backward()
    optimizer.step()
    assert model["b"].weight is model["a"].weight
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr(shape, dtype):
    """The rule for a tensor: rounded to fp32, read at the step."""
    value = torch.tensor(2.0**-10).item()
    tensor, number = start((16, 24)), start((16, 24))
    lr = torch.full(shape, value, dtype=dtype)
    optimizer = CAME8bit([tensor], lr=lr)
    other = CAME8bit([number], lr=value)
    grads = list(gradients((16, 24), steps=3))
    run(optimizer, tensor, grads[:2])
    run(other, number, grads[:2])
    assert torch.equal(tensor, number)
    lr.fill_(0.5)
    other.param_groups[0]["lr"] = 0.5
    run(optimizer, tensor, grads[2:])
    run(other, number, grads[2:])
    assert torch.equal(tensor, number)


def test_schedulers_reach_the_step():
    param, same = start((16, 24)), start((16, 24))
    optimizer = CAME8bit([param], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=5)
    other = CAME8bit([same], lr=1e-3)
    for g in gradients((16, 24), steps=4):
        group = optimizer.param_groups[0]
        other.param_groups[0].update(lr=group["lr"], betas=tuple(group["betas"]))
        run(optimizer, param, [g])
        run(other, same, [g])
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    assert torch.equal(param, same)


def test_every_option_is_per_group():
    """Two groups in one optimizer do what two optimizers do."""
    variants = [
        {"lr": 1e-2},
        {"betas": (0.8, 0.99, 0.999)},
        {"eps": (1e-6, 1e-3)},
        {"clip_threshold": 0.3},
        {"weight_decay": 0.5},
        {"min_8bit_size": 10**6},
        {"rounding": "nearest"},
        {"cautious": True},
        {"maximize": True},
        {"bias_correction": True},
        {"factored_view": "last_two"},
        {"optim_bits": 32},
        {"seed": 5},
    ]
    shape, dtype = (64, 8, 3, 3), torch.bfloat16
    grads = list(gradients(shape, steps=3))
    plain = start(shape, dtype)
    run(CAME8bit([plain], lr=1e-3), plain, grads)
    for variant in variants:
        first, second, alone = (start(shape, dtype) for _ in range(3))
        optimizer = CAME8bit([{"params": [first]}, {"params": [second], **variant}], lr=1e-3)
        padding = parameter(1)  # the position decides the rounding
        single = CAME([padding, alone], **{"lr": 1e-3, "optim_bits": 8, **variant})
        for g in grads:
            first.grad = second.grad = alone.grad = g.to(dtype)
            optimizer.step()
            single.step()
        assert torch.equal(first, plain), variant
        assert torch.equal(second, alone), variant
        assert not torch.equal(second, first), variant


def test_parameters_do_not_influence_each_other():
    """One call for many parameters gives what a call for each gives."""
    shapes = [(64, 80), (5, 7), (9,), (64, 64), (4096, 1), (16, 4, 3, 3)]
    together = [start(shape, torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    optimizer = CAME8bit(together, lr=1e-2)
    for seed in range(3):
        for p in together:
            p.grad = next(gradients(p.shape, steps=1, seed=seed)).bfloat16()
        optimizer.step()
    for i, shape in enumerate(shapes):
        alone = start(shape, torch.bfloat16, seed=i)
        single = CAME8bit([*(parameter(1) for _ in range(i)), alone], lr=1e-2)
        for seed in range(3):
            run(single, alone, gradients(shape, steps=1, seed=seed))
        assert torch.equal(alone, together[i])


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 20), max_size=4).map(tuple),
    bits=st.sampled_from([8, 32]),
    view=st.sampled_from(["smallest", "last_two"]),
    dtype=st.sampled_from(DTYPES),
    cautious=st.booleans(),
    correction=st.booleans(),
)
def test_zero_gradients_move_nothing(shape, bits, view, dtype, cautious, correction):
    param = start(shape, dtype)
    before = param.detach().clone()
    optimizer = CAME(
        [param],
        optim_bits=bits,
        min_8bit_size=0,
        factored_view=view,
        cautious=cautious,
        bias_correction=correction,
    )
    run(optimizer, param, [torch.zeros(shape)] * 3)
    assert torch.equal(param, before)


def test_lr_zero_moves_nothing_but_the_state():
    param = start((64, 64), torch.bfloat16)
    before = param.detach().clone()
    state = run(CAME8bit([param], lr=0.0, weight_decay=0.1), param, gradients((64, 64), steps=2))
    assert torch.equal(param, before)
    assert state["exp_avg"].any()


def test_clip_threshold_may_be_infinite():
    unclipped, high = start((16, 24)), start((16, 24))
    grads = list(gradients((16, 24), steps=2))
    run(CAME8bit([unclipped], clip_threshold=math.inf), unclipped, grads)
    run(CAME8bit([high], clip_threshold=1e30), high, grads)
    assert torch.equal(unclipped, high)
