"""Checkpoints: what is saved comes back, to whichever optimizer, and anybody can read the file."""

import json
import math

import numpy as np
import pytest
import safetensors
import torch
from bytes_store import Elsewhere
from checkpoints import SHAPES, by_name, copies, parameters, train, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from training import assert_same, same_bits, snapshot, start

from came8bit import (
    CAME,
    CAME8bit,
    CAME32bit,
    CheckpointError,
    convert_checkpoint,
    load_checkpoint,
    quantize_blockwise,
    save_checkpoint,
)
from came8bit.state.store import DenseStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.safetensors"


def same_state(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert same_bits(value, second[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [CAME8bit, CAME32bit])
@pytest.mark.parametrize("named", [True, False])
def test_resuming_is_bit_exact(path, cls, dtype, named):
    params, unbroken = trained(cls, dtype=dtype)
    if not named:
        for group in unbroken.param_groups:
            del group["param_names"]
    size = save_checkpoint(unbroken, path)
    assert size == path.stat().st_size
    again = copies(params)
    resumed = cls(again.items() if named else again.values(), lr=0.5)
    report = load_checkpoint(resumed, str(path))
    assert (report.matched_by, report.loaded) == ("name" if named else "position", len(SHAPES))
    assert not report.remarks()
    assert_same(snapshot(unbroken), snapshot(resumed))
    train(params, unbroken, 3, first=3)
    train(again, resumed, 3, first=3)
    assert_same(snapshot(unbroken), snapshot(resumed))


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=4).map(tuple), min_size=1, max_size=4),
    bits=st.sampled_from([8, 32]),
    view=st.sampled_from(["smallest", "last_two"]),
    steps=st.integers(0, 2),
)
def test_round_trip_is_a_law(tmp_path_factory, shapes, bits, view, steps):
    path = tmp_path_factory.mktemp("law") / "x.safetensors"
    shapes = {f"p{i}": shape for i, shape in enumerate(shapes)}
    options = {"optim_bits": bits, "factored_view": view, "min_8bit_size": 0}
    params, optimizer = trained(CAME, steps, shapes, **options)
    save_checkpoint(optimizer, path)
    other = CAME(copies(params).items(), optim_bits=bits)
    load_checkpoint(other, path)
    assert_same(snapshot(optimizer), snapshot(other))


def test_nothing_is_shared_and_the_saved_optimizer_is_untouched(path):
    params, optimizer = trained()
    before = snapshot(optimizer)
    save_checkpoint(optimizer, path)
    load_checkpoint(optimizer, path)  # into itself
    assert_same(before, snapshot(optimizer))
    content = path.read_bytes()
    train(params, optimizer, 1, first=3)
    assert path.read_bytes() == content


def test_parameters_without_state_have_none_afterwards(path):
    params = parameters()
    optimizer = CAME8bit(params.items())
    params["embed"].grad = torch.ones(SHAPES["embed"])
    optimizer.step()  # the others have had no gradient
    save_checkpoint(optimizer, path)
    _, other = trained()
    report = load_checkpoint(other, path)
    assert (report.loaded, report.without_state) == (1, len(SHAPES) - 1)
    assert sum(bool(other._store.read(p)) for p in other.param_groups[0]["params"]) == 1
    before = snapshot(other)
    save_checkpoint(other, path)
    load_checkpoint(other, path)
    assert_same(before, snapshot(other))


def test_counts_of_single_parameters_are_kept(path):
    """Parameters that were skipped or came later have other steps than the rest."""
    params, optimizer = trained()
    params["bias"].grad.fill_(torch.nan)
    params["scale"].grad = None
    optimizer.step()
    save_checkpoint(optimizer, path)
    again = copies(params)
    other = CAME8bit(again.items())
    load_checkpoint(other, path)
    assert other.skipped_steps() == 1
    counts = {
        name: tuple(int(other._store.read(p)[k]) for k in ("step", "skipped"))
        for name, p in again.items()
    }
    assert counts == {**dict.fromkeys(SHAPES, (4, 0)), "bias": (3, 1), "scale": (3, 0)}


def test_state_for_parameters_of_another_dtype(path):
    params, optimizer = trained()
    save_checkpoint(optimizer, path)
    lower = {name: p.detach().bfloat16().requires_grad_() for name, p in params.items()}
    other = CAME8bit(lower.items())
    with pytest.warns(UserWarning, match="another dtype"):
        report = load_checkpoint(other, path)
    assert "embed: float32 -> bfloat16" in report.dtypes
    same_state(by_name(params, optimizer), by_name(lower, other))


# --- 8 bits and 32 ------------------------------------------------------------------------------


def test_groups_keep_their_own_bits(path):
    params = parameters()
    groups = [
        {"params": [("embed", params["embed"])], "optim_bits": 32},
        {"params": [("odd", params["odd"])]},
    ]
    optimizer = CAME8bit(groups)
    train({name: params[name] for name in ("embed", "odd")}, optimizer, 2)
    save_checkpoint(optimizer, path)
    other = CAME8bit([dict(group) for group in groups])
    report = load_checkpoint(other, path)
    assert not report.converted
    assert_same(snapshot(optimizer), snapshot(other))


def test_state_made_under_other_options_is_kept(path):
    """As in load_state_dict: options that decide the layout may have changed since."""
    params, optimizer = trained(min_8bit_size=0, factored_view="last_two")
    optimizer.param_groups[0].update(min_8bit_size=4096, factored_view="smallest")
    save_checkpoint(optimizer, path)
    other = CAME8bit(copies(params).items())
    load_checkpoint(other, path)
    assert_same(snapshot(optimizer), snapshot(other))


# --- names, groups, options ---------------------------------------------------------------------


def test_groups_are_matched_by_their_parameters(path):
    params = parameters()
    first = {"params": [(n, params[n]) for n in ("embed", "odd")], "lr": 0.25}
    second = {"params": [(n, params[n]) for n in ("bias", "scale")], "lr": 0.5}
    optimizer = CAME8bit([dict(first), dict(second)])
    save_checkpoint(optimizer, path)
    other = CAME8bit([dict(second, lr=1.0), dict(first, lr=1.0)])
    load_checkpoint(other, path)
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.25]
    divided = CAME8bit([{"params": [(n, params[n])]} for n in ("embed", "odd", "bias", "scale")])
    with pytest.raises(CheckpointError, match=r"divided otherwise.*the same groups"):
        load_checkpoint(divided, path)


def test_one_side_without_names_goes_by_position(path):
    params, optimizer = trained()
    save_checkpoint(optimizer, path)
    other = CAME8bit(copies(params).values())
    assert load_checkpoint(other, path).matched_by == "position"
    assert "param_names" not in other.param_groups[0]
    other.add_param_group({"params": [start((3,))]})  # names would be demanded otherwise


def test_names_that_are_not_unique_are_no_names(path):
    twice = {"a": start((5, 6)), "b": start((7,))}
    optimizer = CAME8bit([("w", param) for param in twice.values()])
    train(twice, optimizer, 1)
    save_checkpoint(optimizer, path)
    other = CAME8bit([("w", param) for param in copies(twice).values()])
    assert load_checkpoint(other, path).matched_by == "position"
    assert_same(snapshot(optimizer), snapshot(other))


def test_saved_options_win_and_missing_ones_stay(path):
    params, optimizer = trained(lr=0.5, weight_decay=0.25, clip_threshold=math.inf, seed=2**62 + 1)
    group = optimizer.param_groups[0]
    group["initial_lr"] = 0.75  # what a scheduler writes
    group["betas"] = [0.5, 0.75, np.float32(0.875)]
    del group["cautious"]
    save_checkpoint(optimizer, path)
    other = CAME8bit(copies(params).items(), cautious=True)
    other.param_groups[0]["note"] = "kept"
    report = load_checkpoint(other, path)
    got = other.param_groups[0]
    assert (got["lr"], got["weight_decay"], got["initial_lr"]) == (0.5, 0.25, 0.75)
    assert (got["clip_threshold"], got["seed"]) == (math.inf, 2**62 + 1)
    assert got["betas"] == [0.5, 0.75, 0.875]
    assert got["eps"] == (1e-30, 1e-16)
    assert isinstance(got["eps"], tuple)
    assert (got["note"], got["cautious"]) == ("kept", True)
    assert report.options[0]["lr"] == (2e-4, 0.5)
    assert "eps" not in report.options[0]


@pytest.mark.parametrize("key", [(), 7, None])
def test_options_have_names(path, key):
    _, optimizer = trained()
    optimizer.param_groups[0][key] = 1
    with pytest.raises(CheckpointError, match=r"an option called .*, expected a string"):
        save_checkpoint(optimizer, path)
    assert not path.exists()
    source = path.with_suffix(".pt")
    torch.save(optimizer.state_dict(), source)
    with pytest.raises(CheckpointError, match=f"{source}: group 0: got an option called"):
        convert_checkpoint(source, path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_lr_is_saved_to_the_bit(path, dtype):
    lr = torch.tensor(1 / 3, dtype=dtype)
    params, optimizer = trained(lr=lr)
    save_checkpoint(optimizer, path)
    again = copies(params)
    other = CAME8bit(again.items(), lr=torch.tensor(0.5))
    load_checkpoint(other, path)
    got = other.param_groups[0]["lr"]
    assert same_bits(got, lr)
    got.fill_(7.0)
    assert float(lr) != 7.0
    same_state(by_name(params, optimizer), by_name(again, other))


def test_strings_of_the_caller_are_kept(path):
    params, optimizer = trained()
    save_checkpoint(optimizer, path, metadata={"epoch": "3", "ключ": "значение"})
    report = load_checkpoint(CAME8bit(copies(params).items()), path)
    assert report.metadata == {"epoch": "3", "ключ": "значение"}
    with pytest.raises(CheckpointError, match="expected strings"):
        save_checkpoint(optimizer, path, metadata={"epoch": 3})


def test_what_cannot_be_saved_is_named_before_anything_is_written(path):
    params, optimizer = trained()
    save_checkpoint(optimizer, path)
    content = path.read_bytes()
    optimizer.param_groups[0]["hook"] = print
    with pytest.raises(CheckpointError, match="group 0: option 'hook' is a builtin_function"):
        save_checkpoint(optimizer, path)
    optimizer.param_groups[0]["hook"] = torch.zeros(4096)
    with pytest.raises(CheckpointError, match="at most 4096 bytes"):
        save_checkpoint(optimizer, path)
    del optimizer.param_groups[0]["hook"]
    optimizer.state[params["odd"]]["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"parameter odd .* does not keep"):
        save_checkpoint(optimizer, path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_optimizers_are_refused_with_the_cure(path):
    params, optimizer = trained()

    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

    for function in (save_checkpoint, load_checkpoint):
        with pytest.raises(TypeError, match=r"pass optimizer\.optimizer"):
            function(Wrapper(optimizer), path)
        with pytest.raises(TypeError, match="got a AdamW"):
            function(torch.optim.AdamW(params.values()), path)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CAME8bit, CAME32bit])
def test_the_safetensors_library_reads_it(path, cls):
    params, optimizer = trained(cls)
    save_checkpoint(optimizer, path, metadata={"epoch": "3"})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = json.loads(metadata["parameters"])
    assert [row["name"] for row in rows] == list(SHAPES)
    assert [row["shape"] for row in rows] == [list(shape) for shape in SHAPES.values()]
    assert {(row["step"], row["skipped"]) for row in rows} == {(3, 0)}
    (group,) = json.loads(metadata["groups"])
    assert (group["lr"], group["seed"]) == (1e-3, optimizer.defaults["seed"])
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["user"]) == {"epoch": "3"}
    expected = {
        f"{name}.{buffer}": tensor
        for (name, buffer), tensor in by_name(params, optimizer).items()
        if buffer not in ("step", "skipped")
    }
    same_state(expected, tensors)


# --- wherever the state lives -------------------------------------------------------------------


def test_everything_goes_through_one_parameter_at_a_time(path, tmp_path):
    params, dense = trained()
    save_checkpoint(dense, path)
    elsewhere = Elsewhere(copies(params).items())
    load_checkpoint(elsewhere, path)
    assert len(elsewhere._store.kept) == len(SHAPES)
    save_checkpoint(elsewhere, tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    back = CAME8bit(copies(params).items())
    load_checkpoint(back, tmp_path / "again")
    assert_same(snapshot(dense), snapshot(back))


LARGE = {**SHAPES, "wide": (300, 512), "flat": (20_000,)}  # 64 KiB and more have pages


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bits", [8, 32])
def test_between_dense_and_paged_state(path, tmp_path, bits, dtype):
    """Dense, then in an unnamed file, then in a directory, then dense: as if never interrupted."""
    params, unbroken = trained(CAME, shapes=LARGE, dtype=dtype, optim_bits=bits)
    again, optimizer = params, unbroken
    places = [{"is_paged": True}, {"is_paged": True, "page_dir": tmp_path}, {"is_paged": False}]
    for turn, where in enumerate(places):
        save_checkpoint(optimizer, path)
        again = copies(again)
        optimizer = CAME(again.items(), optim_bits=bits, **where)
        assert not load_checkpoint(optimizer, path).remarks()
        train(again, optimizer, 2, first=3 + 2 * turn)
    train(params, unbroken, 6, first=3)
    same_state(by_name(params, unbroken), by_name(again, optimizer))
    for name, param in params.items():
        assert same_bits(param, again[name]), name


@pytest.mark.parametrize("is_paged", [False, True])
def test_paged_state_is_replaced_and_converted(path, is_paged):
    params, optimizer = trained(CAME32bit, shapes=LARGE)
    save_checkpoint(optimizer, path)
    other_params, other = trained(CAME, 1, LARGE, optim_bits=8, is_paged=is_paged)
    with pytest.warns(UserWarning, match="4 parameters converted from 32 to 8 bits"):
        load_checkpoint(other, path)
    got = by_name(other_params, other)
    codes, absmax = quantize_blockwise(optimizer._store.read(params["wide"])["exp_avg"])
    assert same_bits(got["wide", "exp_avg"], codes)
    assert same_bits(got["wide", "absmax"], absmax)
    empty = CAME8bit(copies(params).items())
    save_checkpoint(empty, path)
    load_checkpoint(other, path)
    assert not by_name(other_params, other)
    train(other_params, other, 1)


def test_a_failure_in_the_middle_says_what_has_changed(path, monkeypatch):
    params, optimizer = trained()
    save_checkpoint(optimizer, path)
    other = CAME8bit(copies(params).items(), lr=0.125)
    write = DenseStore.write

    def failing(limit):
        def write_some(self, param, state):
            if len(self.state) == limit:
                raise MemoryError("no more")
            write(self, param, state)

        return write_some

    before = snapshot(other)
    monkeypatch.setattr(DenseStore, "write", failing(0))
    with pytest.raises(RuntimeError, match=r"no more.*nothing has been changed"):
        load_checkpoint(other, path)
    assert_same(before, snapshot(other))
    monkeypatch.setattr(DenseStore, "write", failing(2))
    with pytest.raises(RuntimeError, match="state of 2 of 7 parameters has been replaced"):
        load_checkpoint(other, path)
    assert other.param_groups[0]["lr"] == 0.125
    monkeypatch.setattr(DenseStore, "write", write)
    load_checkpoint(other, path)
    assert_same(snapshot(optimizer), snapshot(other))
