"""State of came-pytorch: continued where it can be, refused with the cure where it cannot."""

import warnings

import pytest
import torch
from came_pytorch import CAME as OfficialCAME
from checkpoints import SHAPES as ALL_SHAPES
from checkpoints import copies, parameters, train, trained
from tolerances import PARITY_DISTANCE, PARITY_PARAM
from training import assert_same, same_bits, snapshot, start

from came8bit import (
    CAME8bit,
    CAME32bit,
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    quantize_blockwise,
    save_checkpoint,
)

SHAPES = {name: shape for name, shape in ALL_SHAPES.items() if name != "odd"}
PLAIN = {name: SHAPES[name] for name in ("embed", "bias", "scale", "experts")}
OPTIONS = {"lr": 3e-4, "betas": (0.8, 0.99, 0.999), "eps": (1e-20, 1e-12), "weight_decay": 0.01}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "official.pt"


def official(path, shapes=SHAPES, named=True, dtype=torch.float32, steps=3):
    """Parameters and optimizer of came-pytorch; its state dict is at ``path``."""
    params = parameters(shapes, dtype)
    optimizer = OfficialCAME(
        params.items() if named else params.values(), clip_threshold=0.5, **OPTIONS
    )
    train(params, optimizer, steps)
    torch.save(optimizer.state_dict(), path)
    return params, optimizer


@pytest.mark.parametrize("named", [True, False])
def test_training_goes_on_as_it_would_have(path, named):
    params, theirs = official(path, named=named)
    again = copies(params)
    ours = CAME32bit(again.items() if named else again.values(), factored_view="last_two")
    report = load_checkpoint(ours, path)
    assert (report.kind, report.loaded) == ("came-pytorch", len(SHAPES))
    assert report.matched_by == ("name" if named else "position")
    group = ours.param_groups[0]
    assert {name: group[name] for name in OPTIONS} == OPTIONS
    assert group["clip_threshold"] == 0.5
    for name, param in params.items():
        state, saved = ours._store.read(again[name]), theirs.state[param]
        assert int(state["step"]) == 3
        for buffer in set(saved) - {"step", "RMS"}:
            assert same_bits(state[buffer].flatten(), saved[buffer].flatten()), (name, buffer)
    start = copies(params)
    train(params, theirs, 20, first=3)
    train(again, ours, 20, first=3)
    for name, param in params.items():
        difference = (again[name] - param).norm()
        travelled = (param - start[name]).norm()
        assert difference <= PARITY_PARAM * param.norm() + PARITY_DISTANCE * travelled, name


def test_momentum_is_converted_for_an_8_bit_optimizer(path):
    params, theirs = official(path, PLAIN)
    again = copies(params)
    ours = CAME8bit(again.items())
    with pytest.warns(UserWarning, match="2 parameters converted from 32 to 8 bits"):
        report = load_checkpoint(ours, path)
    assert report.converted == {"32 to 8 bits": ["embed", "experts"]}
    assert ours.param_groups[0]["factored_view"] == "smallest"  # makes no difference here
    codes, absmax = quantize_blockwise(theirs.state[params["embed"]]["exp_avg"])
    got = ours._store.read(again["embed"])
    assert same_bits(got["exp_avg"], codes)
    assert same_bits(got["absmax"], absmax)
    train(again, ours, 1)


def test_other_views_are_refused_with_the_cure(path):
    params, _ = official(path)
    ours = CAME32bit(copies(params).items())
    before = snapshot(ours)
    with pytest.raises(CheckpointError, match=r'column .*conv .*factored_view="last_two"'):
        load_checkpoint(ours, path)
    assert_same(before, snapshot(ours))
    official(path, {"conv": SHAPES["conv"]}, steps=0)
    load_checkpoint(CAME32bit([("conv", start(SHAPES["conv"]))]), path)  # there is no state yet


def test_bf16_training_and_a_state_that_torch_has_cast(path):
    """came-pytorch keeps fp32, until torch's load_state_dict casts it to the parameters' dtype."""
    params, theirs = official(path, PLAIN, dtype=torch.bfloat16)
    theirs.load_state_dict(theirs.state_dict())
    assert theirs.state[params["embed"]]["exp_avg"].dtype == torch.bfloat16
    torch.save(theirs.state_dict(), path)
    again = copies(params)
    ours = CAME32bit(again.items())
    load_checkpoint(ours, path)
    got = ours._store.read(again["embed"])["exp_avg"]
    assert same_bits(got, theirs.state[params["embed"]]["exp_avg"].float())
    train(again, ours, 1)


def test_parameters_without_state(path):
    params = parameters(PLAIN)
    theirs = OfficialCAME(params.items(), **OPTIONS)
    params["embed"].grad = torch.ones(SHAPES["embed"])
    theirs.step()
    torch.save(theirs.state_dict(), path)
    report = load_checkpoint(CAME32bit(copies(params).items()), path)
    assert (report.loaded, report.without_state) == (1, 3)
    facts = inspect_checkpoint(path)
    assert [one["shape"] for one in facts["parameters"]] == [[64, 96], None, None, None]
    convert_checkpoint(path, path.with_suffix(".st"))
    report = load_checkpoint(CAME32bit(copies(params).items()), path.with_suffix(".st"))
    assert (report.loaded, report.without_state) == (1, 3)


@pytest.mark.parametrize("bits", [8, 32])
def test_the_detour_through_a_file_is_the_same(path, tmp_path, bits):
    params, _ = official(path)
    cls = {8: CAME8bit, 32: CAME32bit}[bits]
    direct = cls(copies(params).items(), factored_view="last_two")
    with_detour = cls(copies(params).items())
    report = convert_checkpoint(path, tmp_path / "x", optim_bits=bits)
    assert report.kind == "came-pytorch"
    assert report.bytes_written == (tmp_path / "x").stat().st_size
    load_checkpoint(with_detour, tmp_path / "x")
    assert with_detour.param_groups[0]["factored_view"] == "last_two"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the conversion
        load_checkpoint(direct, path)
    assert_same(snapshot(direct), snapshot(with_detour))


@pytest.mark.parametrize("bits", [8, 32])
def test_converting_a_checkpoint_is_what_loading_would_do(tmp_path, bits):
    other = {8: 32, 32: 8}[bits]
    classes = {8: CAME8bit, 32: CAME32bit}
    params, optimizer = trained(classes[bits])
    save_checkpoint(optimizer, tmp_path / "x", metadata={"epoch": "3"})
    report = convert_checkpoint(tmp_path / "x", tmp_path / "y", optim_bits=other)
    assert report.converted == ["embed", "experts", "odd"]
    loaded = classes[other](copies(params).items())
    with pytest.warns(UserWarning, match="converted"):
        load_checkpoint(loaded, tmp_path / "x")
    converted = classes[other](copies(params).items())
    assert load_checkpoint(converted, tmp_path / "y").metadata == {"epoch": "3"}
    assert_same(snapshot(loaded), snapshot(converted))
    content = (tmp_path / "x").read_bytes()
    convert_checkpoint(tmp_path / "x", tmp_path / "x")  # onto itself, nothing to do
    assert (tmp_path / "x").read_bytes() == content
    with pytest.raises(ValueError, match="optim_bits 5"):
        convert_checkpoint(tmp_path / "x", tmp_path / "y", optim_bits=5)


WRONG = {
    "another shape": lambda state, group: state.update(exp_avg=torch.zeros(10, 9)),
    "a missing buffer": lambda state, group: state.pop("exp_avg_res_row"),
    "a buffer too many": lambda state, group: state.update(max_exp_avg=torch.zeros(3)),
    "integers": lambda state, group: state.update(exp_avg=state["exp_avg"].int()),
    "a negative step": lambda state, group: state.update(step=-1),
    "half a step": lambda state, group: state.update(step=1.5),
    "no tensor": lambda state, group: state.update(exp_avg=3),
    "two betas": lambda state, group: group.update(betas=(0.9, 0.99)),
    "bad betas": lambda state, group: group.update(betas=(0.9, 0.99, 1.0)),
    "an option is missing": lambda state, group: group.pop("eps"),
    "names are missing": lambda state, group: group["param_names"].pop(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_dict_that_is_not_came_pytorchs_is_refused(path, name):
    params, theirs = official(path, {"m": (9, 10), "v": (3,)})
    table = theirs.state_dict()
    WRONG[name](table["state"][0], table["param_groups"][0])
    torch.save(table, path)
    ours = CAME32bit(copies(params).items())
    before = snapshot(ours)
    with pytest.raises(CheckpointError):
        load_checkpoint(ours, path)
    assert_same(before, snapshot(ours))
