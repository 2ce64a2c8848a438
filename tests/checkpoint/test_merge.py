"""Saved state meets an optimizer: the same rules for a state dict, its file, and a checkpoint."""

import copy
import warnings

import pytest
import torch
from came_pytorch import CAME as OfficialCAME
from checkpoints import SHAPES, by_name, copies, parameters, train, trained
from training import assert_same, same_bits, snapshot

from came8bit import (
    CAME,
    CAME8bit,
    CAME32bit,
    dequantize_blockwise,
    inspect_checkpoint,
    load_checkpoint,
    quantize_blockwise,
    save_checkpoint,
)
from came8bit.state_dict import values


def from_dict(optimizer, edit=None, path=None):
    """A function that loads the edited state dict of ``optimizer`` into another one."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    if edit:
        edit(state_dict)
    return lambda other, **options: other.load_state_dict(state_dict, **options)


def from_torch_file(optimizer, edit=None, path=None):
    state_dict = copy.deepcopy(optimizer.state_dict())
    if edit:
        edit(state_dict)
    torch.save(state_dict, path)
    return lambda other, **options: load_checkpoint(other, path, **options)


def from_checkpoint(optimizer, edit=None, path=None):
    """The edit has to be made to the optimizer, as far as it lets that happen."""
    if edit:
        again = type(optimizer)(copies(named(optimizer)).items())
        state_dict = copy.deepcopy(optimizer.state_dict())
        edit(state_dict)
        for key, param in zip(
            optimizer.state_dict()["param_groups"][0]["params"],
            again.param_groups[0]["params"],
            strict=True,
        ):
            again.state[param] = state_dict["state"][key]
        again.param_groups[0].update(
            {k: v for k, v in state_dict["param_groups"][0].items() if k != "params"}
        )
        optimizer = again
    save_checkpoint(optimizer, path)
    return lambda other, **options: load_checkpoint(other, path, **options)


def named(optimizer):
    return {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


WAYS = [from_dict, from_torch_file, from_checkpoint]


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    return lambda optimizer, edit=None: request.param(optimizer, edit, tmp_path / "x")


# --- momentum in other bits -----------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(CAME32bit, CAME8bit), (CAME8bit, CAME32bit)])
@pytest.mark.parametrize(("is_paged", "piece"), [(False, 500), (True, 1 << 20)])
def test_momentum_is_converted(way, source, target, is_paged, piece, monkeypatch):
    """And nothing else; in pieces of any size, as the whole tensor would be."""
    monkeypatch.setattr(values, "_ELEMENTS", piece)
    params, optimizer = trained(source)
    again = copies(params)
    bits = target(again.items()).param_groups[0]["optim_bits"]
    other = CAME(again.items(), optim_bits=bits, is_paged=is_paged)
    with pytest.warns(UserWarning, match="momentum of 3 parameters converted from") as told:
        report = way(optimizer)(other)
    assert told[0].filename == __file__
    assert other.param_groups[0]["optim_bits"] == bits
    coded = ["embed", "experts", "odd"]
    assert report is None or report.converted == {f"{40 - bits} to {bits} bits": coded}
    saved, got = by_name(params, optimizer), by_name(again, other)
    for name in coded:
        if bits == 8:
            codes, absmax = quantize_blockwise(saved[name, "exp_avg"])
            assert same_bits(got[name, "exp_avg"], codes)
            assert same_bits(got[name, "absmax"], absmax)
        else:
            full = dequantize_blockwise(saved[name, "exp_avg"], saved[name, "absmax"])
            assert same_bits(got[name, "exp_avg"], full)
            assert (name, "absmax") not in got
    rest = [k for k in saved if k[1] not in ("exp_avg", "absmax")]
    assert all(same_bits(saved[key], got[key]) for key in rest)
    train(again, other, 1)


# --- names ----------------------------------------------------------------------------------------


def test_parameters_are_matched_by_name(way):
    shapes = {"a": (64, 96), "b": (64, 96), "c": (7,)}
    params, optimizer = trained(shapes=shapes)
    again = copies(params, ["b", "c", "a"])
    other = CAME8bit(again.items())
    with pytest.warns(UserWarning, match="another position"):
        report = way(optimizer)(other)
    assert report is None or report.matched_by == "name"
    assert report is None or set(report.moved) == set(shapes)
    assert other.param_groups[0]["param_names"] == list(again)
    saved, got = by_name(params, optimizer), by_name(again, other)
    assert saved.keys() == got.keys()
    assert all(same_bits(saved[key], got[key]) for key in saved)


def test_other_names_in_a_state_dict_are_taken_over_with_a_warning():
    """As in torch, which compares no names."""
    params, optimizer = trained(shapes={"a": (64, 96), "b": (7,)})
    other = CAME8bit(zip(["c", "b"], copies(params).values(), strict=True))
    with pytest.warns(UserWarning, match=r"1 parameters were told apart by their order.* \(c\)"):
        other.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(optimizer), snapshot(other))


def test_what_both_have_is_loaded_on_request(way):
    """Full training, then a part of its parameters and new ones."""
    params, optimizer = trained()
    again = copies({name: params[name] for name in ("embed", "odd", "bias")})
    fresh = {"lora": torch.zeros(8, 8, requires_grad=True)}
    other = CAME8bit([*again.items(), *fresh.items()])
    load = way(optimizer)
    before = snapshot(other)
    for options in ({}, {"allow_missing": True}, {"allow_unused": True}):
        with pytest.raises(ValueError, match="not saved: lora; not in the optimizer: scale, "):
            load(other, **options)
        assert_same(before, snapshot(other))
    with pytest.warns(UserWarning, match="start without state") as told:
        report = load(other, allow_missing=True, allow_unused=True)
    text = str(told[0].message)
    assert "1 parameters start without state (lora)" in text
    assert "4 saved ones were left out (scale, column, conv, experts)" in text
    if report is not None:
        assert list(report.missing) == ["lora"]
        assert list(report.unused) == ["scale", "column", "conv", "experts"]
        assert (report.loaded, report.without_state) == (3, 1)
    saved, got = by_name(params, optimizer), by_name(again, other)
    assert {name for name, _ in got} == set(again)
    assert all(same_bits(saved[key], got[key]) for key in got)
    assert not other.state.get(fresh["lora"])
    train({**again, **fresh}, other, 1)


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_a_parameter_of_another_shape_starts_without_state_on_request(way, bits):
    """More tokens, for example."""
    params, optimizer = trained(CAME, optim_bits=bits)
    rows, columns = params["embed"].shape
    again = {**copies(params), "embed": torch.zeros(rows + 8, columns, requires_grad=True)}
    other = CAME(again.items(), optim_bits=bits)
    load, before = way(optimizer), snapshot(other)
    for options in ({}, {"allow_unused": True}):
        with pytest.raises(ValueError, match=rf"embed.*\({rows + 8}, {columns}\)"):
            load(other, **options)
        assert_same(before, snapshot(other))
    with pytest.warns(UserWarning, match=r"1 parameters start without state \(embed\)"):
        load(other, allow_missing=True)
    assert set(other.state) == set(again.values()) - {again["embed"]}
    train(again, other, 1)


def test_groups_that_are_new_or_gone(way):
    params = parameters()
    halves = [["embed", "bias"], ["odd", "scale"]]
    optimizer = CAME8bit(
        [
            {"params": [(n, params[n]) for n in half], "lr": lr}
            for half, lr in zip(halves, (0.25, 0.5), strict=True)
        ]
    )
    train({n: params[n] for half in halves for n in half}, optimizer, 1)
    load = way(optimizer)
    again = copies(params)
    other = CAME8bit(
        [
            {"params": [("conv", again["conv"])], "lr": 0.75},
            {"params": [("odd", again["odd"]), ("scale", again["scale"])], "lr": 1.0},
        ]
    )
    with pytest.warns(UserWarning, match="left out"):
        load(other, allow_missing=True, allow_unused=True)
    assert [group["lr"] for group in other.param_groups] == [0.75, 0.5]
    assert set(other.state) == {again["odd"], again["scale"]}


def test_without_names_the_order_decides_and_nothing_is_left_out(way):
    params, optimizer = trained()
    other = CAME8bit(list(copies(params).values())[:-1])
    with pytest.raises(ValueError, match=r"groups of \[7\] parameters, expected groups of \[6\]"):
        way(optimizer)(other)
    with pytest.raises(ValueError, match=r"parts of a state need named_parameters\(\) on both"):
        way(optimizer)(other, allow_missing=True, allow_unused=True)


def test_nothing_in_common_is_refused_whatever_is_allowed(way):
    _, optimizer = trained()
    other = CAME8bit([("lora", torch.zeros(8, 8, requires_grad=True))])
    with pytest.raises(ValueError, match="over the model that was saved; nothing has been"):
        way(optimizer)(other, allow_missing=True, allow_unused=True)


# --- what tools do to a state ---------------------------------------------------------------------


def test_a_version_that_one_group_lost_is_that_of_the_others(tmp_path):
    params = parameters()
    optimizer = CAME8bit([{"params": [(name, param)]} for name, param in params.items()])
    train(params, optimizer, 1)
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][2]["format_version"]
    other = CAME8bit([{"params": [item]} for item in copies(params).items()])
    other.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), snapshot(other))
    torch.save(state_dict, tmp_path / "x.pt")
    load_checkpoint(other, tmp_path / "x.pt")
    assert_same(snapshot(optimizer), snapshot(other))
    del optimizer.param_groups[2]["format_version"]  # a checkpoint has it all the same
    save_checkpoint(optimizer, tmp_path / "x")
    load_checkpoint(other, tmp_path / "x")
    state_dict["param_groups"][0]["format_version"] = 2
    with pytest.raises(ValueError, match="group 0 has format_version 2"):
        other.load_state_dict(state_dict)


COUNTS = [
    (5, 5),
    (5.0, 5),
    (torch.tensor(5.0), 5),
    (torch.tensor(5, dtype=torch.int32), 5),
    (torch.tensor(5.5), None),
    (torch.tensor([5]), None),
    (torch.tensor(float("inf")), None),
    (torch.tensor(float("nan")), None),
    (float("nan"), None),
    (-1, None),
    (True, None),
    (2**53, None),
    (1e300, None),
    ("5", None),
    (None, None),
]


@pytest.mark.parametrize(("value", "count"), COUNTS, ids=str)
@pytest.mark.parametrize("name", ["step", "skipped"])
@pytest.mark.parametrize("load_from", [from_dict, from_torch_file])
def test_counts_are_whole_numbers(load_from, name, value, count, tmp_path):
    params, optimizer = trained(shapes={"w": (5, 6)})
    other = CAME8bit(copies(params).items())
    load = lambda: load_from(  # noqa: E731
        optimizer, lambda saved: saved["state"][0].update({name: value}), tmp_path / "x"
    )(other)
    if count is None:
        with pytest.raises(ValueError, match=rf"{name} = .*expected a count"):
            load()
        assert not other.state
        return
    load()
    (state,) = other.state.values()
    assert state[name].dtype == torch.int64
    assert int(state[name]) == count


def test_states_of_no_parameter_are_ignored_on_request(tmp_path):
    """Wrappers keep their own in the dict of what they wrap."""
    params, optimizer = trained()
    state_dict = optimizer.state_dict()
    state_dict["state"]["trac"] = {"betas": torch.ones(3)}
    torch.save(state_dict, tmp_path / "x.pt")
    other = CAME8bit(copies(params).items())
    for load in (
        lambda **options: other.load_state_dict(state_dict, **options),
        lambda **options: load_checkpoint(other, tmp_path / "x.pt", **options),
    ):
        with pytest.raises(ValueError, match=r"state for .*trac"):
            load()
        with pytest.warns(UserWarning, match=r"1 saved ones were left out \(trac\)"):
            load(allow_unused=True)
        assert_same(snapshot(optimizer), snapshot(other))


def test_options_may_be_anything_but_accepted(tmp_path):
    params, optimizer = trained(shapes={"w": (5, 6)})
    other = CAME8bit(copies(params).items())
    strange = (torch.empty(0), torch.ones(3), [torch.ones(2)], {}, 10**400, "8", None, object)
    for key in ("optim_bits", "rounding", "lr", "betas", "clip_threshold", "seed", "cautious"):
        for value in strange:
            state_dict = copy.deepcopy(optimizer.state_dict())
            state_dict["param_groups"][0][key] = value
            with pytest.raises(ValueError, match="group 0: "):
                other.load_state_dict(state_dict)
    assert not other.state


# --- values that no step goes on from -------------------------------------------------------------

FAULTS = {
    "infinite statistics": ("exp_avg_sq_row", torch.inf, "infinite values"),
    "NaN statistics": ("exp_avg_res_col", torch.nan, "NaN"),
    "negative statistics": ("exp_avg_sq_col", -1.0, "negative values"),
    "NaN momentum": ("exp_avg", torch.nan, "NaN"),
    "negative scale": ("absmax", -1.0, "negative values"),
    "infinite scale": ("absmax", torch.inf, "infinite values"),
    "NaN codes": ("exp_avg", -128, "codes of NaN"),
    "NaN ratio": ("rms_ratio", torch.nan, "NaN"),
    "huge momentum": ("exp_avg", -1e14, r"values of 1e\+14, with which a step overflows"),
    "huge scale": ("absmax", 3e38, r"values of 3e\+38"),
    "huge statistics": ("exp_avg_res_row", 3e38, r"values of 3e\+38"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_that_cannot_be_continued_is_refused_by_name(way, fault, tmp_path):
    buffer, value, said = FAULTS[fault]
    cls = CAME8bit if buffer == "absmax" or value == -128 else CAME32bit
    params, optimizer = trained(cls)

    def spoil(state_dict):
        state_dict["state"][0][buffer].view(-1)[-1:] = value

    again = copies(params)
    other = cls(again.items())
    load = way(optimizer, spoil)
    with pytest.raises(ValueError, match=f"embed cannot be continued: {buffer} has {said}"):
        load(other)
    assert not other.state
    with pytest.warns(UserWarning, match=r"1 parameters start without state \(embed\)"):
        load(other, allow_missing=True)
    assert set(other.state) == set(again.values()) - {again["embed"]}
    train(again, other, 1)


def test_nan_that_is_meant_is_kept_with_a_warning(way):
    params, optimizer = trained(CAME32bit, nonfinite="propagate")
    params["embed"].grad = torch.full(SHAPES["embed"], torch.nan)
    optimizer.step()
    other = CAME32bit(copies(params).items())
    with pytest.warns(UserWarning, match="embed: .* is not finite"):
        way(optimizer)(other)
    assert_same(snapshot(optimizer), snapshot(other))


def test_the_state_of_came_pytorch_after_an_infinite_gradient(tmp_path):
    params = parameters({"embed": (64, 96), "bias": (7,)})
    official = OfficialCAME(params.items(), lr=1e-3)
    params["embed"].grad = torch.ones(64, 96)
    params["embed"].grad[3, 4] = torch.inf
    official.step()
    torch.save(official.state_dict(), tmp_path / "x.pt")
    assert "embed" in inspect_checkpoint(tmp_path / "x.pt")["faults"]
    other = CAME32bit(copies(params).items())
    with pytest.raises(ValueError, match="parameter embed cannot be continued: exp_avg"):
        load_checkpoint(other, tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = load_checkpoint(other, tmp_path / "x.pt", allow_missing=True)
    assert list(report.missing) == ["embed"]


def test_names_cannot_forge_what_is_printed(way):
    evil = "evil\x1b[2J\nlayer: all is well\u202e"
    params, optimizer = trained(CAME32bit, shapes={evil: (64, 96)})
    other = CAME8bit(copies(params).items())
    with pytest.warns(UserWarning, match="converted") as told:
        way(optimizer)(other)
    other = CAME8bit([("w", params[evil])])
    with pytest.raises(ValueError, match=r"evil\\x1b\[2J\\nlayer") as caught:
        way(optimizer)(other, allow_unused=True)
    for text in (str(told[0].message), str(caught.value)):
        assert text.isprintable()
