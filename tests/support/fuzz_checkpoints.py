"""Damages files in every way it can think of, and has them read; run as a program.

``python fuzz_checkpoints.py KIND SEED COUNT [SECONDS]`` prints how many files were refused and how
many were read, of COUNT or as many as it manages in SECONDS. A file is refused with a
CheckpointError that names it, or its state is sound. A crash, another error, more than 2 GiB or ten
seconds of work for a file end the program; its last line names the file.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from came_pytorch import CAME as OfficialCAME
from checkpoints import copies, parameters, train, trained

from came8bit import (
    CAME32bit,
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from came8bit.state.layout import find_fault

SHAPES = {"m": (9, 10), "v": (3,)}
SECONDS, MEMORY = 10, 2 << 30
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
TENSOR = {"tensor": {"dtype": "float32", "shape": [], "bytes": "0000c07f"}}  # NaN
VALUES = [TENSOR, {"tensor": {"dtype": "bool", "shape": [0], "bytes": ""}}, 10**400]
VALUES += [None, True, -1, 0, 1.5, 2**53, 2**70, 1e400, "", "\x1b[2J", [], {}, [[]], {"tuple": []}]

OBJECTS = [
    *(*VALUES, 3.0, b"bytes", (1, 2), {1: 2}, {(): ()}, [[0] * 3] * 3, -(10**5000)),
    *(
        torch.tensor(x)
        for x in (3, 3.0, 0.5, -1.0, 1e300, torch.nan, torch.inf, [], True, [1.0, 2])
    ),
    *(torch.zeros(9, 10), torch.zeros(10, 9).t(), torch.full((9, 10), torch.nan), torch.ones(9)),
    *(torch.ones(9, 10).bfloat16(), torch.ones(9, 10).to(torch.complex64), torch.Size([3])),
]


def damaged(content: bytes, choose: random.Random) -> bytes:
    """``content`` with a few bytes changed, taken away, put in, or copied from elsewhere."""
    made = bytearray(content)
    for _ in range(choose.choice([1, 1, 1, 2, 5])):
        at, size = choose.randrange(len(made) + 1), choose.choice([1, 2, 4, 8, 30, 200])
        other = choose.randrange(len(made) + 1)
        number = choose.choice(NUMBERS).to_bytes(8, choose.choice(["little", "big"]))[:size]
        kind = choose.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del made[at : at + size]
        elif kind == 2:
            made[at:at] = choose.randbytes(size)
        elif kind == 3:
            made[at : at + len(number)] = number
        elif kind == 4:
            made[at : at + size] = made[other : other + size]
        else:
            made[at:at] = made[other : other + size]
    return bytes(made)


def damaged_header(content: bytes, choose: random.Random) -> bytes:
    """A checkpoint with a value of its header changed, signed again."""
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    metadata = table["__metadata__"]
    inner = {key: json.loads(metadata[key]) for key in ("groups", "parameters", "user")}
    for _ in range(choose.choice([1, 1, 2])):
        where, key = choose.choice(list(places([table, inner])))
        where[key] = copy.deepcopy(choose.choice(VALUES))
    if isinstance(metadata, dict):
        metadata.update({key: json.dumps(value) for key, value in inner.items()})
        metadata["header_sha256"] = "0" * 64
    text = json.dumps({**table}, separators=(",", ":"))
    first = len(text).to_bytes(8, "little")
    digest = hashlib.sha256(first + text.encode()).hexdigest()
    text = text.replace('"header_sha256":"' + "0" * 64, f'"header_sha256":"{digest}')
    return first + text.encode() + content[8 + size :]


def places(tree):
    """Every ``(container, key)`` in a tree of dicts and lists."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def damaged_dict(content: bytes, choose: random.Random) -> bytes:
    """A file of torch.save in which something else stands in some places of the state dict."""
    table = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(choose.choice([1, 1, 2])):
        where, key = choose.choice(list(places(table)))
        where[key] = copy.deepcopy(choose.choice(OBJECTS))
    file = io.BytesIO()
    torch.save(table, file)
    return file.getvalue()


def damaged_member(content: bytes, choose: random.Random, folder: Path) -> bytes:
    """An archive of torch.save in which the contents of a member are damaged, not its checksum."""
    path = folder / "member"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    chosen = pickled if choose.random() < 0.8 else choose.choice(list(members))
    members[chosen] = damaged(members[chosen], choose)
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return path.read_bytes()


def originals(kind: str, folder: Path) -> bytes:
    path = folder / "original"
    if kind == "came-pytorch":
        params = parameters(SHAPES)
        optimizer = OfficialCAME(params.items(), lr=torch.tensor(1e-3))
        train(params, optimizer, 2)
        torch.save(optimizer.state_dict(), path)
    else:
        _, optimizer = trained(shapes=SHAPES, min_8bit_size=0, lr=torch.tensor(1e-3))
        if kind == "checkpoint":
            save_checkpoint(optimizer, path, metadata={"epoch": "3"})
        else:
            torch.save(optimizer.state_dict(), path)
    return path.read_bytes()


def read(path: Path, folder: Path) -> list[bytes] | None:
    """The state in ``path``, which is sound; None if it is refused."""
    optimizer = CAME32bit(copies(parameters(SHAPES)).items())
    work = (
        lambda: json.dumps(inspect_checkpoint(path), allow_nan=False),
        lambda: convert_checkpoint(path, folder / "converted", optim_bits=32),
        lambda: load_checkpoint(optimizer, path),
    )
    taken = []
    for one in work:
        try:
            one()
            taken.append(True)
        except CheckpointError as error:
            text = str(error)
            if not (text.startswith(f"{path}: ") and text.isprintable()):
                raise AssertionError(f"the error is {text!r}") from error
            taken.append(False)
    assert taken[2] or not optimizer.state
    assert all(find_fault(state) is None for state in optimizer.state.values())
    if not taken[2]:
        return None
    states = [optimizer._store.read(param) for param in optimizer.param_groups[0]["params"]]
    return [tensor.numpy().tobytes() for state in states for tensor in state.values()]


def limit_memory(nbytes: int) -> None:
    """Let this process take at most ``nbytes`` of address space more than it has."""
    with open("/proc/self/status", encoding="utf-8") as file:
        used = int(re.search(r"VmSize:\s+(\d+) kB", file.read())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, used + nbytes))


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """End the process if the block works for ``seconds``, or waits for twenty times as long."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def numbers(count: int, seconds: float) -> Iterator[int]:
    """Count up to ``count``, or for ``seconds``."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, range(count))


def main(kind: str, seed: int, count: int, seconds: float = math.inf) -> None:
    limit_memory(MEMORY)
    warnings.simplefilter("ignore", UserWarning)
    choose = random.Random(f"{kind} {seed}")
    found = [0, 0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = originals(kind, folder)
        path = folder / "file"
        path.write_bytes(content)
        sound = read(path, folder)
        assert sound, "the sound file is refused"
        for number in numbers(count, seconds):
            made, lies = damaged(content, choose), choose.random() < 0.5
            if lies and kind == "checkpoint":
                made = damaged_header(content, choose)
            elif lies and choose.random() < 0.5:
                made = damaged_dict(content, choose)
            elif lies:
                made = damaged_member(content, choose, folder)
            path.unlink()
            path.write_bytes(made)
            print(f"{kind}, seed {seed}, file {number}", file=sys.stderr)
            with limited_time(SECONDS):
                state = read(path, folder)
            found[state is not None] += 1
            # Without a new checksum, what is taken is what was there.
            assert lies or state in (None, sound)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
