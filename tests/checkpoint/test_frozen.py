"""Parameters that never train, such as those of a 4-bit model beside adapters."""

import pytest
import torch
from training import with_gradient

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
