"""PyTorch's own description of an optimizer, and generic checks that run from it.

``OptimizerInfo`` rows, the error inputs that hold for every optimizer and the test instantiation
come from ``torch.testing._internal``; the checks are those that PyTorch applies to its optimizers,
for everything that this one supports (no sparse, complex, foreach, fused or capturable variants).
"""
# ruff: noqa: PT009, PT027 - torch's TestCase compares tensors and containers of them

import copy
import functools

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from came8bit import CAME, CAME8bit, CAME32bit, PagedCAME8bit
from came8bit.paging import pages


def inputs(device, dtype=None):
    variants = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "weight_decay, maximize": {"weight_decay": 0.1, "maximize": True},
        "betas": {"betas": (0.8, 0.99, 0.999)},
        "eps": {"eps": (1e-12, 1e-8)},
        "no clipping": {"clip_threshold": 1e3},
        "official view": {"factored_view": "last_two"},
        "codes for all": {"min_8bit_size": 0},
        "cautious": {"cautious": True},
        "bias correction": {"bias_correction": True, "lr": 0.01},
        "nearest": {"rounding": "nearest"},
        "raise": {"nonfinite": "raise"},
    }
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in variants.items()
    ]


def error_inputs(device, dtype):
    rows = [
        ({"lr": -1e-2}, ValueError, "got lr -0.01, expected a number from 0 to 1"),
        ({"betas": (1.0, 0.0, 0.0)}, ValueError, "expected three numbers in"),
        ({"betas": (0.9,)}, ValueError, "expected three numbers in"),
        ({"weight_decay": -1}, ValueError, "got weight_decay -1"),
        ({"eps": (1e-30, 0)}, ValueError, "expected two finite positive numbers"),
        ({"foreach": True}, TypeError, "got foreach=True, which CAME does not have"),
    ]
    generic = get_error_inputs_for_all_optims(device, dtype)
    for row in generic:
        if "duplicate parameters" in row.error_regex:
            row.error_type = ValueError  # torch still only warns
    return generic + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=regex),
            error_type=error,
            error_regex=regex,
        )
        for kwargs, error, regex in rows
    ]


INFOS = [
    OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: ExponentialLR(opt, gamma=0.99)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
        ),
        supported_impls=(),
        not_og_supported_flags=("maximize",),
        supports_complex=False,
    )
    for cls in (CAME, CAME8bit, CAME32bit, PagedCAME8bit)
]


def all_inputs(optim_info, device):
    """(class, keyword arguments) of every variant; the arguments are fresh copies."""
    for optim_input in optim_info.optim_inputs_func(device=device):
        yield optim_info.optim_cls, copy.deepcopy(optim_input.kwargs)


def regression(device, dtype, contiguous=True):
    """Weight, bias and a closure factory of a small least-squares problem."""
    torch.manual_seed(0)
    if contiguous:
        weight, bias = torch.randn((10, 5)), torch.randn(10)
    else:
        weight, bias = torch.randn((10, 5, 2))[..., 0], torch.randn((10, 2))[..., 0]
    weight, bias = (t.to(device, dtype).requires_grad_() for t in (weight, bias))
    target = torch.randn(5, device=device, dtype=dtype)

    def closure(optimizer):
        optimizer.zero_grad()
        loss = (weight.mv(target) + bias).pow(2).sum()
        loss.backward()
        return loss

    return weight, bias, closure


def trained(cls, kwargs, device, dtype, steps=5):
    weight, bias, closure = regression(device, dtype)
    optimizer = cls([weight, bias], **kwargs)
    for _ in range(steps):
        optimizer.step(functools.partial(closure, optimizer))
    return optimizer, weight, bias, closure


class TestOptim(TestCase):
    """One method for each property that torch demands of an optimizer."""

    def setUp(self):
        super().setUp()
        kept, pages.MIN_PAGE_BYTES = pages.MIN_PAGE_BYTES, 0  # small parameters have pages, too
        self.addCleanup(setattr, pages, "MIN_PAGE_BYTES", kept)

    @optims(INFOS)
    def test_errors(self, device, dtype, optim_info):
        rows = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        self.assertGreater(len(rows), 5)
        for row in rows:
            self.assertEqual(row.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            params = row.optimizer_error_input.params
            if params is None:
                params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype))]
            with self.assertRaisesRegex(row.error_type, row.error_regex):
                optim_info.optim_cls(params, **row.optimizer_error_input.kwargs)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(INFOS, dtypes=[torch.float32])
    def test_goes_in_the_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for cls, kwargs in all_inputs(optim_info, device):
            for constructors in optim_info.scheduler_inputs if with_lrsched else [[]]:
                weight, bias, closure = regression(device, dtype, contiguous)
                optimizer = cls([weight, bias], **copy.deepcopy(kwargs))
                schedulers = [make(optimizer) for make in constructors]
                first = closure(optimizer).item()
                for _ in range(20):
                    loss = optimizer.step(functools.partial(closure, optimizer)).item()
                    for scheduler in schedulers:
                        scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
                last = closure(optimizer).item()
                self.assertEqual(last > first, kwargs.get("maximize", False))

    @parametrize("num_dim", [0, 1, 2])
    @optims(INFOS)
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        for cls, kwargs in all_inputs(optim_info, device):
            kwargs.pop("lr", None)
            for scheduled in (False, True):
                results = []
                for lr in (0.01, torch.full([1] * num_dim, 0.01)):
                    weight, bias, closure = regression(device, dtype)
                    optimizer = cls([weight, bias], **kwargs, lr=lr)
                    scheduler = StepLR(optimizer, step_size=2, gamma=0.5) if scheduled else None
                    for _ in range(5):
                        optimizer.step(functools.partial(closure, optimizer))
                        if scheduler is not None:
                            scheduler.step()
                    results.append((weight, bias))
                    kept = optimizer.param_groups[0]["lr"]
                    self.assertEqual(isinstance(kept, torch.Tensor), isinstance(lr, torch.Tensor))
                self.assertEqual(results[0], results[1])

    @parametrize("with_lrsched", [True, False])
    @optims(INFOS)
    def test_param_group_lr(self, device, dtype, optim_info, with_lrsched):
        for cls, kwargs in all_inputs(optim_info, device):
            if "lr" not in kwargs or isinstance(kwargs["lr"], torch.Tensor):
                kwargs["lr"] = 1e-3
            weight, bias, closure = regression(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.0}]
            optimizer = cls(groups, **kwargs)
            scheduler = StepLR(optimizer, 1) if with_lrsched else None
            before = weight.detach().clone(), bias.detach().clone()
            optimizer.step(functools.partial(closure, optimizer))
            if scheduler is not None:
                scheduler.step()
            self.assertNotEqual(weight, before[0])
            self.assertEqual(bias, before[1])

    @optims(INFOS)
    def test_param_group_weight_decay(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            kwargs["weight_decay"] = 0.0
            weight, bias = (torch.ones(s, device=device, dtype=dtype) for s in ((10, 5), (10,)))
            groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.1}]
            optimizer = cls(groups, **{**kwargs, "lr": 0.1})
            weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
            optimizer.step()
            self.assertEqual(weight, torch.ones_like(weight))
            self.assertEqual(bias, torch.full_like(bias, 0.99))

    @optims(INFOS)
    def test_step_without_gradients_is_noop(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            params = [torch.randn(2, 3, requires_grad=True, device=device, dtype=dtype)]
            before = copy.deepcopy(params)
            optimizer = cls(params, **kwargs)
            optimizer.step()
            self.assertEqual(before, params)
            self.assertFalse(optimizer.state)

    @optims(INFOS)
    def test_prints(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            optimizer, *_ = trained(cls, kwargs, device, dtype, steps=1)
            self.assertIn(cls.__name__, repr(optimizer))

    @parametrize("named_from", [True, False])
    @parametrize("named_to", [True, False])
    @optims(INFOS)
    def test_state_dict_is_deterministic(self, device, dtype, optim_info, named_from, named_to):
        for cls, kwargs in all_inputs(optim_info, device):
            weight, bias, closure = regression(device, dtype)
            params = [("w", weight), ("b", bias)] if named_from else [weight, bias]
            optimizer = cls(params, **kwargs)
            for _ in range(3):
                optimizer.step(functools.partial(closure, optimizer))
            closure(optimizer)
            copies = [copy.deepcopy(p.detach()).requires_grad_() for p in (weight, bias)]
            named = [("w0", copies[0]), ("b0", copies[1])] if named_to else copies
            other = cls(named, **kwargs)
            state_dict = copy.deepcopy(optimizer.state_dict())
            other.load_state_dict(optimizer.state_dict())
            for _ in range(3):
                for p, q in zip((weight, bias), copies, strict=True):
                    q.grad = p.grad.clone()
                optimizer.step()
                other.step()
                self.assertEqual((weight, bias), tuple(copies), rtol=0, atol=0)
            names = other.state_dict()["param_groups"][0].get("param_names")
            expected = ["w", "b"] if named_from else ["w0", "b0"] if named_to else None
            self.assertEqual(names, expected)
            self.assertEqual(optimizer.state_dict()["state"], other.state_dict()["state"])
            # What was loaded is as it was.
            self.assertNotEqual(state_dict["state"], optimizer.state_dict()["state"])

    @optims(INFOS)
    def test_loads_older_state_dicts(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            optimizer, *_ = trained(cls, kwargs, device, dtype)
            state_dict = copy.deepcopy(optimizer.state_dict())
            for flag in optim_info.not_og_supported_flags:
                for group in state_dict["param_groups"]:
                    del group[flag]
            optimizer.load_state_dict(state_dict)
            optimizer.step()
            self.assertEqual(optimizer.param_groups[0]["maximize"], kwargs.get("maximize", False))

    @optims(INFOS)
    def test_deepcopy_copies_public_attributes(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            optimizer, *_ = trained(cls, kwargs, device, dtype)
            other = copy.deepcopy(optimizer)

            def public(obj):
                return {name for name in vars(obj) if not name.startswith("_")}

            self.assertEqual(public(optimizer), public(other))
            self.assertEqual(optimizer.state_dict(), other.state_dict())
            self.assertEqual(optimizer.defaults, other.defaults)

    @optims(INFOS)
    def test_step_hooks(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            calls = []

            def note(name, calls=calls):
                def hook(instance, _args, _kwargs):
                    calls.append((name, len(instance.state)))

                return hook

            weight, bias, closure = regression(device, dtype)
            optimizer = cls([weight, bias], **kwargs)
            handles = [
                register_optimizer_step_pre_hook(note("global pre")),
                optimizer.register_step_pre_hook(note("pre")),
                optimizer.register_step_post_hook(note("post")),
                register_optimizer_step_post_hook(note("global post")),
            ]
            try:
                optimizer.step(functools.partial(closure, optimizer))
            finally:
                for handle in handles:
                    handle.remove()
            self.assertEqual(
                calls, [("global pre", 0), ("pre", 0), ("post", 2), ("global post", 2)]
            )
            optimizer.step(functools.partial(closure, optimizer))
            self.assertEqual(len(calls), 4)

    @parametrize("prepend", [True, False])
    @optims(INFOS)
    def test_state_dict_hooks(self, device, dtype, optim_info, prepend):
        for cls, kwargs in all_inputs(optim_info, device):
            optimizer, *_ = trained(cls, kwargs, device, dtype)
            calls = []
            register = {
                "pre": optimizer.register_state_dict_pre_hook,
                "post": optimizer.register_state_dict_post_hook,
                "load pre": optimizer.register_load_state_dict_pre_hook,
                "load post": optimizer.register_load_state_dict_post_hook,
            }
            handles = []
            for number, flag in enumerate((False, prepend)):
                for name, function in register.items():

                    def hook(*_args, tag=(name, number), calls=calls):
                        calls.append(tag)

                    handles.append(function(hook, prepend=flag))
            optimizer.load_state_dict(optimizer.state_dict())
            order = (1, 0) if prepend else (0, 1)
            self.assertEqual(calls, [(name, number) for name in register for number in order])
            for handle in handles:
                handle.remove()
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(len(calls), 8)

    @optims(INFOS)
    def test_load_hook_may_replace_the_state_dict(self, device, dtype, optim_info):
        for cls, kwargs in all_inputs(optim_info, device):
            optimizer, *_ = trained(cls, kwargs, device, dtype)
            replacement = copy.deepcopy(optimizer.state_dict())
            replacement["param_groups"][0]["lr"] = 0.002
            optimizer.register_load_state_dict_pre_hook(lambda _o, _s, new=replacement: new)
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)


instantiate_device_type_tests(TestOptim, globals(), only_for=("cpu", "cuda"))
