"""What configuration files, other optimizers' users and unusual parameters hand over."""

import re
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

import came8bit
from came8bit import CAME, CAME8bit, PagedCAME8bit
from came8bit.overlap import elements_overlap, sharing


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(shape))


# --- options --------------------------------------------------------------------------------------

MEANT = [
    ({"lr": "1e-4"}, {"lr": 1e-4}),
    ({"lr": Decimal("0.5")}, {"lr": 0.5}),
    ({"lr": np.float32(0.5)}, {"lr": 0.5}),
    ({"lr": Fraction(1, 2)}, {"lr": 0.5}),
    ({"optim_bits": "8"}, {"optim_bits": 8}),
    ({"optim_bits": 8.0}, {"optim_bits": 8}),
    ({"optim_bits": np.int64(8)}, {"optim_bits": 8}),
    ({"weight_decay": "0.01"}, {"weight_decay": 0.01}),
    ({"clip_threshold": "inf"}, {"clip_threshold": float("inf")}),
    ({"min_8bit_size": "1e3"}, {"min_8bit_size": 1000}),
    ({"seed": "7"}, {"seed": 7}),
    ({"cautious": "True"}, {"cautious": True}),
    ({"bias_correction": "false"}, {"bias_correction": False}),
    ({"betas": (0.9, 0.95)}, {"betas": (0.9, 0.95, 0.9999)}),
    ({"betas": ["0.9", "0.95", "0.99"]}, {"betas": (0.9, 0.95, 0.99)}),
    ({"eps": ("1e-30", "1e-16")}, {"eps": (1e-30, 1e-16)}),
    ({"amsgrad": False, "percentile_clipping": 100, "block_wise": True, "args": None}, {}),
    ({"fused": None, "foreach": False}, {}),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=str)
def test_what_a_configuration_file_means(given, meant):
    in_constructor = CAME([parameter(3)], **given)
    for name, value in meant.items():
        assert in_constructor.param_groups[0][name] == value
    if meant:
        in_group = CAME([{"params": [parameter(3)], **given}])
        for name, value in meant.items():
            assert in_group.param_groups[0][name] == value
    p = in_constructor.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    in_constructor.step()


REFUSED = [
    ({"lr": True}, ValueError, "got lr True, expected a number"),
    ({"weight_decay": False}, ValueError, "got weight_decay False"),
    ({"optim_bits": True}, ValueError, "got optim_bits=True, expected 8"),
    ({"optim_bits": 8.5}, ValueError, "got optim_bits=8.5, expected 8"),
    ({"min_8bit_size": True}, ValueError, "got min_8bit_size True"),
    ({"seed": False}, ValueError, "got seed False"),
    ({"cautious": "maybe"}, ValueError, "got cautious 'maybe', expected True or False"),
    ({"eps": 1e-8}, ValueError, r"Leave eps out, or write eps=\(1e-30, 1e-16\)"),
    ({"eps": (1e-30, 3e38)}, ValueError, "expected two finite positive numbers up to 1.0"),
    ({"lr": 1e38}, ValueError, r"expected a number from 0 to 1e\+09"),
    ({"weight_decay": 1e38}, ValueError, r"expected a number from 0 to 1e\+09"),
    ({"lr": 10**400}, ValueError, "got lr 1000.*, expected a number"),
    ({"eps": (10**400, 1e-16)}, ValueError, "expected two finite positive numbers"),
    ({"betas": (0.9, 0.99, True)}, ValueError, "expected three numbers"),
    ({"amsgrad": True}, TypeError, "got amsgrad=True, which CAME does not have"),
    ({"percentile_clipping": 5}, TypeError, "pass percentile_clipping=100"),
    ({"weight_deacy": 0.1}, TypeError, "unexpected keyword argument 'weight_deacy'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=str)
def test_what_means_nothing_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        CAME8bit([parameter(3)], **options)


def test_adams_eps_is_warned_of():
    with pytest.warns(UserWarning, match="added to squared gradients"):
        CAME([parameter(3)], eps=(1e-8, 1e-16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CAME([parameter(3)])


def test_large_allowed_options_stay_finite():
    p = parameter(8, 8)
    optimizer = CAME([p], eps=(1.0, 1.0), lr=1.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.isfinite().all()


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CAME8bit, PagedCAME8bit])
@pytest.mark.parametrize("in_backward", [False, True])
def test_what_never_gets_a_gradient_is_left_alone(cls, in_backward):
    """4-bit weights of a frozen base, integers, wrapper subclasses: beside what trains."""
    frozen = [
        torch.nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False),
        torch.nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False),
        torch.nn.Parameter(torch.zeros(1).expand(5, 5), requires_grad=False),
    ]
    p = parameter(70, 300)
    optimizer = cls([frozen[0], p, *frozen[1:]], lr=0.1)
    if in_backward:
        came8bit.step_in_backward(optimizer)
    before = p.detach().clone()
    for _ in range(2):
        (p * p).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(p, before)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert list(saved["state"]) == [1]
    optimizer.load_state_dict(saved)


def test_lazy_parameters():
    net = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyLinear(2))
    optimizer = CAME8bit(net.parameters(), lr=0.1)
    net(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


def test_wrapper_subclasses_are_refused_by_name():
    inner = TwoTensor(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(TypeError, match="is a TwoTensor, which wraps other tensors"):
        CAME8bit([torch.nn.Parameter(inner)])


LONG = 1 << 20
MATRIX = r"Make it a parameter of shape \(1024, 1024\), and view it where it is used, for "
# Large parameters with options, and what the warning says of them; None if there is none.
LARGE = [
    (
        (LONG,),
        {},
        "8.00 bytes per element. Shard with .*ZeroRedundancyOptimizer, or set quant.* 5.02",
    ),
    ((LONG,), {"optim_bits": 32}, r"or use CAME8bit\(quantize_vectors=True\) for 5.02"),
    (
        (LONG, 1),
        {},
        "factored or coded, and its state takes 8.00 bytes per element. " + MATRIX + "1.03",
    ),
    ((LONG, 1), {"optim_bits": 32}, MATRIX + "4.02"),
    ((LONG, 1), {"quantize_vectors": True}, MATRIX + "1.03"),
    ((LONG, 1), {"factored_view": "last_two"}, "12.00 bytes per element. " + MATRIX + "1.03"),
    ((1, LONG), {}, "factored, and its state takes 5.02 bytes per element. " + MATRIX + "1.03"),
    ((LONG, 2), {}, "factored, and its state takes 7.00 bytes"),
    ((LONG + 7, 1), {}, r"shape \(1, 1048583\), and view it where it is used, for 5.02"),
    ((LONG,), {"quantize_vectors": True}, None),
    ((1, LONG), {"quantize_vectors": True}, None),
    ((LONG - 1, 1), {}, None),
    ((1024, 1024), {"optim_bits": 32}, None),
    ((1024, 1024), {"min_8bit_size": LONG + 1}, None),
]


@pytest.mark.parametrize(("shape", "options", "said"), LARGE, ids=str)
def test_what_is_large_and_takes_much_is_warned_of(shape, options, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CAME([parameter(*shape)], **{"optim_bits": 8, **options})
    if said is None:
        assert not caught
    else:
        (warning,) = caught
        assert re.search(said, str(warning.message)), warning.message


def test_large_vectors_are_warned_of_once():
    with pytest.warns(UserWarning, match=r"ZeRO make of matrices \(and 1 more\)") as caught:
        CAME8bit([parameter(LONG), parameter(LONG), parameter(3)])
    assert len(caught) == 1


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_memory_that_was_freed_is_refused(what):
    """By a tool that swaps parameters out; PyTorch's optimizers end with a segmentation fault."""
    param = parameter(64, 64)
    optimizer = CAME8bit([param])
    param.grad = torch.randn(64, 64)
    optimizer.step()
    (param if what == "parameter" else param.grad).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"parameter 0 .* the memory of the {what} has been freed"):
        optimizer.step()


# --- shared memory --------------------------------------------------------------------------------

X = torch.randn(64, 64)
OVERLAPPING = [
    X.as_strided((20, 20), (3, 1)),
    X.as_strided((20, 20), (1, 1)),
    X.as_strided((4, 4, 4), (16, 5, 1)),
    torch.zeros(1).expand(5),
    torch.zeros(3, 1).expand(3, 4),
    X.view(-1).unfold(0, 5, 2),
]
SEPARATE = [
    X,
    X.t(),
    X[::2, ::3],
    X.as_strided((2, 3), (3, 2)),  # places 0, 2, 4, 3, 5, 7
    X[:0],
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(1, 1).expand(1, 1),
]


@pytest.mark.parametrize("tensor", OVERLAPPING, ids=lambda t: f"{tuple(t.shape)}{t.stride()}")
def test_elements_that_share_memory_are_refused(tensor):
    assert elements_overlap(tensor)
    with pytest.raises(ValueError, match="several elements share memory"):
        CAME8bit([torch.nn.Parameter(tensor)])


@pytest.mark.parametrize("tensor", SEPARATE, ids=lambda t: f"{tuple(t.shape)}{t.stride()}")
def test_elements_that_share_no_memory(tensor):
    assert not elements_overlap(tensor)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4))
def test_overlap_is_what_counting_says(dims):
    shape, stride = [size for size, _ in dims], [step for _, step in dims]
    tensor = torch.zeros(200).as_strided(shape, stride)
    places = torch.arange(200).as_strided(shape, stride).reshape(-1)
    assert elements_overlap(tensor) == (places.unique().numel() < places.numel())


def test_parameters_that_share_memory_are_refused():
    base = torch.randn(8, 10)
    tied = [torch.nn.Parameter(base), torch.nn.Parameter(base)]
    with pytest.raises(ValueError, match=r"parameter 0 .* and parameter 1 .* share memory"):
        CAME8bit(tied)
    optimizer = CAME8bit(tied[:1])
    with pytest.raises(ValueError, match="a parameter of another group and parameter 0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(base[2:4])]})
    halves = [torch.nn.Parameter(base[:, :5]), torch.nn.Parameter(base[:, 5:])]
    CAME8bit(halves)
    assert sharing([("a", base[:, :6]), ("b", base[:, 5:])]) == ("a", "b")
    assert sharing([("a", base[::2]), ("b", base[1::2])]) is None
    assert sharing([("a", base), ("b", base.view(torch.bfloat16))]) == ("a", "b")
    assert sharing([("a", base.to("meta")), ("b", base.to("meta"))]) is None
