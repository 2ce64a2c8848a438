"""Files that are damaged, foreign or newer are refused, and the optimizer is as it was."""

import contextlib
import copy
import hashlib
import json
import random
import re
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from checkpoints import copies, trained
from fuzz_checkpoints import OBJECTS, VALUES, places
from training import assert_same, snapshot, start

from came8bit import (
    CAME8bit,
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

SMALL = {"m": (4, 15), "v": (3,)}
OPTIONS = {"min_8bit_size": 0, "lr": 0.125}


class Untouchable(CAME8bit):
    """Its state must not be written."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._store.write = self._refuse

    def _refuse(self, param, state):
        raise AssertionError("the state has been written")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file, and the size of its header with the length field."""
    _, optimizer = trained(shapes=SMALL, **OPTIONS)
    path = tmp_path_factory.mktemp("sound") / "x"
    save_checkpoint(optimizer, path)
    content = path.read_bytes()
    return content, 8 + int.from_bytes(content[:8], "little")


@pytest.fixture
def refuse(tmp_path):
    """A function that loads bytes, expects a refusal, and gives its message."""
    _, optimizer = trained(Untouchable, shapes=SMALL, steps=2, **{**OPTIONS, "lr": 0.25})
    before = snapshot(optimizer)
    path = tmp_path / "damaged"

    def check(content):
        path.unlink(missing_ok=True)  # truncating a file instead makes ext4 write it out
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(optimizer, path)
        assert str(path) in str(caught.value)
        assert optimizer.param_groups[0]["lr"] == 0.25
        return str(caught.value)

    yield check
    assert_same(before, snapshot(optimizer))


def test_the_sound_file_loads(sound, tmp_path):
    """Or the others would prove nothing."""
    (tmp_path / "x").write_bytes(sound[0])
    params, optimizer = trained(shapes=SMALL, **OPTIONS)
    other = CAME8bit(copies(params).items())
    load_checkpoint(other, tmp_path / "x")
    assert_same(snapshot(optimizer), snapshot(other))
    with pytest.raises(RuntimeError, match="the state has been written"):
        load_checkpoint(Untouchable(copies(params).items()), tmp_path / "x")


def test_a_flipped_bit_anywhere_is_noticed(sound, refuse):
    """Every byte of the file, padding and length field included, a random bit of each."""
    content, _ = sound
    choose = random.Random(0)
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << choose.randrange(8)
        refuse(bytes(damaged))


def test_every_truncation_is_noticed(sound, refuse):
    content, _ = sound
    for size in range(len(content)):
        message = refuse(content[:size])
        assert "truncated" in message or "not an optimizer checkpoint" in message
    assert "damaged" in refuse(content + b"\0")


def test_a_damaged_tensor_is_named(sound, refuse):
    content, header = sound
    damaged = bytearray(content)
    damaged[header] ^= 1
    assert "state of parameter m is damaged" in refuse(bytes(damaged))
    damaged = bytearray(content)
    damaged[-1] ^= 1
    assert "state of parameter v is damaged" in refuse(bytes(damaged))


# --- a header with a correct checksum that says something wrong -----------------------------------


def parts(sound):
    content, size = sound
    table = json.loads(content[8:size])
    metadata = table["__metadata__"]
    for key in ("groups", "parameters", "user"):
        metadata[key] = json.loads(metadata[key])
    return table, content[size:]


def signed(table, data):
    """A file with this header and the checksum that belongs to it."""
    metadata = table.get("__metadata__")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    for key in ("groups", "parameters", "user"):
        if key in metadata:
            metadata[key] = json.dumps(metadata[key])
    if "header_sha256" in metadata:
        metadata["header_sha256"] = "0" * 64
    text = json.dumps({**table, "__metadata__": metadata}, separators=(",", ":")).encode()
    first = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(first + text).hexdigest().encode()
    mark = b'"header_sha256":"%b"'
    return first + text.replace(mark % (b"0" * 64), mark % digest) + data


def test_signing_is_done_right(sound, tmp_path):
    (tmp_path / "x").write_bytes(signed(*parts(sound)))
    assert inspect_checkpoint(tmp_path / "x")["verified"]


def change(path, value):
    """A function that sets one place of the header; ``...`` removes it."""

    def apply(table):
        for key in path[:-1]:
            table = table[key]
        if value is ...:
            del table[path[-1]]
        else:
            table[path[-1]] = value

    return apply


META, GROUP = "__metadata__", ("__metadata__", "groups", 0)
EMPTY = {"tensor": {"dtype": "float32", "shape": [0], "bytes": ""}}
DEEP = json.loads("[" * 200 + "]" * 200)
PARAM = ("__metadata__", "parameters", 0)
WRONG = {
    "newer file": (change((META, "format_version"), "2"), "format version 2.*upgrade came8bit"),
    "version nonsense": (change((META, "format_version"), "01"), "format_version is '01'"),
    "version number": (change((META, "format_version"), 1), "format_version is 1"),
    "newer state": (change((*GROUP, "format_version"), 2), "format_version 2, .*upgrade came8bit"),
    "other format": (change((META, "format"), "pt"), "format 'pt'.*not an optimizer checkpoint"),
    "no metadata": (change((META,), None), "not an optimizer checkpoint"),
    "no header checksum": (change((META, "header_sha256"), ...), "header_sha256 is not there"),
    "no groups": (change((META, "groups"), ...), "header is damaged.*groups"),
    "groups are no list": (change((META, "groups"), 3), "header is damaged"),
    "bad option": (change((*GROUP, "lr"), -1.0), "lr -1.0"),
    "unreadable option": (change((*GROUP, "lr"), {"pickle": "x"}), "unknown kind of value"),
    "empty tensor": (change((*GROUP, "optim_bits"), EMPTY), r"group 0: .*[Tt]ensor"),
    "tensor as text": (change((*GROUP, "rounding"), EMPTY), r"group 0: .*[Tt]ensor"),
    "huge number": (change((*GROUP, "seed"), 10**400), "got seed 1000"),
    "huge lr": (change((*GROUP, "lr"), 10**400), "got lr 1000"),
    "deep option": (change((*GROUP, "note"), DEEP), "nested too deeply"),
    "wrong type": (change((*GROUP, "betas"), 3), "betas 3"),
    "unknown group": (change((*PARAM, "group"), 1), "group 1 does not exist"),
    "negative step": (change((*PARAM, "step"), -1), "header is damaged"),
    "step as text": (change((*PARAM, "step"), "3"), "header is damaged"),
    "no checksum": (change((*PARAM, "sha256"), None), "without shape or checksum"),
    "wrong checksum": (change((*PARAM, "sha256"), "0" * 64), "parameter m is damaged"),
    "state forgotten": (change((*PARAM, "step"), None), "begins at"),
    "other shape": (change((*PARAM, "shape"), [15, 4]), "parameter m .* not written by came8bit"),
    "huge shape": (change((*PARAM, "shape"), [10**12, 10**12]), "not written by came8bit"),
    "names twice": (change((*PARAM, "name"), "v"), "header is damaged"),
    "name is missing": (change((*PARAM, "name"), None), "header is damaged"),
    "tensor is missing": (change(("m.absmax",), ...), "begins at|not written"),
    "tensor of another dtype": (change(("m.exp_avg", "dtype"), "F32"), "not written"),
    "unknown dtype": (change(("m.exp_avg", "dtype"), "F4"), "header is damaged"),
    "overlap": (change(("m.exp_avg", "data_offsets"), [0, 60]), "header is damaged"),
    "backwards": (change(("m.exp_avg", "data_offsets"), [60, 0]), "header is damaged"),
    "a stranger": (change(("x",), {"dtype": "I8"}), "belong to no parameter"),
    "user's numbers": (change((META, "user"), {"epoch": 3}), "not strings"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_correct_checksum_does_not_help(sound, refuse, name, tmp_path):
    apply, message = WRONG[name]
    table, data = parts(sound)
    apply(table)
    assert re.search(message, refuse(signed(table, data)))
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path / "damaged", tmp_path / "converted", optim_bits=32)
    assert not (tmp_path / "converted").exists()


def paths_in(value, path=()):
    """The path to every place in a tree of dicts and lists."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


@pytest.mark.parametrize("value", [..., None, -1, 1.5, "", [], {}, True, 2**70], ids=repr)
def test_no_change_of_a_header_raises_anything_else(sound, tmp_path, value):
    """Any one place of the header: refused as a checkpoint, or harmless."""
    path = tmp_path / "x"
    _, optimizer = trained(shapes=SMALL, **OPTIONS)
    for place in paths_in(parts(sound)[0]):
        table, data = parts(sound)
        change(place, value)(table)
        if table == parts(sound)[0]:
            continue
        path.unlink(missing_ok=True)
        path.write_bytes(signed(table, data))
        before = snapshot(optimizer)
        try:
            load_checkpoint(optimizer, path)
        except CheckpointError:
            assert_same(before, snapshot(optimizer))
        else:
            # What a header may say freely: options, counts, the caller's strings, who wrote it.
            # The checksum is made anew by signed().
            free = {"groups", "user", "came8bit_version", "step", "skipped", "dtype"}
            assert (free | {"header_sha256"}) & set(place), place


# --- files of others ------------------------------------------------------------------------------


def save_model(path):
    safetensors.torch.save_file({"w": torch.ones(3)}, path, {"format": "pt"})


def save_plain(path):
    safetensors.torch.save_file({"w": torch.ones(3)}, path)


def save_module(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def save_adamw(path):
    param = start((3, 4))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones(3, 4)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


def save_training(path):
    optimizer = torch.optim.AdamW([start((3, 4))])
    torch.save({"model": {}, "optimizer": optimizer.state_dict(), "epoch": 3}, path)


def save_own_training(path):
    torch.save({"optimizer": trained(steps=1)[1].state_dict()}, path)


def save_old(path):
    state = trained(steps=1)[1].state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_code(path):
    torch.save({"state": {}, "param_groups": [], "hook": save_code}, path)


def save_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes that do not begin like a safetensors"),
    "noise": (
        lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
        "5000 bytes that do not begin like a safetensors",
    ),
    "JSON": (lambda path: path.write_text(json.dumps({"lr": 1} | dict.fromkeys("abc"))), "do not"),
    "model": (save_model, r"format 'pt' with 1 tensors such as \['w'\]: not an optimizer"),
    "safetensors": (save_plain, "without metadata: not an optimizer"),
    "module": (save_module, "torch.save with a dict with .*of a model, expected the state_dict"),
    "AdamW": (save_adamw, "state of another optimizer than came-pytorch"),
    "training": (save_training, r"under 'optimizer'; save it alone: torch\.save\(torch\.load"),
    "own training": (save_own_training, r"save it alone: torch\.save\(torch\.load\(\.\.\.\)"),
    "old": (save_old, r"format of before version 1\.6; save it again: torch\.save\(torch\.load"),
    "code": (save_code, "the file holds Python objects .*, and loading those may run code"),
    "zip": (save_zip, "a zip archive, but not one that torch.save writes"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_told_what_they_are(refuse, tmp_path, name):
    write, message = FOREIGN[name]
    write(tmp_path / "foreign")
    assert re.search(message, refuse((tmp_path / "foreign").read_bytes()))


def test_noise_never_raises_anything_else(refuse):
    choose = random.Random(2)
    for _ in range(200):
        size = choose.randrange(200)
        noise = choose.randbytes(size)
        refuse(noise)
        refuse(size.to_bytes(8, "little") + b"{" + noise)
        refuse(size.to_bytes(8, "little") + b"[" * size)
    deep = b'{"__metadata__":' + b"[" * 200_000
    refuse(len(deep).to_bytes(8, "little") + deep)


def test_a_missing_file_or_a_folder_is_an_os_error(tmp_path):
    _, optimizer = trained(Untouchable, shapes=SMALL)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(optimizer, tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        load_checkpoint(optimizer, tmp_path)


# --- another model --------------------------------------------------------------------------------

OTHERS = {
    "a name": ({"m": (4, 15), "w": (3,)}, r"not saved: w; not in the optimizer: v"),
    "fewer": ({"m": (4, 15)}, r"not saved: none; not in the optimizer: v"),
    "more": ({**SMALL, "w": (2,)}, r"not saved: w; not in the optimizer: none"),
    "a shape": ({"m": (15, 4), "v": (3,)}, r"m: \(4, 15\), expected \(15, 4\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(sound, tmp_path, name):
    shapes, message = OTHERS[name]
    (tmp_path / "x").write_bytes(sound[0])
    _, optimizer = trained(Untouchable, shapes=shapes)
    before = snapshot(optimizer)
    with pytest.raises(CheckpointError, match=message + ".*nothing has been changed"):
        load_checkpoint(optimizer, tmp_path / "x")
    assert_same(before, snapshot(optimizer))


def test_a_model_without_names_is_compared_by_shape(sound, tmp_path):
    (tmp_path / "x").write_bytes(sound[0])
    optimizer = Untouchable([start((4, 15)), start((4,))])
    with pytest.raises(CheckpointError, match=r"v: \(3,\), expected \(4,\)"):
        load_checkpoint(optimizer, tmp_path / "x")
    assert not optimizer.state


def test_a_dict_that_makes_no_sense_is_a_value_error():
    """Anything in any place: refused as one kind of error with nothing changed, or harmless."""
    params, optimizer = trained(shapes={"m": (9, 10), "v": (3,)}, min_8bit_size=0)
    state_dict = optimizer.state_dict()
    for number in range(len(list(places(state_dict)))):
        for value in (*VALUES, *OBJECTS):
            edited = copy.deepcopy(state_dict)
            where, key = list(places(edited))[number]
            where[key] = value
            other = CAME8bit(copies(params).items())
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                other.load_state_dict(edited)
                continue
            assert not other.state
