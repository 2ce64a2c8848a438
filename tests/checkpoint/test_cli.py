"""``came8bit inspect`` and ``came8bit convert``."""

import json
import math
import os
import warnings

import pytest
import torch
from came_pytorch import CAME as OfficialCAME
from checkpoints import SHAPES, copies, parameters, train, trained
from processes import run_python
from training import assert_same, snapshot

from came8bit import CAME8bit, CAME32bit, inspect_checkpoint, load_checkpoint, save_checkpoint
from came8bit.cli import main


@pytest.fixture
def path(tmp_path):
    _, optimizer = trained(clip_threshold=math.inf, lr=torch.tensor(0.25))
    save_checkpoint(optimizer, tmp_path / "x.safetensors", metadata={"epoch": "3"})
    return tmp_path / "x.safetensors"


def test_inspect_shows_what_is_there(path, capsys):
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(None, 1) for line in lines if len(line.split(None, 1)) == 2)
    assert rows["kind"].startswith("checkpoint, format 1, written by came8bit ")
    assert rows["bytes"].startswith(f"{path.stat().st_size:,}, ")
    assert rows["checksums"] == "correct"
    assert rows["metadata"].split() == ["epoch", "3"]
    assert (rows["lr"], rows["clip_threshold"], rows["optim_bits"]) == ("0.25", "inf", "8")
    table = {line.split()[1]: line.split()[2:] for line in lines[-len(SHAPES) :]}
    assert table["embed"][:4] == ["64×96", "float32", "0", "3"]
    assert table["embed"][5:8] == ["8", "bits", "1×64×96"]
    assert table["scale"][:2] == ["scalar", "float32"]
    assert "unfactored" in table["column"]
    assert list(table) == list(SHAPES)


def test_inspect_as_json(path, capsys):
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts == json.loads(json.dumps(inspect_checkpoint(path)))
    assert facts["verified"] is True
    assert facts["groups"][0]["options"]["clip_threshold"] == "inf"
    assert [one["name"] for one in facts["parameters"]] == list(SHAPES)
    assert facts["state_bytes"] == sum(one["bytes"] for one in facts["parameters"])


def test_inspect_finds_damage(path, capsys):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    assert "WRONG: " in capsys.readouterr().out
    assert main(["inspect", "--json", str(path)]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] is False
    assert "parameter odd is damaged" in facts["damage"]
    assert main(["inspect", "--no-verify", str(path)]) == 0
    assert "not compared" in capsys.readouterr().out
    path.write_bytes(content[:-1])
    assert main(["inspect", str(path)]) == 2
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["convert"]])
def test_files_that_are_not_there(command, tmp_path, capsys):
    files = [str(tmp_path / "nothing"), str(tmp_path / "new")][: 1 + (command == ["convert"])]
    assert main([*command, *files]) == 2
    assert "No such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_pipes_are_refused_and_not_waited_for(command, tmp_path):
    """In a process of its own, which would otherwise wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    arguments = [command, "pipe", *(["new"] if command == "convert" else [])]
    done = run_python("-m", "came8bit", *arguments, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "pipe: got a pipe or a device, expected a file" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("bits", [8, 32])
def test_convert_reads_what_torch_saved(tmp_path, capsys, bits):
    params, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    command = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "y"), "--optim-bits", str(bits)]
    assert main(command) == 0
    assert "(state_dict, " in capsys.readouterr().out
    cls = {8: CAME8bit, 32: CAME32bit}[bits]
    direct, converted = cls(copies(params).items()), cls(copies(params).items())
    load_checkpoint(converted, tmp_path / "y")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the conversion
        load_checkpoint(direct, tmp_path / "x.pt")
    assert_same(snapshot(direct), snapshot(converted))
    if bits == 8:
        assert_same(snapshot(optimizer), snapshot(converted))


def test_convert_writes_the_other_bits(path, tmp_path, capsys):
    out = tmp_path / "y.safetensors"
    assert main(["convert", str(path), str(out), "--optim-bits", "32"]) == 0
    assert "momentum of 3 converted" in capsys.readouterr().out
    facts = inspect_checkpoint(out)
    assert {one["momentum_bits"] for one in facts["parameters"]} == {32}
    assert facts["groups"][0]["options"]["optim_bits"] == 32
    assert facts["metadata"] == {"epoch": "3"}
    content = out.read_bytes()
    assert main(["convert", str(path), str(out), "--optim-bits", "8"]) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == content
    assert main(["convert", str(out), str(out), "--optim-bits", "8", "--force"]) == 0
    assert out.read_bytes() == path.read_bytes()  # to 32 bits and back is exact


def test_convert_imports_came_pytorch(tmp_path, capsys):
    params = parameters()
    optimizer = OfficialCAME(params.items(), lr=1e-3)
    train(params, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    assert "state dict of came-pytorch" in capsys.readouterr().out
    command = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "y"), "--optim-bits", "8"]
    assert main(command) == 0
    assert "(came-pytorch, " in capsys.readouterr().out
    again = copies(params)
    other = CAME8bit(again.items())
    assert load_checkpoint(other, tmp_path / "y").loaded == len(SHAPES)
    train(again, other, 1)


def test_convert_refuses_a_damaged_file_and_writes_nothing(path, tmp_path, capsys):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "y"), "--optim-bits", "32"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
