"""Pages in a file: the backing store of CPU parameters, and of others on request."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shlex
import socket
import stat
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import printable
from .pages import AddressRanges, both_readable, readable

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

GRANULE = mmap.ALLOCATIONGRANULARITY

_MAGIC = b"came8bit pages\n"
_held: set[str] = set()  # page files of this process
# A file is opened and locked, or unlocked and deleted, while no other thread looks at `_held`. The
# garbage collector may close one file in the middle of opening another: the lock is reentrant.
_holding = threading.RLock()
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def default_directory() -> Path:
    """Return the default directory of page files: ``$TMPDIR``, ``/var/tmp``, or temp."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):
        return Path("/var/tmp")  # on a disk, where /tmp is often memory
    return Path(tempfile.gettempdir())


def _close(fd: int, path: Path | None, owner: int) -> None:
    """Close a page file and delete it, unless this process is a fork of its owner."""
    if os.getpid() != owner:
        return
    with _holding:
        if path is not None:
            _held.discard(str(path))
            try:
                if os.path.samestat(os.stat(path), os.fstat(fd)):
                    os.unlink(path)
            except OSError:
                pass
        os.close(fd)


class PageFile:
    """A file whose space is reserved beforehand, mapped one window at a time.

    In a directory of the user's it is ``came8bit-<number>.pages``, locked, and deleted when it is
    no longer used; one that a killed run left behind is used again. Without a directory it has
    no name, and the system deletes it with the process.

    Args:
        directory: an existing directory, or None for :func:`default_directory`.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._path: Path | None = None
        self._fd = -1
        self._owner = os.getpid()
        self._end = GRANULE  # behind the header
        self._ranges = AddressRanges()
        self._mutex = threading.Lock()

    @property
    def name(self) -> str:
        """The file in human-readable form."""
        return str(self._path or f"the unnamed page file in {default_directory()}")

    # --- space ------------------------------------------------------------------------------------

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """As :meth:`BackingStore.reserve`; the disk has promised the space when this returns.

        Raises:
            OSError: too little space, no directory, or the file of another run.
        """
        sizes = [_round_up(size) for size in sizes]
        with self._mutex:
            if self._fd < 0:
                self._open(sum(sizes))
            else:
                self.check()
            addresses, again, end = self._ranges.take(sizes, self._end)
            if end > self._end:
                self._grow(end)
            self._ranges.taken(sizes, addresses, again)
        for index in again:
            for piece in self.pieces(addresses[index], sizes[index]):
                piece.zero_()
        return addresses

    def release(self, address: int, nbytes: int) -> None:
        """As :meth:`BackingStore.release`; the file keeps its size."""
        self._ranges.add(address, _round_up(nbytes))

    def _grow(self, end: int) -> None:
        wanted = end - self._end
        had = _free(self._fd)
        try:
            if wanted > had:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, self._end, wanted)
            else:
                _write_zeros(self._fd, self._end, wanted)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise _no_room(error, wanted, had, self.name) from error
        self._end = end

    # --- windows ----------------------------------------------------------------------------------

    def pieces(self, address: int, nbytes: int) -> list[Tensor]:
        """As :meth:`BackingStore.pieces`; one new mapping that ends with the last tensor over it.

        Raises:
            OSError: the file is too short, or the system maps no more.
        """
        size = os.fstat(self._fd).st_size
        if size < address + nbytes:  # to touch what is not there would kill the process
            raise self._too_short(size)
        try:
            window = mmap.mmap(self._fd, nbytes, offset=address)
        except OSError as error:
            raise OSError(
                error.errno,
                f"paged state: cannot map {readable(nbytes)} of {self.name} ({error.strerror}). "
                "The address space or the number of mappings is limited: lower page_budget=, or "
                "raise the limit (ulimit -v)",
            ) from error
        # The tensor holds the mapping, and nothing else does: it is never closed by hand, because
        # a tensor that outlived it would point nowhere.
        return [torch.frombuffer(window, dtype=torch.uint8)]

    def will_need(self, address: int, nbytes: int) -> None:
        """Have the system read a range ahead, without waiting."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, address, nbytes, os.POSIX_FADV_WILLNEED)

    def probe(self, nbytes: int) -> None:
        """Raise an :class:`OSError` if ``nbytes`` cannot be mapped at once now."""
        if nbytes > 0:
            self.pieces(0, min(_round_up(nbytes), self._end))

    # --- the file itself --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise an :class:`OSError` if the file has been deleted, cut short, or is a parent's."""
        if self._fd < 0:
            return
        if os.getpid() != self._owner:
            raise OSError(
                errno.EPERM,
                f"paged state: {self.name} belongs to process {self._owner}, from which this one "
                "was forked; make the optimizer in the process that trains",
            )
        status = os.fstat(self._fd)
        if self._path is not None and status.st_nlink == 0:
            raise FileNotFoundError(
                errno.ENOENT,
                f"paged state: {self.name} has been deleted while in use. The state can still be "
                "read: save state_dict(), then load it into an optimizer with another page_dir=",
            )
        if status.st_size < self._end:
            raise self._too_short(status.st_size)

    def _too_short(self, size: int) -> OSError:
        has, expected = both_readable(size, self._end)
        return OSError(
            errno.EIO,
            f"paged state: {self.name} has {has}, expected {expected}: something cut it short and "
            "part of the momentum is lost. load_state_dict() with a saved state continues in a "
            "new file",
        )

    def _open(self, wanted: int) -> None:
        """Make the file, with its header; ``wanted`` bytes are going to be behind that."""
        if fcntl is None:
            raise NotImplementedError("page files need a POSIX system (file locks, mappings)")
        wanted += GRANULE
        if self._directory is None:
            directory = default_directory()
            try:
                with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                    self._fd = os.dup(file.fileno())
            except OSError as error:
                raise _cannot_open(error, self.name, directory, wanted) from error
        else:
            directory = self._directory
            self._fd, self._path = _open_locked(directory, wanted)
        closing = weakref.finalize(self, _close, self._fd, self._path, self._owner)
        header = _MAGIC + f"process {os.getpid()} on {socket.gethostname()}\n".encode()
        try:
            os.ftruncate(self._fd, 0)
            _write(self._fd, header.ljust(GRANULE, b"\0"), 0)
        except OSError as error:
            told = _cannot_open(error, self.name, directory, wanted)
            closing()
            self._fd, self._path = -1, None
            raise told from error


def _round_up(nbytes: int) -> int:
    return -(-nbytes // GRANULE) * GRANULE


def _free(place: int | Path) -> int:
    """Return the bytes that may still be written to the disk of a file or directory."""
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def _write(fd: int, content: bytes, start: int) -> None:
    """Write all of ``content``; a disk that is almost full takes a part of it without an error."""
    while content:
        done = os.pwrite(fd, content, start)
        start, content = start + done, content[done:]


def _write_zeros(fd: int, start: int, nbytes: int) -> None:
    zeros = bytes(1 << 20)
    for done in range(0, nbytes, len(zeros)):
        _write(fd, zeros[: nbytes - done], start + done)


# --- what can be wrong with a place for a file ----------------------------------------------------


def _no_room(error: OSError, wanted: int, had: int, name: str) -> OSError:
    wanted_words, had_words = both_readable(wanted, had)
    return OSError(
        error.errno,
        f"paged state: wanted {wanted_words} more for {name}, had {had_words} free on that disk "
        f"({error.strerror}). Make room, raise the limit, or name another directory with page_dir=",
    )


def _cannot_open(error: OSError, name: str, directory: Path, wanted: int) -> OSError:
    """Return what to raise instead of ``error``, which came when a file was opened or begun."""
    if error.errno in _NO_ROOM:
        return _no_room(error, wanted, _free(directory), name)
    advice = "Name another directory with page_dir="
    if error.errno in _NOT_ALLOWED:
        advice = (
            "This user must be allowed to make files in that directory, and to write to that one "
            "if it is there already: change permissions, or name another directory with page_dir="
        )
    return OSError(error.errno, f"paged state: cannot open {name} ({error.strerror}). {advice}")


def _refuse_stranger(path: Path) -> None:
    """Raise a :class:`FileExistsError` where ``path`` is there, but no ordinary file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # not there, which is fine, or something that opening it will find, too
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISLNK, "symbolic link"), (stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "pipe"))
    kind = next((kind for test, kind in kinds if test(mode)), "device or socket")
    raise FileExistsError(
        errno.EEXIST,
        f"paged state: {path} exists and is a {kind}, no page file; move it away, or name another "
        "directory with page_dir=",
    )


def _open_locked(directory: Path, wanted: int) -> tuple[int, Path]:
    """Return the first page file in ``directory`` that this process does not have, locked."""
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            errno.ENOENT,
            f"paged state: page_dir {directory} is not there (any more), or cannot be reached. "
            f"Make it again (mkdir -p {shlex.quote(str(directory))}), which is the only way for an "
            "optimizer that is unpickled or copied; a new optimizer may have another page_dir=, "
            "and gets the state by load_state_dict()",
        )
    with _holding:
        index = 0
        while True:
            path = directory.resolve() / f"came8bit-{index}.pages"
            if str(path) in _held:
                index += 1
                continue
            fd = _lock(path, directory, wanted)
            if fd is not None:
                _held.add(str(path))
                return fd, path


def _lock(path: Path, directory: Path, wanted: int) -> int | None:
    """Open and lock a page file; ``None`` if its last user has deleted it just now."""
    _refuse_stranger(path)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            fd, made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            try:
                fd, made = os.open(path, flags), False
            except FileNotFoundError:
                return None
    except OSError as error:
        raise _cannot_open(error, str(path), directory, wanted) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        gone = status.st_nlink == 0
        start = os.pread(fd, len(_MAGIC), 0)
    except BlockingIOError as error:
        lines = os.pread(fd, 512, 0).decode(errors="replace").split("\n")
        os.close(fd)
        holder = lines[1] if len(lines) > 2 else "a process that has just begun"
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            f"paged state: {path} is held by another run ({printable(holder, 200)}). Wait for it, "
            "or give this run a page_dir= of its own, every rank of a distributed one too",
        ) from error
    except OSError as error:  # a file system without locks
        os.close(fd)
        raise _cannot_open(error, str(path), directory, wanted) from error
    if made and not gone:
        return fd
    fault = _fault(path, status, start)
    if not (gone or fault) and _is_private(fd, path, status):
        return fd
    os.close(fd)
    if fault and not gone:
        raise FileExistsError(errno.EEXIST, f"paged state: {path} exists and {fault}; move it away")
    return None


def _fault(path: Path, status: os.stat_result, start: bytes) -> str | None:
    """Say why an open file that was there before is not one to keep state in."""
    if start not in (b"", _MAGIC):
        return "is no page file"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, who could read the state"
    return "has another name, too, by a hard link" if status.st_nlink > 1 else None


def _is_private(fd: int, path: Path, status: os.stat_result) -> bool:
    """Return whether only this user can have opened a locked file; else remove it.

    Taking the permissions of others away would leave what they have opened already. A file system
    without permissions cannot do better.
    """
    if not status.st_mode & 0o077:
        return True
    with contextlib.suppress(OSError):
        os.fchmod(fd, 0o600)
    if os.fstat(fd).st_mode & 0o077:
        return True
    os.unlink(path)
    return False
