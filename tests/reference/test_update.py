"""The rule against ``came-pytorch`` 0.1.3 and float64; deviations are in ``test_deviations.py``."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from came_pytorch import CAME as OfficialCAME
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from training import gradients, relative, run, start

from came8bit import CAME32bit

STATISTICS = (
    "exp_avg_sq",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "exp_avg_res_row",
    "exp_avg_res_col",
)
SHAPES = [(300,), (64, 48), (6, 20, 33), (8, 4, 3, 3)]
LR = 1e-4
STEPS = 100

# name, gradients, hyper-parameters
CASES = [
    ("default", {}, {}),
    ("weight decay", {}, {"weight_decay": 0.1}),
    ("short betas", {}, {"betas": (0.5, 0.9, 0.99)}),
    ("no momentum", {}, {"betas": (0.0, 0.999, 0.9999)}),
    ("long betas", {}, {"betas": (0.95, 0.99, 0.999)}),
    ("clip always", {}, {"clip_threshold": 0.1}),
    ("clip never", {}, {"clip_threshold": 100.0}),
    ("spikes", {"spikes": True}, {}),
    ("repeating 0.1", {"noise": 0.1}, {}),
    ("repeating 0.001", {"noise": 1e-3}, {"weight_decay": 0.01}),
    ("repeating with spikes", {"noise": 0.1, "spikes": True}, {}),
    ("tiny gradients", {"scale": 1e-15}, {}),
    ("large gradients", {"scale": 1e12}, {}),
]


def official_in_float64(shape, grads, **options):
    """The official code on float64; its buffers take the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        param = start(shape).detach().double().requires_grad_()
        return param, run(OfficialCAME([param], lr=LR, **options), param, grads)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("grads", "options"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_parity_with_came_pytorch(shape, grads, options):
    sequence = list(gradients(shape, **grads))
    p0 = start(shape).detach().clone()
    theirs, ours = start(shape), start(shape)
    their_state = run(OfficialCAME([theirs], lr=LR, **options), theirs, sequence)
    optimizer = CAME32bit([ours], lr=LR, factored_view="last_two", **options)
    our_state = run(optimizer, ours, sequence)

    error = (ours - theirs).norm().item()
    assert error <= tolerances.PARITY_PARAM * theirs.norm().item()
    travelled = (theirs - p0).norm().item()
    assert travelled > 0
    rounding = tolerances.PARITY_ROUNDING * theirs.norm().item()
    assert error <= tolerances.PARITY_DISTANCE * travelled + rounding
    names = [name for name in STATISTICS if name in their_state]
    assert len(names) == (1 if len(shape) == 1 else 4)
    for name in names:
        x, y = our_state[name].flatten(), their_state[name].flatten()
        assert ((x - y).abs() <= tolerances.PARITY_STATISTICS * y.abs()).all(), name
    assert int(our_state["step"]) == STEPS
    assert relative(our_state["exp_avg"], their_state["exp_avg"]) < tolerances.PARITY_STATISTICS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("grads", "options"),
    [c[1:] for c in CASES if c[0] in ("default", "spikes", "repeating with spikes")],
)
def test_as_close_to_float64_as_came_pytorch(shape, grads, options):
    sequence = list(gradients(shape, **grads))
    exact, _ = official_in_float64(shape, sequence, **options)
    theirs, ours = start(shape), start(shape)
    run(OfficialCAME([theirs], lr=LR, **options), theirs, sequence)
    run(CAME32bit([ours], lr=LR, factored_view="last_two", **options), ours, sequence)
    travelled = (exact - start(shape)).norm()
    ours_error, their_error = ((p.double() - exact).norm() / travelled for p in (ours, theirs))
    assert ours_error <= max(tolerances.FLOAT64_FACTOR * their_error, tolerances.FLOAT64_FLOOR)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    # Below, u - m = beta1 * (...) is mostly rounding error in came-pytorch's own evaluation.
    beta1=st.just(0.0) | st.floats(0.05, 0.99),
    beta2=st.floats(0.5, 0.9999),
    beta3=st.floats(0.5, 0.99999),
    clip=st.floats(0.05, 20.0),
    decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_parity_is_a_law(shape, beta1, beta2, beta3, clip, decay, seed):
    # One element: the clip makes |u| the same at every step, so that u - m can vanish.
    assume(len(shape) < 2 or math.prod(shape) > 1)
    options = {"betas": (beta1, beta2, beta3), "clip_threshold": clip, "weight_decay": decay}
    sequence = list(gradients(shape, steps=10, seed=seed))
    theirs, ours = start(shape), start(shape)
    run(OfficialCAME([theirs], lr=LR, **options), theirs, sequence)
    run(CAME32bit([ours], lr=LR, factored_view="last_two", **options), ours, sequence)
    travelled = (theirs - start(shape)).norm().item()
    rounding = tolerances.PARITY_ROUNDING * theirs.norm().item()
    bound = 10 * tolerances.PARITY_DISTANCE * travelled + rounding
    assert (ours - theirs).norm().item() <= bound
