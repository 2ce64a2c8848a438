"""Sharded parameters: the rule is that of one process, and ranks never disagree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import pytest
import sharded_runs as runs
import torch
from paths import ROOT
from processes import run_python
from ranks import Ranks
from tolerances import STATISTICS_OF_RANKS, TRAVELLED, TRAVELLED_ROUGH

from benchmarks.sharded_cost import collective_bytes
from came8bit import CAME, PagedCAME8bit, step_in_backward

STATISTICS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
MOMENTUM = {32: torch.float32, 8: torch.int8, 4: torch.uint8, 2: torch.uint8, 0: torch.uint8}
MESHES = [(1,), (2,), (3,), (4,), (2, 2)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.stop()


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].keys() == expected[name].keys()
        for key in got[name]:
            assert torch.equal(got[name][key], expected[name][key]), (name, key)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_statistics_are_those_of_one_process(ranks, mesh):
    """Codes follow them; with one rank everything is equal to the bit."""
    options = dict(optim_bits=32, cautious=True, nesterov=True, bias_correction=True)
    expected = runs.steps(None, **options)
    results = ranks.run(partial(runs.steps, **options), mesh)
    for result in results[1:]:
        assert_equal(result, results[0])
    for name, got in results[0].items():
        for key in got.keys() & set(STATISTICS):
            torch.testing.assert_close(
                got[key], expected[name][key], rtol=STATISTICS_OF_RANKS, atol=0
            )
        torch.testing.assert_close(got["param"], expected[name]["param"], rtol=1e-5, atol=1e-7)
    if mesh == (1,):
        assert_equal(results[0], expected)


@pytest.mark.parametrize("bits", [8, 4, 2, 0])
def test_codes_on_three_ranks(ranks, bits):
    """bf16, stochastic rounding: the same bits on every rank and in every run."""
    options = dict(dtype=torch.bfloat16, optim_bits=bits, count=3)
    expected = runs.steps(None, **options)
    first, again = (ranks.run(partial(runs.steps, **options), (3,)) for _ in range(2))
    for result in (*first, *again):
        assert_equal(result, first[0])
    for name, got in first[0].items():
        for key in ("param", "exp_avg"):
            wanted = expected[name][key]
            if wanted.dtype == torch.float32:
                torch.testing.assert_close(got[key], wanted, rtol=1e-5, atol=1e-7)
            else:  # a code or a bit may be at an edge
                assert int((got[key] != wanted).sum()) <= 0.01 * wanted.numel(), (name, key)


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(ranks, mesh):
    options = dict(spoiled=2, optim_bits=32)
    results = ranks.run(partial(runs.steps, **options), mesh)
    for result in results:
        assert_equal(result, results[0])
        for name, got in result.items():
            assert int(got["skipped"]) == (name in ("matrix", "vector"))
            assert int(got["step"]) == 5 - int(got["skipped"])
            assert got["param"].isfinite().all()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "RuntimeError: parameter 2 .* has a gradient on some ranks only"),
        ("missing at lr 0", "RuntimeError: parameter 2 .* has a gradient on some ranks only"),
        ("missing, skipped", "RuntimeError: parameter 2 .* has a gradient on some ranks only"),
        ("nan", "FloatingPointError: the gradient of parameter 0 .* is not finite"),
        ("state", "FloatingPointError: the preconditioned gradient of parameter 0 .* not finite"),
    ],
)
def test_all_ranks_raise_and_nothing_changes(ranks, case, message):
    for got, same in ranks.run(runs.error_of, (3,), case):
        assert re.search(message, got), got
        assert same


@pytest.mark.parametrize("in_hooks", [False, True])
@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_a_warm_up_from_0_with_gradients_on_some_ranks_only(ranks, mesh, in_hooks):
    """As those of an embedding: what is zero here may be the first gradient of another rank."""
    expected = runs.warm_up(None, in_hooks)
    results = ranks.run(runs.warm_up, mesh, in_hooks)
    for result in results:
        assert_equal(result, results[0])
        for name, got in result.items():
            assert int(got["step"]) == int(expected[name]["step"]) == 3 - (name == "experts")
            torch.testing.assert_close(got["param"], expected[name]["param"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cautious", [False, True])
def test_three_collectives_of_a_known_size(ranks, cautious):
    """Six parameters in six groups; the sums of the first pass by hand, too."""
    expected = collective_bytes(runs.SHAPES.values(), cautious=cautious)
    columns, whole_matrices, unfactored = 300 + 400 + 36, 2, 1 + 1
    assert expected[0] == 8 * (3 * 3 + columns + whole_matrices + unfactored + len(runs.SHAPES))
    assert ranks.run(runs.bytes_sent, (2,), cautious) == [expected] * 2


# --- fully_shard ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "count"), [((2,), 100), ((3,), 20), ((2, 2), 20)], ids=str)
def test_a_llama_goes_where_one_process_goes(ranks, mesh, count):
    """Gradients are summed in another order, and the updates are the same but for that."""
    start, expected = (runs.train(None, "fp32", n, bias_correction=True) for n in (0, count))
    results = ranks.run(partial(runs.train, bias_correction=True), mesh, "fp32", count)
    for result in results:
        travelled = error = 0.0
        for name, wanted in expected.items():
            assert torch.equal(result[name], results[0][name]), name
            travelled += float((wanted - start[name]).square().sum())
            error += float((wanted - result[name]).square().sum())
        assert (error / travelled) ** 0.5 < TRAVELLED


@pytest.mark.parametrize("kind", ["bf16", "mixed precision", "CPU offload", "frozen half"])
def test_kinds_of_fully_shard(ranks, kind):
    """Near one process as far as the precision goes; equal on all ranks."""
    start, expected = (runs.train(None, kind, n, bias_correction=True) for n in (0, 5))
    results = ranks.run(partial(runs.train, bias_correction=True), (2,), kind, 5)
    rough = kind in ("bf16", "mixed precision")
    limit = TRAVELLED_ROUGH if rough else TRAVELLED
    for name, wanted in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        moved = (wanted - start[name]).norm()
        assert bool(moved) != (kind == "frozen half" and name.startswith("blocks.0")), name
        assert (results[0][name] - wanted).norm() <= limit * moved, name


# --- saved state ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("bits", [8, 4, 0])
def test_resharding_keeps_every_bit(ranks, tmp_path, before, after, bits):
    """From DCP and from the one file that all ranks have written together."""
    folder = str(tmp_path / "state")
    expected = ranks.run(partial(runs.save, optim_bits=bits), (before,), folder)[0]
    assert (torch.int8 if bits == 8 else torch.uint8) in {x.dtype for x in expected.values()}
    for way in ("sharded", "file"):
        for got in ranks.run(partial(runs.load, optim_bits=bits), (after,), folder, way):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(got[name], value), (way, name)


@pytest.mark.parametrize(("old", "new"), [(8, 4), (32, 8), (2, 32), (8, 0)])
def test_other_bits(ranks, tmp_path, old, new):
    """Converted by the merge that one process has, to the same bits."""
    folder = str(tmp_path / "state")
    ranks.run(partial(runs.save, optim_bits=old), (2,), folder)
    expected = runs.load_in_other_bits(None, folder, old, new)[0]
    assert expected["blocks.0.up.weight.exp_avg"].dtype == MOMENTUM[new]
    for results in ranks.run(runs.load_in_other_bits, (3,), folder, old, new):
        for got in results:
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("old", "new"), [(8, 32), (32, 8), (8, 4)])
def test_distributed_checkpoints_convert_nothing(ranks, tmp_path, old, new):
    """They copy into the state that is there: codes into numbers, too, which we have to notice."""
    folder = str(tmp_path / "state")
    ranks.run(partial(runs.save, optim_bits=old), (2,), folder)
    for error in ranks.run(runs.error_of_loading, (2,), folder, new):
        message = "exp_avg has codes of 8 bits in place of numbers .* the optim_bits that it was"
        assert re.search(message if new == 32 else "Missing key|Size mismatch", error), error


FULL, FLAT = {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}


@pytest.mark.parametrize(
    ("gather", "take"),
    [
        (FULL, FULL),
        # On the first rank only, and from there.
        ({**FULL, "cpu_offload": True}, {**FULL, "broadcast_from_rank0": True}),
        (FLAT, FLAT),
    ],
    ids=["full", "first rank", "flattened"],
)
def test_every_form_of_the_state_and_back(ranks, gather, take):
    assert all(ranks.run(runs.state_and_back, (4,), gather, take))


def test_saving_before_the_first_step_changes_nothing(ranks):
    assert all(ranks.run(runs.saved_early, (2,)))


# --- whole parameters on several ranks ------------------------------------------------------------


def test_replicas_are_equal_to_the_bit(ranks):
    """Stochastic rounding draws the same bits on every rank, without communication."""
    first, second = ranks.run(runs.replicas, (2,), 50)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_redundancy_has_the_bits_of_one_process(ranks, dtype):
    expected = runs.steps(None, dtype, 5)
    results = ranks.run(runs.zero_redundancy, (2,), 5, dtype)
    assert sum(owned for _, owned in results) == len(expected)
    for params, owned in results:
        assert owned
        for param, one in zip(params, expected.values(), strict=True):
            assert torch.equal(param, one["param"])


# --- refused --------------------------------------------------------------------------------------


def _mesh(shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


@pytest.fixture
def alone() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_other_placements_are_refused_by_name(alone):
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cases = (
        ((1,), [Shard(1)]),
        ((1,), [Partial()]),
        ((1,), [_StridedShard(0, split_factor=1)]),
        ((1, 1), [Shard(0), Shard(0)]),
    )
    for shape, placements in cases:
        made = DTensor.from_local(torch.zeros(4, 4), _mesh(shape), placements)
        param = torch.nn.Parameter(made)
        with pytest.raises(NotImplementedError, match=r"'a.weight' .*has placements.*Shard\(0\)"):
            CAME([("a.weight", param)])
        with pytest.raises(NotImplementedError, match=r"parameter 0 of the group .*fully_shard"):
            CAME([param])


def test_pages_and_steps_in_backward_are_refused(alone):
    model = runs.llama(_mesh((1,)))
    with pytest.raises(NotImplementedError, match=r"'embedding.weight' .*CPUOffloadPolicy"):
        PagedCAME8bit(model.named_parameters())
    with pytest.raises(RuntimeError, match="fully_shard"):
        step_in_backward(CAME(model.named_parameters()))


def test_sharded_state_is_not_for_whole_parameters(alone):
    model, whole = runs.llama(_mesh((1,))), runs.llama(None)
    optimizer, other = CAME(model.named_parameters()), CAME(whole.named_parameters())
    optimizer.materialize()
    with pytest.raises(ValueError, match=r"as a DTensor, .*full_state_dict=True"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_several_matrices_a_slice_are_shared_evenly_or_refused(ranks):
    message = r"\(3, 2, 64, 64\).* is 2 matrices in each of 3 slices, which 2 ranks cannot share"
    for got in ranks.run(runs.construct, (2,), (3, 2, 64, 64)):
        assert re.search(message, got), got
    assert ranks.run(runs.construct, (2,), (4, 2, 64, 64)) == ["", ""]


def test_vectors_in_codes_are_refused(ranks):
    """Their blocks do not end where a rank's part ends; matrices keep to rows."""
    construct = partial(runs.construct, optim_bits=8, quantize_vectors=True)
    for got in ranks.run(construct, (2,), (8192,)):
        assert re.search("blocks of codes the ranks would cut.*quantize_vectors=False", got), got
    assert ranks.run(construct, (2,), (64, 128)) == ["", ""]


# --- the page -------------------------------------------------------------------------------------


def test_the_example_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "several_gpus.md").read_text()
    example = re.search(r"^```py\n(.*?)^```$", text, re.M | re.S)[1]
    (tmp_path / "train.py").write_text(example)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_python(*launch, "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    assert (tmp_path / "state.safetensors").exists()
