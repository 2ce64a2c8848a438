"""Construction of the optimizer classes: arguments, defaults, what is refused."""

import inspect
import math

import pytest
import torch
from training import assert_same, parameter, snapshot, with_gradient

from came8bit import CAME, CAME8bit, CAME32bit, PagedCAME, PagedCAME8bit, PagedCAME32bit


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


BAD_OPTIONS = [
    ({"lr": -1.0}, "got lr -1.0, expected a number from 0 to 1"),
    ({"lr": math.nan}, "got lr nan"),
    ({"lr": math.inf}, "got lr inf"),
    ({"lr": 1e39}, "got lr 1e\\+39"),
    ({"lr": "fast"}, "got lr 'fast', expected a number or a tensor"),
    ({"lr": None}, "got lr None"),
    ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(1j)}, "Tensor lr must be 1-element and real"),
    ({"lr": torch.tensor(-1.0)}, "expected a number from 0 to 1"),
    ({"lr": torch.tensor(math.nan)}, "expected a number from 0 to 1"),
    ({"betas": (0.9,)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, 0.999, 1.0)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, math.nan, 0.9999)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (-0.1, 0.999, 0.9999)}, "expected three numbers in \\[0, 1\\)"),
    ({"betas": (0.9, 0.999, 1 - 1e-9)}, "that stay below 1 in float32"),
    ({"betas": 0.9}, "expected three numbers in \\[0, 1\\)"),
    ({"eps": (1e-30, 0.0)}, "expected two finite positive numbers"),
    ({"eps": (1e-50, 1e-16)}, "not 0 in float32"),
    ({"rounding": torch.ones(3)}, "got rounding tensor"),
    ({"eps": (1e-43, 1e-16)}, "not 0 in float32 when multiplied by 1 - beta2 and 1 - beta3"),
    ({"eps": (1e-30, 1e-42)}, "not 0 in float32 when multiplied by 1 - beta2 and 1 - beta3"),
    ({"eps": (1e-30, math.nan)}, "expected two finite positive numbers"),
    ({"eps": (math.inf, 1e-16)}, "expected two finite positive numbers"),
    ({"eps": 1e-8}, "expected two finite positive numbers"),
    ({"clip_threshold": 0.0}, "got clip_threshold 0.0, expected a positive number"),
    ({"clip_threshold": math.nan}, "got clip_threshold nan"),
    ({"clip_threshold": None}, "got clip_threshold None"),
    ({"weight_decay": -1e-2}, "got weight_decay -0.01, expected a number from 0 to 1"),
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
    ({"optim_bits": 5}, "got optim_bits 5, expected one of \\(32, 8, 4, 2, 0\\)"),
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


def test_groups_take_generators_single_tensors_and_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = CAME8bit(model[0].parameters())
    optimizer.add_param_group({"params": (p for p in model[1].parameters()), "lr": 1.0})
    optimizer.add_param_group({"params": parameter(2)})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1.0, 2e-4]
    named = CAME8bit(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
