"""Page files: space that is reserved, locks, and everything that can go wrong with a disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_paged import complete, fresh, make, train
from training import assert_same

from came8bit import CAME8bit, PagedCAME8bit, stepping
from came8bit.state import pagefile, pinned
from came8bit.state.pagefile import GRANULE, PageFile, default_directory
from came8bit.state.pages import in_words
from came8bit.state.pinned import PinnedMemory


@contextmanager
def unchanged(optimizer, error, message):
    """The block raises, and parameters and state are what they were."""
    before = complete(optimizer)
    with pytest.raises(error, match=message):
        yield
    assert_same(before, complete(optimizer))


@contextmanager
def limit(what, value):
    kept = resource.getrlimit(what)
    resource.setrlimit(what, (value, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, kept)


def page_file(directory):
    (path,) = directory.iterdir()
    return path


# --- no room --------------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_beforehand(tmp_path, monkeypatch):
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    real = os.fstatvfs

    def almost_full(fd):
        values = list(real(fd))
        values[4] = 3  # blocks available
        return os.statvfs_result(values)

    with monkeypatch.context() as patch:
        patch.setattr(pagefile.os, "fstatvfs", almost_full)
        wanted = r"wanted \d+\.?\d* KiB more for .*came8bit-0.pages, had \d+ KiB free .*No space"
        with unchanged(optimizer, OSError, wanted) as raised:
            train(optimizer, 1)
    assert not optimizer.state
    assert page_file(tmp_path).stat().st_size == GRANULE
    train(optimizer, 2)  # with room, as if nothing had been
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))
    del raised


def test_a_limit_on_files_is_noticed_beforehand(tmp_path):
    """The system itself refuses: half of the room is not enough."""
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with limit(resource.RLIMIT_FSIZE, 200_000), unchanged(optimizer, OSError, "File too large"):
        train(optimizer, 1)
    assert not optimizer.state
    assert page_file(tmp_path).stat().st_size == GRANULE
    train(optimizer, 1)
    # A parameter that comes later needs more.
    optimizer.add_param_group({"params": make(CAME8bit).param_groups[0]["params"]})
    size = page_file(tmp_path).stat().st_size
    with limit(resource.RLIMIT_FSIZE, size + 100_000), unchanged(optimizer, OSError, "too large"):
        train(optimizer, 1, first=1)
    assert page_file(tmp_path).stat().st_size == size
    train(optimizer, 1, first=1)


def test_loading_into_a_full_disk_changes_nothing(tmp_path):
    saved = train(make(CAME8bit), 2).state_dict()
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    optimizer.param_groups[0]["lr"] = 7.0
    with limit(resource.RLIMIT_FSIZE, 200_000), unchanged(optimizer, OSError, "File too large"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_address_space_is_tried_before_a_step(tmp_path, monkeypatch):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 1)

    def refuse(*arguments, **options):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with monkeypatch.context() as patch:
        patch.setattr(pagefile.mmap, "mmap", refuse)
        with pytest.raises(OSError, match=r"cannot map .* lower page_budget="):
            train(optimizer, 1, first=1)
    for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(p, q)
    train(optimizer, 1, first=1)
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))


# --- no directory, no file ------------------------------------------------------------------------


def test_the_directory_has_gone_before_the_first_step(tmp_path):
    directory = tmp_path / "pages"
    directory.mkdir()
    optimizer = make(PagedCAME8bit, page_dir=directory)
    directory.rmdir()
    with unchanged(optimizer, FileNotFoundError, r"page_dir .* is not there .*Nothing has been"):
        train(optimizer, 1)
    directory.mkdir()
    train(optimizer, 1)


def test_the_directory_has_gone_later(tmp_path):
    directory = tmp_path / "pages"
    directory.mkdir()
    optimizer = train(make(PagedCAME8bit, page_dir=directory), 2)
    shutil.rmtree(directory)
    message = r"came8bit-0.pages has been deleted while in use.* state can still be read"
    with unchanged(optimizer, FileNotFoundError, message):
        train(optimizer, 1, first=2)
    rescued = fresh(optimizer, PagedCAME8bit)
    rescued.load_state_dict(optimizer.state_dict())
    expected = train(make(CAME8bit), 3)
    assert_same(complete(expected), complete(train(rescued, 1, first=2)))
    with unchanged(optimizer, FileNotFoundError, "is not there"):
        optimizer.load_state_dict(rescued.state_dict())


@pytest.mark.parametrize("left", [0, GRANULE, 300_000])
def test_a_file_that_was_cut_short_is_not_touched(tmp_path, left):
    """To read what is not there would kill the process with SIGBUS."""
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path), 2)
    saved = optimizer.state_dict()
    params = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    os.truncate(page_file(tmp_path), left)
    with pytest.raises(OSError, match=r"came8bit-0.pages has .*, expected .* part of the moment"):
        train(optimizer, 1, first=2)
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        assert torch.equal(p, q)
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())
    with pytest.raises(OSError, match="cut it short"):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["came8bit-1.pages"]
    assert_same(complete(train(make(CAME8bit), 3)), complete(train(optimizer, 1, first=2)))


def test_a_file_that_is_cut_short_during_a_step(tmp_path, monkeypatch):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    saved, real, calls = optimizer.state_dict(), stepping._step_dense, []

    def step_and_cut(group, members):
        real(group, members)
        calls.append(len(members))
        if len(calls) == 3:
            os.truncate(page_file(tmp_path), 0)

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "_step_dense", step_and_cut)
        with pytest.raises(OSError, match=r"Parameters that came before this one have been upda"):
            train(optimizer, 1, first=2)
    assert len(calls) == 3
    optimizer.load_state_dict(saved)
    train(optimizer, 1, first=2)


def test_windows_that_cannot_be_had_during_a_step(tmp_path, monkeypatch):
    """The step breaks off; no page is lost, and the next step finds everything."""
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    real, calls = PageFile.pieces, []

    def refuse_the_third(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOMEM, "no more")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PageFile, "pieces", refuse_the_third)
        with pytest.raises(OSError, match="no more"):
            train(optimizer, 1, first=2)
    steps = [int(state["step"]) for state in optimizer.state.values()]
    assert set(steps) == {2, 3}
    train(optimizer, 1, first=3)
    assert [int(state["step"]) for state in optimizer.state.values()] == [s + 1 for s in steps]
    expected = make(CAME8bit)
    left_out = {(2, index) for index, step in enumerate(steps) if step == 2}
    assert_same(complete(train(expected, 4, left_out=left_out)), complete(optimizer))


# --- other runs -----------------------------------------------------------------------------------

HOLDER = """
    import sys
    from pathlib import Path
    from came8bit.state.pagefile import PageFile
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
        message = rf"held by another run \(process {process.pid} on .*\)\. Nothing has been ch"
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


def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path):
    path = tmp_path / "came8bit-0.pages"
    path.write_text("a photo album")
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with unchanged(optimizer, FileExistsError, "exists and is no page file; move it away"):
        train(optimizer, 1)
    assert path.read_text() == "a photo album"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with unchanged(optimizer, OSError, "symbolic links"):
        train(optimizer, 1)
    assert not (tmp_path / "elsewhere").exists()


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
    assert f"{tmp_path}/" in os.readlink(f"/proc/self/fd/{optimizer._pager._file._fd}")
    monkeypatch.delenv("TMPDIR")
    assert default_directory() == Path("/var/tmp")
    pagefile.tempfile.tempdir = None


# --- the homes themselves -------------------------------------------------------------------------


def homes(tmp_path):
    yield PageFile(tmp_path)
    yield PageFile(None)
    yield PinnedMemory(lambda n: torch.zeros(n, dtype=torch.uint8), slab=1 << 13)


def test_homes_keep_bytes_and_give_out_zeros(tmp_path):
    for home in homes(tmp_path):
        sizes = [5000, 70_000, 256, 5000]
        places = list(zip(home.reserve(sizes), sizes, strict=True))
        for number, (address, size) in enumerate(places):
            pieces = home.pieces(address, size)
            assert sum(piece.numel() for piece in pieces) == size
            for piece in pieces:
                assert not piece.any()
                piece.fill_(number + 1)
        for number, (address, size) in enumerate(places):
            for piece in home.pieces(address, size):
                assert piece.eq(number + 1).all()
        home.release(*places[0])
        (again,) = home.reserve([5000])
        assert again == places[0][0]
        assert not any(piece.any() for piece in home.pieces(again, 5000))
        (other,) = home.reserve([5000])
        assert other not in [address for address, _ in places]
        home.check()


# This machine may have no accelerator: then PyTorch itself refuses to pin.


def test_refused_pinned_memory_says_how_much_and_offers_the_file(monkeypatch):
    def refuse_the_third(nbytes, given=[]):  # noqa: B006
        given.append(nbytes)
        if len(given) == 3:
            raise RuntimeError("CUDA error: out of memory\nmore text")
        return torch.zeros(nbytes, dtype=torch.uint8)

    home = PinnedMemory(refuse_the_third, slab=1 << 20)
    message = (
        r"wanted 4 MiB of pinned host memory, had 2 MiB of it when 1 MiB more were refused "
        r"\(CUDA error: out of memory; .* available then\)\. Nothing has been changed\. "
        r"Give page_dir="
    )
    with pytest.raises(MemoryError, match=message):
        home.reserve([1 << 21, 1 << 21])
    assert home.reserve([1 << 21]) == [0]  # as if nothing had been asked for
    monkeypatch.setattr(pinned, "_available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"more than is available; 1000 bytes of host memory"):
        home.reserve([1 << 22])


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory is to be had here")
def test_pytorch_refuses_to_pin_without_an_accelerator():
    with pytest.raises(MemoryError, match=r"wanted 64 KiB of pinned host memory, had 0 bytes"):
        PinnedMemory().reserve([1 << 16])
    with pytest.raises(MemoryError, match=r"as much as page_budget is, .* Lower page_budget="):
        pinned.pinned_bounce(1 << 16)


def test_bytes_in_words():
    expected = ["0 bytes", "1023 bytes", "1 KiB", "1.5 MiB", "6.519 GiB", "2048 TiB"]
    assert [in_words(n) for n in (0, 1023, 1024, 3 << 19, 7 * 10**9, 1 << 51)] == expected
