"""Saving momentum on one rung and loading it on any other, from a file and from a state dict."""

import itertools

import pytest
import torch
from training import assert_same, gradients, run, same_bits, snapshot, start

from came8bit import (
    CAME,
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from came8bit.reference.rungs import Momentum

SHAPE = (6, 5, 50)

pytestmark = pytest.mark.filterwarnings("ignore:came8bit's compiled kernels", "ignore:load_")


def momentum(state):
    scales = state.get("absmax", state.get("scales"))
    return Momentum(state["exp_avg"], scales, SHAPE).load()


def trained(bits, steps, paged=False):
    param = start(SHAPE)
    optimizer = CAME([param], lr=1e-3, optim_bits=bits, min_8bit_size=0, is_paged=paged)
    run(optimizer, param, list(gradients(SHAPE, steps=steps)))
    return optimizer


@pytest.mark.parametrize(("source", "target"), list(itertools.product([32, 8, 4, 2, 0], repeat=2)))
def test_every_rung_loads_from_every_other(source, target, tmp_path):
    optimizer = trained(source, 3)
    path = tmp_path / "state.safetensors"
    save_checkpoint(optimizer, path)
    saved = optimizer.state_dict()["state"][0]
    from_file, from_dict = trained(target, 0, paged=True), trained(target, 0)
    load_checkpoint(from_file, path)
    from_dict.load_state_dict(optimizer.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    from_torch_file = trained(target, 0)
    load_checkpoint(from_torch_file, tmp_path / "state.pt")
    assert_same(snapshot(from_dict), snapshot(from_torch_file))
    got = from_file.state_dict()["state"][0]
    for name, value in from_dict.state_dict()["state"][0].items():
        assert same_bits(got[name], value), name
    error = (momentum(got) - momentum(saved)).norm() / momentum(saved).norm().clamp(min=1e-30)
    assert error <= {32: 0.0, 8: 0.02, 4: 0.2, 2: 0.6, 0: 1.0}[target]
    report = convert_checkpoint(path, tmp_path / "converted", optim_bits=target)
    from_converted = trained(target, 0)
    load_checkpoint(from_converted, tmp_path / "converted")
    assert_same(snapshot(from_dict), snapshot(from_converted))
    assert report.errors.get("0", 0.0) == pytest.approx(float(error), rel=1e-5)
    assert set(report.errors) == ({"0"} if target not in (32, source) else set())
    if target == 32:  # and back is exact
        back = trained(source, 0)
        back.load_state_dict(from_dict.state_dict())
        for name, value in back.state_dict()["state"][0].items():
            assert same_bits(saved[name], value), name


def test_packed_codes_of_a_state_dict_need_their_parameter(tmp_path):
    torch.save(trained(4, 2).state_dict(), tmp_path / "x.pt")
    assert inspect_checkpoint(tmp_path / "x.pt")["parameters"][0]["step"] == 2
    with pytest.raises(CheckpointError, match=r"codes of parameter 0 are packed.*save_checkpoint"):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "y", optim_bits=8)


def test_a_code_of_nan_is_refused():
    saved = trained(4, 2).state_dict()
    saved["state"][0]["exp_avg"][2, 3] = 0x81
    with pytest.raises(ValueError, match="exp_avg has codes of NaN"):
        trained(4, 0).load_state_dict(saved)
