"""Parameters that never train, such as those of a 4-bit model beside adapters."""

import pytest
import torch
from checkpoints import by_name, copies, train
from training import start, with_gradient

from came8bit import (
    CAME,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("paged", [False, True])
def test_frozen_parameters_of_any_dtype_keep_their_place(tmp_path, dtype, paged):
    def made():
        frozen = torch.nn.Parameter(torch.zeros(10, 4).to(dtype), requires_grad=False)
        return CAME([frozen, with_gradient(64, 80)], optim_bits=8, is_paged=paged)

    optimizer = made()
    optimizer.step()
    save_checkpoint(optimizer, tmp_path / "x")
    convert_checkpoint(tmp_path / "x", tmp_path / "y")
    for path in (tmp_path / "x", tmp_path / "y"):
        rows = inspect_checkpoint(path)["parameters"]
        assert [row["dtype"] for row in rows] == [str(dtype)[6:], "float32"]
        other = made()
        load_checkpoint(other, path)
        saved, loaded = optimizer.state_dict()["state"], other.state_dict()["state"]
        assert saved.keys() == loaded.keys() == {1}
        assert all(torch.equal(value, loaded[1][name]) for name, value in saved[1].items())


def test_on_the_meta_device_only_what_has_state_is_refused(tmp_path):
    """Frozen weights that are offloaded have none, and the rest of the model is loaded."""
    params = {"base": start((9, 10)).requires_grad_(False), "adapter": start((9, 10))}
    optimizer = CAME(params.items(), optim_bits=8)
    train({"adapter": params["adapter"]}, optimizer, 2)
    save_checkpoint(optimizer, tmp_path / "x")

    offloaded = {"base": params["base"].to("meta"), "adapter": copies(params)["adapter"]}
    other = CAME(offloaded.items(), optim_bits=8)
    assert load_checkpoint(other, tmp_path / "x").loaded == 1
    got, saved = by_name(offloaded, other), by_name(params, optimizer)
    assert got.keys() == saved.keys()
    assert all(torch.equal(value, got[key]) for key, value in saved.items())

    nowhere = {"base": params["base"], "adapter": params["adapter"].detach().to("meta")}
    with pytest.raises(NotImplementedError, match="adapter is on meta"):
        load_checkpoint(CAME(nowhere.items(), optim_bits=8), tmp_path / "x")
