"""benchmarks.ablations: variants that differ from the rule by one thing, and their summary."""

import csv
from itertools import pairwise

import pytest
import tolerances
import torch
from training import gradients, relative, run, start

from benchmarks import ablations
from benchmarks.ablations import Factors, Variant, rank_one
from came8bit import CAME32bit
from came8bit.tradeoff.config import OPTIMIZERS

SHAPE = (64, 48)


def trained(options, shape=SHAPE, **grads):
    param = start(shape)
    run(Variant([param], lr=1e-3, weight_decay=0.1, **options), param, gradients(shape, **grads))
    return param.detach()


@pytest.mark.parametrize("shape", [(300,), SHAPE], ids=str)
@pytest.mark.parametrize("grads", [{}, {"spikes": True}, {"noise": 0.1}], ids=str)
def test_the_base_is_the_rule(shape, grads):
    param = start(shape)
    optimizer = CAME32bit([param], lr=1e-3, weight_decay=0.1, bias_correction=True, nesterov=True)
    run(optimizer, param, gradients(shape, **grads))
    # At ten times the learning rate that the tolerance is for.
    assert relative(trained({}, shape, **grads), param) < 10 * tolerances.PARITY_PARAM


@pytest.mark.parametrize("name", [name for name in ablations.VARIANTS if name != "base"])
def test_a_variant_differs_for_matrices_alone(name):
    _, options = ablations.VARIANTS[name]
    assert relative(trained(options), trained({})) > 1e-3
    assert torch.equal(trained(options, (300,)), trained({}, (300,)))


def test_factors_of_rank_1_are_the_product_of_the_means():
    x = torch.rand(SHAPE) ** 4
    assert relative(Factors(x, 1).approximate(x, 1), rank_one(x)) < 1e-6


def test_more_factors_are_closer():
    """A matrix of rank 2 is found by rank 2; every update lowers the divergence."""
    x = torch.rand(64, 2) @ torch.rand(2, 48)
    factors = Factors(x, 2)
    errors = [divergence(x, factors.approximate(x, 1)) for _ in range(200)]
    assert all(after <= before * 1.01 + 1e-6 for before, after in pairwise(errors))
    assert errors[-1] < 0.05 * divergence(x, rank_one(x))


def divergence(x, y):
    x, y = x.double(), y.double()
    return (x * (x / y).log() - x + y).sum().item()


def test_a_matrix_that_is_zero_in_part_has_finite_factors():
    x = torch.rand(SHAPE)
    x[3], x[:, 5] = 0.0, 0.0
    assert Factors(x, 4).approximate(x, 20).isfinite().all()


def test_the_full_instability_of_one_step_by_hand():
    """U is the signs times a factor: the means of rows and columns cannot see where it is small."""
    g = next(gradients(SHAPE, steps=1))
    param = torch.zeros(SHAPE, requires_grad=True)
    run(Variant([param], lr=1.0, full_instability=True), param, [g])
    u = g / rank_one(g * g).sqrt()
    u = u / u.square().mean().sqrt().clamp_min(1.0)
    # After one step the direction is U and M is 0.1 U, so the confidence leaves the signs.
    assert torch.allclose(param, -u.sign() / 0.9, atol=1e-5)


def test_the_study_runs_and_its_summary_is_paired(small, monkeypatch, tmp_path):
    for name in ablations.VARIANTS:
        monkeypatch.setitem(OPTIMIZERS, name, None)
    names = ablations.register()
    code, folder = small("--optimizers", ",".join(names), "--equal-lr", "1e-3")
    assert code == 0
    monkeypatch.setattr(ablations, "ROWS", folder / "runs.csv")
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["loss"] for row in rows if row["seed"] == "0"}) == 2 * len(names)

    class Kernels:
        def __init__(self, name): ...

        def losses(self, optimizer, lr):
            return {0: 1.0, 1: 1.1, 2: 1.2}

    monkeypatch.setattr(ablations.evidence, "Rows", Kernels)
    lines = ablations.summary().splitlines()
    assert len(lines) == 2 + 2 * (1 + len(names))
    of = {(row["optimizer"], float(row["lr"]), row["seed"]): float(row["loss"]) for row in rows}
    gaps = [of["rank2", 2e-3, seed] - of["base", 2e-3, seed] for seed in "01"]
    cells = [cell.strip() for cell in lines[4].split("|")]
    assert cells[1] == "second moment of rank 2"
    assert float(cells[4]) == pytest.approx(sum(gaps) / 2, rel=0.1)
