"""Construction, groups and the step of the optimizer classes."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import assert_same, gradients, run, same_bits, snapshot, start

import came8bit
from came8bit import CAME, CAME8bit, CAME32bit, PagedCAME, PagedCAME8bit, PagedCAME32bit
from came8bit.validation import check_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSE = [CAME, CAME8bit, CAME32bit]


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


def with_gradient(*shape, dtype=torch.float32, seed=0):
    param = start(shape, dtype)
    param.grad = next(gradients(shape, steps=1, seed=seed)).to(dtype)
    return param


# --- construction ---------------------------------------------------------------------------------


def test_signature():
    names = list(inspect.signature(CAME8bit).parameters)
    expected = ["params", "lr", "betas", "eps", "clip_threshold", "weight_decay"]
    assert names[:6] == expected
    assert names == list(inspect.signature(CAME32bit).parameters)
    parameters = inspect.signature(CAME).parameters
    assert set(parameters) == {*names, "optim_bits"}
    for paged in (PagedCAME, PagedCAME8bit, PagedCAME32bit):
        assert names == list(inspect.signature(paged).parameters)
    for name in set(parameters) - {*expected, "other"}:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = {name: parameters[name].default for name in expected[1:]}
    assert defaults == {
        "lr": 2e-4,
        "betas": (0.9, 0.999, 0.9999),
        "eps": (1e-30, 1e-16),
        "clip_threshold": 1.0,
        "weight_decay": 0.0,
    }


@pytest.mark.parametrize(
    ("cls", "options", "bits"),
    [
        (CAME, {}, 32),
        (CAME, {"optim_bits": 8}, 8),
        (CAME8bit, {}, 8),
        (CAME32bit, {}, 32),
        (PagedCAME, {}, 32),
        (PagedCAME8bit, {}, 8),
        (PagedCAME32bit, {}, 32),
    ],
)
def test_bits_of_the_classes(cls, options, bits):
    param = with_gradient(64, 64)
    optimizer = cls([param], **options)
    assert not optimizer.state  # nothing is made before the first step
    optimizer.step()
    dtype = torch.int8 if bits == 8 else torch.float32
    assert optimizer.state[param]["exp_avg"].dtype == dtype


@pytest.mark.parametrize("cls", [PagedCAME, PagedCAME8bit, PagedCAME32bit])
def test_paged_classes_cannot_be_dense(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: got is_paged=False, expected True; use"):
        cls([parameter(2)], is_paged=False)


BAD_OPTIONS = [
    ({"lr": -1.0}, "got lr -1.0, expected a finite number >= 0"),
    ({"lr": math.nan}, "got lr nan"),
    ({"lr": math.inf}, "got lr inf"),
    ({"lr": 1e39}, "got lr 1e\\+39"),
    ({"lr": "fast"}, "got lr 'fast', expected a number or a tensor"),
    ({"lr": None}, "got lr None"),
    ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(1j)}, "Tensor lr must be 1-element and real"),
    ({"lr": torch.tensor(-1.0)}, "expected a finite number >= 0"),
    ({"lr": torch.tensor(math.nan)}, "expected a finite number >= 0"),
    ({"betas": (0.9,)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, 0.999, 1.0)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, math.nan, 0.9999)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (-0.1, 0.999, 0.9999)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, 0.999, 1 - 1e-9)}, "that stay below 1 in float32"),
    ({"betas": 0.9}, "expected three numbers in \\[0, 1\\)"),
    ({"eps": (1e-30, 0.0)}, "expected two finite positive numbers"),
    ({"eps": (1e-50, 1e-16)}, "not 0 in float32"),
    ({"eps": (1e-30, math.nan)}, "expected two finite positive numbers"),
    ({"eps": (math.inf, 1e-16)}, "expected two finite positive numbers"),
    ({"eps": 1e-8}, "expected two finite positive numbers"),
    ({"clip_threshold": 0.0}, "got clip_threshold 0.0, expected a positive number"),
    ({"clip_threshold": math.nan}, "got clip_threshold nan"),
    ({"clip_threshold": None}, "got clip_threshold None"),
    ({"weight_decay": -1e-2}, "got weight_decay -0.01, expected a finite number >= 0"),
    ({"weight_decay": math.nan}, "got weight_decay nan"),
    ({"rounding": "up"}, "got rounding 'up', expected one of \\('stochastic', 'nearest'\\)"),
    ({"nonfinite": "ignore"}, "got nonfinite 'ignore', expected one of"),
    ({"factored_view": "first"}, "got factored_view 'first', expected one of"),
    ({"cautious": 1}, "got cautious 1, expected True or False"),
    ({"maximize": None}, "got maximize None, expected True or False"),
    ({"bias_correction": "yes"}, "got bias_correction 'yes', expected True or False"),
    ({"min_8bit_size": -1}, "got min_8bit_size -1, expected an integer >= 0"),
    ({"min_8bit_size": 1.5}, "got min_8bit_size 1.5, expected an integer >= 0"),
    ({"seed": -1}, "got seed -1, expected an integer in \\[0, 2\\*\\*63\\)"),
    ({"seed": 2**63}, "got seed 9223372036854775808, expected"),
    ({"optim_bits": 5}, "got optim_bits 5, expected one of \\(32, 8, 4, 2\\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options(options, message):
    """Refused at construction, in a group, in a late change; nothing moves."""
    with pytest.raises(ValueError, match=message):
        CAME([parameter(3)], **options)
    param = with_gradient(64, 64)
    optimizer = CAME8bit([param])
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(3)], **options})
    assert_same(before, snapshot(optimizer))
    group = optimizer.param_groups[0]
    (name,) = options
    good, group[name] = group[name], options[name]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    group[name] = good
    assert_same(before, snapshot(optimizer))


BAD_PARAMETERS = [
    (lambda: parameter(3, dtype=torch.complex64), TypeError, "is torch.complex64"),
    (lambda: parameter(3, dtype=torch.float64), TypeError, "is torch.float64"),
    (lambda: torch.zeros(3, 3).to_sparse().requires_grad_(), TypeError, "layout torch.sparse_coo"),
    (
        lambda: torch.nn.Parameter(torch.zeros(1, 4).expand(3, 4)),
        ValueError,
        "elements share memory",
    ),
    (lambda: "weight", TypeError, "optimizer can only optimize Tensors"),
    (lambda: torch.zeros(3, requires_grad=True) * 2, ValueError, "non-leaf"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMETERS)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        CAME8bit([make()])
    optimizer = CAME8bit([parameter(3)])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(3), make()]})
    assert_same(before, snapshot(optimizer))


def test_duplicate_parameters():
    param = parameter(3)
    with pytest.raises(ValueError, match="duplicate parameters: parameter 1 of the group"):
        CAME8bit([param, param])
    with pytest.raises(ValueError, match="duplicate parameters"):
        CAME8bit([("a", param), ("b", param)])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        CAME8bit([{"params": [param]}, {"params": [parameter(3), param]}])


def test_other_wrong_arguments_of_params():
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        CAME8bit(parameter(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        CAME8bit([])
    with pytest.raises(TypeError, match="ordered collections"):
        CAME8bit([{"params": {parameter(3)}}])
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_deacy'"):
        CAME8bit([parameter(3)], weight_deacy=0.1)


def test_groups_take_generators_single_tensors_and_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = CAME8bit(model[0].parameters())
    optimizer.add_param_group({"params": (p for p in model[1].parameters()), "lr": 1.0})
    optimizer.add_param_group({"params": parameter(2)})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1.0, 2e-4]
    named = CAME8bit(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_public_names():
    assert set(came8bit.__all__) <= set(dir(came8bit))
    assert came8bit.__version__ == "0.1.0"


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


def test_transposed_view_changes_its_base():
    base = torch.randn(24, 16)
    param = base.t().requires_grad_()
    old = base.clone()
    run(CAME8bit([param], lr=1e-2), param, [torch.randn(16, 24)])
    assert not torch.equal(base, old)
    assert torch.equal(base.t(), param)


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


def test_a_parameter_that_changed_shape_or_type_is_refused():
    param = with_gradient(8, 8)
    optimizer = CAME8bit([param])
    optimizer.step()
    param.grad = None
    param.data = torch.ones(4, 16)
    param.grad = torch.ones(4, 16)
    with pytest.raises(ValueError, match=r"shape \(4, 16\), its state was made for shape"):
        optimizer.step()
    param.grad = None
    param.data = torch.ones(8, 8, dtype=torch.float64)
    param.grad = torch.ones(8, 8, dtype=torch.float64)
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


# --- gradients that are not finite ----------------------------------------------------------------


def test_raise_leaves_everything_as_it_was():
    params = [with_gradient(64, 64), with_gradient(7), with_gradient(8, 8)]
    optimizer = CAME8bit(params, nonfinite="raise")
    params[1].grad[2] = math.nan
    params[2].grad[0, 0] = -math.inf
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match=r"parameter 1 \(shape \(7,\)\), 2 \(shape \(8, 8"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    assert not optimizer.state
    for param in params:
        param.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_raise_looks_in_fp32(dtype):
    """A norm that overflows fp16 is no reason to raise."""
    param = start((64, 64), dtype)
    param.grad = torch.full((64, 64), 6e4).to(dtype)
    CAME8bit([param], nonfinite="raise").step()
    check_finite([])


def test_raise_when_the_preconditioned_gradient_overflows():
    """It can only where the state is broken already: u = g / sqrt(v) is of order one."""
    param = with_gradient(64)
    optimizer = CAME8bit([param], nonfinite="raise")
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(math.nan)
    before = param.detach().clone()
    with pytest.raises(FloatingPointError, match="preconditioned gradient of a parameter"):
        optimizer.step()
    assert torch.equal(param, before)


def test_propagate_computes_with_what_is_there():
    param = with_gradient(64, 64)
    param.grad[0, 0] = math.nan
    optimizer = CAME8bit([param], nonfinite="propagate")
    optimizer.step()
    assert param.isnan().any()
    assert optimizer.skipped_steps() == 0


def test_skips_are_counted_and_warned_about_late_and_rarely():
    param, healthy = start((64, 64)), start((8,))
    optimizer = CAME8bit([param, healthy])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(128):
            param.grad = torch.full((64, 64), math.nan)
            healthy.grad = torch.ones(8)
            optimizer.step()
    assert optimizer.skipped_steps() == 128
    assert [str(w.message).split()[1] for w in caught] == ["16", "112"]
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught)
    assert int(optimizer.state[param]["step"]) == 0
    assert int(optimizer.state[healthy]["step"]) == 128


def test_skipped_steps_before_the_first_step():
    assert CAME8bit([parameter(2)]).skipped_steps() == 0
