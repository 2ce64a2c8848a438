"""A file that is there as a whole or not at all, whatever happens while it is written.

The bytes go into a temporary file in the folder of the target, are made durable, and take the
target's name in one step. Who dies before that leaves a temporary file behind, and the next writer
into the folder removes it. It knows the dead from the living by a lock that the system releases
with the process: process numbers would be wrong across containers and machines that share a folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

_PREFIX, _SUFFIX = ".came8bit-", ".tmp"
_BUFFER = 1 << 20
_NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], nbytes: int = 0) -> Iterator[BinaryIO]:
    """Yield a new file; when the block ends without error, it takes the place of ``path``.

    The file can be written and sought. A symbolic link stays one: what it points to is replaced.
    The new file has the permissions of the one that it replaces, and its owner and group where the
    system allows that; else what the umask leaves. A file that is read-only is replaced, too: who
    may write to the folder may do that.

    Args:
        path: of the new file.
        nbytes: how large it is going to be, where that is known; for the error of a full disk.

    Raises:
        OSError: the folder is missing, ``path`` is not a file, or writing failed; it names
            ``path``. What was there is unchanged, and the temporary file is gone.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"the folder {target.parent} does not exist; create it", f"{path}"
        )
    old: os.stat_result | None = None
    with contextlib.suppress(FileNotFoundError):
        old = target.stat()
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EEXIST, "exists and is not a file; name a file in a folder", f"{path}")
    remove_leftovers(target.parent)
    # Until it has its permissions, only its owner may read it.
    with _naming(target):
        temporary, file = _create(target, 0o666 if old is None else 0o600)
    try:
        with file:
            yield file
            file.flush()
            if old is not None:
                _become_like(old, file.fileno())
            with _naming(target):
                os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            # Under its old name the file must not be without its lock.
            os.replace(temporary, target)
    except BaseException as error:
        size = _size_of(temporary)
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename == target:
            text = _explained(error, max(nbytes, size), target.parent)
            raise OSError(error.errno, text, os.fspath(path)) from error
        raise
    _sync_folder(target.parent)


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _explained(error: OSError, wanted: int, folder: Path) -> str:
    """Return the text of ``error``, how many bytes were wanted, and how many are free."""
    free = shutil.disk_usage(folder).free
    return (
        f"{error.strerror}: wanted {wanted:,} bytes, {free:,} are free in {folder}; what was there "
        "has not been changed"
    )


class _NamedFile(io.FileIO):
    """A file whose errors name ``target``: whoever writes may get others from elsewhere."""

    target: Path

    def write(self, content: Any) -> int:
        """Write as :meth:`io.FileIO.write`."""
        with _naming(self.target):
            return super().write(content)


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = target
        raise


def _become_like(old: os.stat_result, descriptor: int) -> None:
    """Give an open file the permissions, owner and group of ``old``, as far as the system allows.

    What it does not allow is not an error, for the contents matter more; but the file is never
    readable by more users than ``old`` was.
    """
    if sys.platform == "win32":
        return
    made, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode) & 0o777
    if made.st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:
            mode &= ~0o070 | (mode & 0o007) << 3  # another group, which may do what others may
    if made.st_uid != old.st_uid:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, old.st_uid, -1)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writers are dead; those of living ones stay."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            # What cannot be opened or removed belongs to another user, or is gone by now.
            with contextlib.suppress(OSError):
                _remove_if_dead(folder / name)


def _remove_if_dead(path: Path) -> None:
    if sys.platform == "win32":
        path.unlink()  # refused while its writer has it open
        return
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, os.O_RDWR | flags)
    except PermissionError:
        # It may have got the permissions of a read-only file. Some systems lock that as well.
        descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)


def _create(target: Path, mode: int) -> tuple[Path, BinaryIO]:
    """Return a new temporary file in the folder of ``target``, locked for as long as it is open.

    Its permissions are what the umask leaves of ``mode``.
    """
    while True:
        path = target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, mode)
        if _lock(descriptor, path):
            raw = _NamedFile(descriptor, "wb")
            raw.target = target
            return path, io.BufferedWriter(raw, _BUFFER)
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock a new file; ``False`` if another process took it for a leftover before that."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: leftovers are never removed
    return _is_at(descriptor, path)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one that ``path`` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be synchronised."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
