"""The archives that ``torch.save`` writes, read without ``torch.load``.

Such a file is a zip archive with one pickle and the bytes of every storage. ``torch.load`` maps
the archive without looking at compression or checksums and takes the length of a storage from the
pickle, so it is not used here. :class:`Archive` reads the members through :mod:`zipfile`, which
compares their checksums, and :class:`_Unpickler` knows containers, numbers, text and dense tensors;
nothing that a pickle names is ever called.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError

MAGIC = b"PK\x03\x04"

_LARGEST_PICKLE = 100_000_000
_LOCAL_HEADER = 30  # bytes before the name of a member
_CHUNK = 1 << 22
_NEWEST_VERSION = 10  # that torch.load reads; it still writes 3

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    member: zipfile.ZipInfo
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor in an archive, not read yet; ``offset`` and ``stride`` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As that of a tensor."""
        return self.storage.dtype


class _ForeignObject(Exception):
    """The pickle wants an object that an optimizer's state does not consist of."""


@contextmanager
def explained(
    what: str = "the file begins like one of torch.save, but is truncated or damaged",
) -> Iterator[None]:
    """Turn what an unexpected file makes Python raise into a :class:`CheckpointError`."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except _ForeignObject as error:
        raise CheckpointError(
            f"the file holds Python objects ({error}), such as a whole model or optimizer, and "
            "loading those may run code: if you trust it, load it with torch.load(..., "
            "weights_only=False) and save the optimizer with came8bit.save_checkpoint"
        ) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a place before the start of the file gives
            raise
        raise CheckpointError(f"{what} ({error.strerror})") from error
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        if "Bad CRC-32" in said:
            said += "; torch.serialization.set_crc32_options(False) writes such files, too"
        raise CheckpointError(f"{what} ({said})") from error


def _tensor(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> StoredTensor:
    """Stand in for ``torch._utils._rebuild_tensor_v2``; every element lies in the storage."""
    if not (
        isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= 64
        and all(type(number) is int and number >= 0 for number in (offset, *shape, *stride))
    ):
        raise ValueError("a tensor is described in a way that torch.save does not use")
    if len(rest) > 2 and rest[2]:
        raise ValueError(f"a tensor is marked {rest[2]!r}, so its values are not its bytes")
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # More elements than the storage has would share memory, and fill ours.
    if math.prod(shape) and not (
        offset + last < storage.numel and math.prod(shape) <= storage.numel
    ):
        raise ValueError(f"a tensor of shape {shape} does not lie in its {storage.numel} elements")
    return StoredTensor(storage, offset, shape, stride)  # type: ignore[arg-type]


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch", "Size"): lambda sizes: sizes,
    ("torch", "device"): lambda *place: None,
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *factory: {},
    ("collections", "Counter"): lambda counts: counts,
}
"""What stands in for the callables of a pickle: it copies nothing and keeps nothing."""

_OPCODES = {
    code: run
    for code, run in pickle._Unpickler.dispatch.items()
    if bytes([code])
    not in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ),
        *(pickle.NEWOBJ_EX, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    )
}


class _Unpickler(pickle._Unpickler):
    """Reads data and makes nothing else of a pickle than dicts, lists, tuples and numbers."""

    def __init__(self, file: BinaryIO, storage: Callable[[object], _Storage]) -> None:
        super().__init__(file)
        self._storage_of = storage

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that the pickle refers to."""
        return self._storage_of(pid)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if (module, name) not in _CALLS:
            raise _ForeignObject(f"{module}.{name}")
        return _CALLS[module, name]

    def load_build(self) -> None:
        """Ignore attributes, which an OrderedDict has in the state of a module."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        stack.pop()
        if not isinstance(stack[-1], dict):
            raise ValueError("attributes of something that has none")

    dispatch: ClassVar[dict[int, Any]] = {**_OPCODES, pickle.BUILD[0]: load_build}


class Archive:
    """The archive that ``torch.save`` writes; its members are read, not mapped.

    Raises:
        CheckpointError: the archive is damaged, or not one that ``torch.save`` writes.
    """

    def __init__(self, file: BinaryIO) -> None:
        with explained():
            self._zip = zipfile.ZipFile(file)
            self._members = self._checked_members()
            pickles = [name for name in self._members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError("a zip archive, but not one that torch.save writes")
            self._folder = pickles[0].removesuffix("data.pkl")
            self._dtypes: dict[str, torch.dtype] = {}  # of members that have been referred to
            order = self._members.get(self._folder + "byteorder")
            if order is not None and self._zip.read(order) != b"little":
                raise CheckpointError(
                    "the numbers are not little-endian: load the file with torch.load on any "
                    "machine and save it again"
                )
            member = self._members.get(self._folder + "version")
            version = 0 if member is None else int(self._zip.read(member))
            if version > _NEWEST_VERSION:
                raise CheckpointError(
                    f"written in version {version} of the format of torch.save, expected at most "
                    f"{_NEWEST_VERSION}: save it again with this torch"
                )

    def load(self) -> Any:
        """Return the object that was saved; tensors are :class:`StoredTensor`."""
        info = self._members[self._folder + "data.pkl"]
        if info.file_size > _LARGEST_PICKLE:
            raise CheckpointError(f"its pickle has {info.file_size} bytes, which is too many")
        with explained():
            return _Unpickler(io.BytesIO(self._zip.read(info)), self._storage).load()

    def read(self, tensor: StoredTensor) -> Tensor:
        """Return a new CPU tensor; the checksum of its storage is compared."""
        storage = tensor.storage
        wide = torch.uint8 if storage.dtype == torch.bool else storage.dtype
        flat = torch.empty(storage.numel, dtype=wide)
        raw = flat.view(torch.uint8).numpy().data
        with explained(), self._zip.open(storage.member) as member:
            for begin in range(0, len(raw), _CHUNK):
                piece = raw[begin : begin + _CHUNK]
                if member.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise EOFError(f"{storage.member.filename} is too short")
        flat = flat.bool() if storage.dtype == torch.bool else flat
        if not math.prod(tensor.shape):
            return flat.new_empty(tensor.shape)
        found = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
        return found.contiguous() if found.numel() == storage.numel else found.clone()

    def _checked_members(self) -> dict[str, zipfile.ZipInfo]:
        """Return every member by name: stored plainly, without gaps, from the first byte on."""
        end = 0
        members: dict[str, zipfile.ZipInfo] = {}
        for info in sorted(self._zip.infolist(), key=lambda info: info.header_offset):
            # 0x1, 0x20 and 0x40: encrypted or a patch.
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x61:
                raise CheckpointError(
                    f"{info.filename} is compressed or encrypted, which torch.save does not do: "
                    "write the file again with torch.save(torch.load(...), ...)"
                )
            if info.filename in members or info.file_size != info.compress_size:
                raise CheckpointError(f"{info.filename} is listed twice or with two sizes")
            if info.header_offset < end or (not members and info.header_offset):
                raise CheckpointError(f"{info.filename} does not lie where torch.save puts it")
            members[info.filename] = info
            end = info.header_offset + _LOCAL_HEADER + len(info.filename)
            end += info.file_size
        if end > self._zip.start_dir:
            raise CheckpointError("a member of the archive reaches over its end")
        return members

    def _storage(self, found: object) -> _Storage:
        """Stand in for the storage that a pickle refers to; its size must be the member's."""
        if not (isinstance(found, tuple) and len(found) == 5 and found[0] == "storage"):
            raise ValueError("a reference to something that is not a storage")
        _, dtype, key, _, numel = found
        if not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise ValueError("a storage of unknown type")
        info = self._members[f"{self._folder}data/{key}"]
        if numel < 0 or info.file_size != numel * dtype.itemsize:
            raise ValueError(
                f"{info.filename} has {info.file_size} bytes, its tensor needs "
                f"{numel} times {dtype.itemsize}"
            )
        if self._dtypes.setdefault(info.filename, dtype) != dtype:
            raise ValueError(f"{info.filename} has two dtypes, {dtype} is one")
        return _Storage(info, dtype, numel)
