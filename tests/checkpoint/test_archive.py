"""Archives of torch.save whose bytes are not the numbers they stand for, and pickles that lie."""

import struct
import zipfile

import pytest
import torch
from came_pytorch import CAME as OfficialCAME
from checkpoints import copies, parameters, train
from training import assert_same, same_bits, snapshot

from came8bit import CAME8bit, CAME32bit, CheckpointError, convert_checkpoint, load_checkpoint
from came8bit.checkpoint.archive import Archive, StoredTensor

SHAPES = {"m": (9, 10), "v": (3,)}


@pytest.fixture(scope="module")
def official():
    """Parameters and optimizer of came-pytorch, after two steps."""
    params = parameters(SHAPES)
    optimizer = OfficialCAME(params.items(), lr=1e-3)
    train(params, optimizer, 2)
    return params, optimizer


@pytest.fixture
def path(official, tmp_path):
    torch.save(official[1].state_dict(), tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.fixture
def refused(official, tmp_path):
    """A function that expects a file to be refused by everything that reads it."""
    before = CAME32bit(copies(official[0]).items())

    def check(path, message):
        optimizer = CAME32bit(copies(official[0]).items())
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(optimizer, path)
        assert str(caught.value).startswith(f"{path}: ")
        assert_same(snapshot(before), snapshot(optimizer))
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    return check


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def test_every_tensor_is_what_torch_load_gives(official, path):
    """The oracle; views and strides included."""
    flat = torch.arange(24.0)
    view = flat.view(4, 6)
    things = {
        **official[1].state_dict(),
        "views": [
            torch.complex(view, -view).imag,
            view[1:],
            view.t(),
            view[:, ::2],
            flat[5],
            flat[:0],
            view[2:, 3],
        ],
        "dtypes": [
            torch.tensor([1, 0, 3]).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
        ],
        "parameter": torch.nn.Parameter(view),
    }
    for protocol in (2, 3, 4, 5):
        torch.save(things, path, pickle_protocol=protocol)
        expected = torch.load(path, weights_only=protocol < 4)
        with open(path, "rb") as file:
            archive = Archive(file)
            same_tree(expected, archive.load(), archive)


def same_tree(expected, found, archive):
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, StoredTensor)
        assert same_bits(expected.detach(), archive.read(found))
    elif isinstance(expected, dict):
        assert list(expected) == list(found)
        for key, value in expected.items():
            same_tree(value, found[key], archive)
    elif isinstance(expected, (list, tuple)):
        assert type(expected) is type(found)
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            same_tree(one, other, archive)
    else:
        assert expected == found


def test_an_archive_that_was_written_again_loads_the_same(official, path):
    """Stored plainly it is what it was; nothing depends on alignment."""
    optimizer = CAME32bit(copies(official[0]).items())
    load_checkpoint(optimizer, path)
    write(path, members(path))
    again = CAME32bit(copies(official[0]).items())
    load_checkpoint(again, path)
    assert_same(snapshot(optimizer), snapshot(again))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused(path, refused, method):
    contents = members(path)
    name = next(name for name in contents if name.endswith("data/3"))
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in contents.items():
            archive.writestr(key, content, method if key == name else zipfile.ZIP_STORED)
    refused(path, "data/3 is compressed or encrypted")


def central(content, number=0):
    """Where the entry of a member in the central directory begins."""
    place = -1
    for _ in range(number + 1):
        place = content.index(b"PK\x01\x02", place + 1)
    return place


DIRECTORY = {
    # (offset in the entry, format, value): what the directory says of the fourth tensor
    "encrypted": (8, "<H", 0x809, "compressed or encrypted"),
    "compressed": (10, "<H", 8, "compressed or encrypted"),
    "another size": (24, "<I", 4, "with two sizes"),
    "past the end": (42, "<I", 0x7FFFFFFF, "truncated or damaged|over its end|does not lie"),
    "on another one": (42, "<I", 0, "does not lie|truncated or damaged"),
    "another checksum": (16, "<I", 1, "truncated or damaged"),
}


@pytest.mark.parametrize("case", DIRECTORY)
def test_a_directory_that_lies_is_refused(path, refused, case):
    place, form, value, message = DIRECTORY[case]
    content = bytearray(path.read_bytes())
    names = list(members(path))
    entry = central(content, next(i for i, name in enumerate(names) if name.endswith("data/1")))
    content[entry + place : entry + place + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(content)
    refused(path, message)


def test_a_member_that_is_there_twice_is_refused(path, refused):
    contents = members(path)
    name = next(name for name in contents if name.endswith("data/1"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, bytes(len(contents[name])))
    refused(path, "listed twice")


def test_another_archive_in_front_is_refused(path, refused):
    """Readers that count from the front, or from the end, would see two different files."""
    path.write_bytes(path.read_bytes() * 2)
    # Where Python itself looks at the place of the zip64 record, it is first to refuse.
    refused(path, "does not lie where torch.save puts it|damaged .*zip64 end of central directory")


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_missing_bytes_are_refused_with_the_path(path, refused, count, place):
    content = bytearray(path.read_bytes())
    begin = int(place * len(content))
    del content[begin : begin + count]
    path.write_bytes(content)
    refused(path, "truncated or damaged|does not lie|over its end|a zip archive, but")


def test_big_endian_numbers_are_refused(path, refused):
    contents = members(path)
    write(path, {k: b"big" if k.endswith("byteorder") else v for k, v in contents.items()})
    refused(path, "not little-endian")


def test_a_newer_format_is_refused(path, refused, official):
    contents = members(path)
    name = next(name for name in contents if name.endswith("/version"))
    write(path, {**contents, name: b"11\n"})
    refused(path, "in version 11 of the format of torch.save, expected at most 10")
    write(path, {**contents, name: b"10\n"})
    load_checkpoint(CAME32bit(copies(official[0]).items()), path)


def test_a_file_without_checksums_is_refused(path, refused, official):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(official[1].state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    refused(path, r"Bad CRC-32.*set_crc32_options\(False\) writes such files")


# --- pickles --------------------------------------------------------------------------------------


def with_pickle(path, edit):
    """Replace bytes in the pickle; the archive stays sound."""
    contents = members(path)
    name = next(name for name in contents if name.endswith("data.pkl"))
    contents[name] = edit(contents[name])
    write(path, contents)


def test_a_storage_larger_than_its_member_is_refused(path, refused):
    """torch.load would read what lies behind it."""
    contents = members(path)
    name = next(name for name in contents if name.endswith("data/0"))
    write(path, {**contents, name: contents[name][:-4]})
    refused(path, "data/0 has 356 bytes, its tensor needs 90 times 4")


def test_a_storage_with_two_dtypes_is_refused(path, refused, official):
    """torch.load gives all of its tensors the dtype that it met first."""
    table = official[1].state_dict()
    state = dict(table["state"][0])
    state["exp_avg_sq_row"] = state["exp_avg_sq_row"].bfloat16()
    state["exp_avg_res_row"] = state["exp_avg_res_row"].half()
    torch.save({**table, "state": {**table["state"], 0: state}}, path)
    load_checkpoint(CAME32bit(copies(official[0]).items()), path)
    rows = [n for n, content in members(path).items() if "/data/" in n and len(content) == 18]
    one, other = (b"X\x01\x00\x00\x00" + name[-1:].encode() for name in rows)
    with_pickle(path, lambda text: text.replace(other, one))
    refused(path, "has two dtypes, torch.float16 is one")


def test_a_tensor_outside_of_its_storage_is_refused(path, refused):
    with_pickle(path, lambda text: text.replace(b"K\x09K\x0a\x86", b"K\x09K\x0b\x86", 1))
    refused(path, "a tensor of shape .9, 11. does not lie in its 90 elements")


def test_elements_that_share_memory_are_refused(path, refused, official):
    table = official[1].state_dict()
    table["state"] = {
        **table["state"],
        0: {**table["state"][0], "exp_avg": torch.ones(()).expand(9, 10)},
    }
    torch.save(table, path)
    refused(path, "does not lie in its 1 elements")


def test_other_kinds_of_tensors_are_refused(path, refused, official):
    table = official[1].state_dict()
    for other in (
        torch.quantize_per_tensor(torch.ones(9, 10), 0.1, 0, torch.qint8),
        torch.ones(9, 10).to_sparse(),
        torch.ones(9, 10, device="meta"),
        torch.ones(9, 10, dtype=torch.complex64),
        torch.ones(9, 10).numpy(),
        torch.ones(9, 10).to(torch.float8_e4m3fn),
    ):
        state = {**table["state"], 0: {**table["state"][0], "exp_avg": other}}
        torch.save({**table, "state": state}, path)
        refused(path, "")
    negative = torch._neg_view(torch.ones(9, 10))
    state = {**table["state"], 0: {**table["state"][0], "exp_avg": negative}}
    torch.save({**table, "state": state}, path)
    refused(path, "its values are not its bytes")


class Run:
    """What a pickle can name, and does here."""

    def __reduce__(self):
        return print, ("you have been had",)


def test_nothing_that_a_pickle_names_is_called(path, refused, official, capsys):
    torch.save({**official[1].state_dict(), "hook": Run()}, path)
    refused(path, "holds Python objects .*print")
    assert not capsys.readouterr().out
    for text in (
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01s\x86b.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**45) + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02",
        b"",
    ):
        with_pickle(path, lambda _, text=text: text)
        refused(path, "")


def test_options_that_refer_to_themselves_end(path, refused, official):
    table = official[1].state_dict()
    endless = []
    endless.append(endless)
    table["param_groups"][0]["note"] = endless
    torch.save(table, path)
    refused(path, "the options have more than 100000 values|RecursionError")
    wide = [1, 2]
    for _ in range(40):  # 2**40 values in a few hundred bytes
        wide = [wide, wide]
    table["param_groups"][0]["note"] = wide
    torch.save(table, path)
    refused(path, "the options have more than 100000 values")


def test_a_tensor_lr_comes_from_the_archive(tmp_path):
    lr = torch.tensor([1.0, 0.25])[1]  # a view
    params = parameters(SHAPES)
    optimizer = CAME8bit(params.items(), lr=lr)
    train(params, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    other = CAME8bit(copies(params).items())
    load_checkpoint(other, tmp_path / "x.pt")
    assert same_bits(other.param_groups[0]["lr"], lr)
    assert_same(snapshot(optimizer), snapshot(other))
