"""Page files of several runs: locks, files that are left behind, crashes."""

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from paged_training import complete, make, page_file, train, unchanged
from training import assert_same, in_threads

from came8bit import CAME8bit, PagedCAME8bit
from came8bit.paging import page_file as pagefile
from came8bit.paging.page_file import PageFile, default_directory

HOLDER = """
    import sys
    from pathlib import Path
    from came8bit.paging.page_file import PageFile
    file = PageFile(Path(sys.argv[1]))
    file.reserve([5000])
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_run(directory):
    """Another process with a page file there; it is killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_file_of_another_run_is_refused_and_one_of_a_dead_run_used(tmp_path):
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with other_run(tmp_path) as process:
        message = rf"held by another run \(process {process.pid} on .*\)\. Wait for it"
        with unchanged(optimizer, BlockingIOError, message):
            train(optimizer, 1)
        assert not optimizer.state
    assert page_file(tmp_path).name == "came8bit-0.pages"  # left behind
    train(optimizer, 2)
    assert page_file(tmp_path).name == "came8bit-0.pages"
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))


def test_two_optimizers_of_one_run_share_a_directory(tmp_path):
    first, second = (make(PagedCAME8bit, page_dir=tmp_path) for _ in range(2))
    train(first, 2)
    train(second, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "came8bit-0.pages",
        "came8bit-1.pages",
    ]
    assert_same(complete(first), complete(second))
    del first
    assert page_file(tmp_path).name == "came8bit-1.pages"
    train(make(PagedCAME8bit, page_dir=tmp_path), 1)


def slow(call):
    """``call``, after which other threads get a turn."""

    def slowed(*arguments):
        result = call(*arguments)
        time.sleep(0.05)
        return result

    return slowed


@pytest.mark.parametrize("moment", [(pagefile.fcntl, "flock"), (pagefile.os, "unlink")])
def test_threads_share_a_directory(moment, tmp_path, monkeypatch):
    """Files are locked, and let go of, while others look for one; nobody meets a foreign lock."""
    monkeypatch.setattr(*moment, slow(getattr(*moment)))
    names, together = [], threading.Barrier(4, timeout=60)

    def work():
        for _ in range(3):
            together.wait()
            file = PageFile(tmp_path)
            file.reserve([5000])
            together.wait()
            names.append(file.name)
            del file  # deletes it, while another thread may be at its next one

    in_threads(*[work] * 4)
    for start in range(0, 12, 4):
        assert len(set(names[start : start + 4])) == 4
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path):
    path = tmp_path / "came8bit-0.pages"
    path.write_text("a photo album")
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with unchanged(optimizer, FileExistsError, "exists and is no page file; move it away"):
        train(optimizer, 1)
    assert path.read_text() == "a photo album"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with unchanged(optimizer, FileExistsError, "is a symbolic link, no page file; move it away"):
        train(optimizer, 1)
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    train(optimizer, 1)


def dead_run_left(directory, mode=0o600):
    path = directory / "came8bit-0.pages"
    path.write_bytes(b"came8bit pages\nprocess 1 on \x1b[2J\n".ljust(4096, b"\0"))
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604, 0o620])
def test_a_file_that_others_may_have_opened_is_not_used(mode, tmp_path):
    path = dead_run_left(tmp_path, mode)
    with open(path, "rb") as others:
        optimizer = make(PagedCAME8bit, page_dir=tmp_path)
        train(optimizer, 1)
        assert path.stat().st_mode & 0o777 == 0o600
        assert not os.path.samestat(path.stat(), os.fstat(others.fileno()))
        assert len(others.read()) == 4096  # as it was


def test_a_file_system_without_permissions_is_used(tmp_path, monkeypatch):
    path = dead_run_left(tmp_path, 0o777)
    monkeypatch.setattr(os, "fchmod", lambda *arguments: None)
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    train(optimizer, 1)
    assert path.stat().st_size > 4096


def test_files_of_others_and_with_other_names_are_refused(tmp_path, monkeypatch):
    path = dead_run_left(tmp_path)
    os.link(path, tmp_path / "other")
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with unchanged(optimizer, FileExistsError, "has another name, too, by a hard link; move it"):
        train(optimizer, 1)
    (tmp_path / "other").unlink()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with unchanged(optimizer, FileExistsError, f"belongs to user {own}, who could read the state"):
        train(optimizer, 1)
    monkeypatch.undo()
    train(optimizer, 1)


KINDS = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "symbolic link": lambda path: path.symlink_to("/dev/zero"),
    "device or socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_ordinary_file_is_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    KINDS[kind](Path("came8bit-0.pages"))
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    message = f"exists and is a {kind}, no page file; move it away, or name another directory"
    with unchanged(optimizer, FileExistsError, message):
        train(optimizer, 1)
    assert os.path.lexists("came8bit-0.pages")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EMFILE])
def test_a_directory_where_no_file_can_be_made(code, tmp_path, monkeypatch):
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)

    def refuse(path, *arguments, **options):
        raise OSError(code, os.strerror(code), path)

    message = r"paged state: cannot open .*came8bit-0.pages \(.*\)\. .*ame another directory"
    with monkeypatch.context() as patch:
        patch.setattr(pagefile.os, "open", refuse)
        with unchanged(optimizer, OSError, message):
            train(optimizer, 1)
        if code != errno.EMFILE:
            message = r"This user must be allowed to .*: change permissions, or name another"
            with unchanged(optimizer, OSError, message):
                train(optimizer, 1)
    train(optimizer, 1)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    monkeypatch.setattr(pagefile.fcntl, "flock", refuse)
    with unchanged(optimizer, OSError, r"cannot open .* \(No locks available\)\. Name another"):
        train(optimizer, 1)


def test_a_forked_process_neither_uses_nor_deletes_pages(tmp_path):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path), 1)  # gradients are still there
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Threads of an operator are not forked with it: the child must be refused before any runs.
        signal.alarm(60)
        try:
            optimizer.step()
        except OSError as error:
            os.write(write, str(error).encode())
        finally:
            del optimizer
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert f"belongs to process {os.getpid()}" in os.read(read, 1000).decode()
    os.close(read)
    assert page_file(tmp_path).exists()
    train(optimizer, 1, first=1)
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))


def test_nothing_is_left_of_an_unnamed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pagefile.tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_directory() == tmp_path
    optimizer = train(make(PagedCAME8bit), 2)
    assert not list(tmp_path.iterdir())
    assert f"{tmp_path}/" in os.readlink(f"/proc/self/fd/{optimizer._store.pager._file._fd}")
    monkeypatch.delenv("TMPDIR")
    assert default_directory() == Path("/var/tmp")
    pagefile.tempfile.tempdir = None
