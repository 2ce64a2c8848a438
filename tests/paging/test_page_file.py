"""Page files: space that is reserved, locks, and everything that can go wrong with a disk."""

import copy
import errno
import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from paged_training import complete, fresh, make, page_file, refuse_a_window, train, unchanged
from training import assert_same

from came8bit import CAME8bit, PagedCAME8bit, load_checkpoint, save_checkpoint
from came8bit.ops import step as stepping
from came8bit.paging import page_file as pagefile
from came8bit.paging import pages
from came8bit.paging.page_file import GRANULE, PageFile
from came8bit.paging.pages import PinnedMemory, both_readable, readable


@contextmanager
def limit(what, value):
    kept = resource.getrlimit(what)
    resource.setrlimit(what, (value, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, kept)


def almost_full(place, real=os.statvfs):
    values = list(real(place))
    values[4] = 3  # blocks available
    return os.statvfs_result(values)


# --- no room --------------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_beforehand(tmp_path, monkeypatch):
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pagefile.os, "statvfs", almost_full)
        wanted = r"wanted \d+\.?\d* KiB more for .*came8bit-0.pages, had \d+ KiB free .*No space"
        with unchanged(optimizer, OSError, wanted):
            train(optimizer, 1)
    assert not optimizer.state
    assert page_file(tmp_path).stat().st_size == GRANULE
    train(optimizer, 2)  # with room, as if nothing had been
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))


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


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {
    "no room for a name": ("open", no_space),
    "no room for the header": ("pwrite", no_space),
    "no room for all of the header": (
        "pwrite",
        lambda fd, content, start, real=os.pwrite: (
            no_space() if start else real(fd, content[:100], start)
        ),
    ),
}


@pytest.mark.parametrize("how", FULL)
@pytest.mark.parametrize("call", ["step", "load_state_dict", "load_checkpoint"])
def test_a_disk_too_full_for_the_file_to_begin(how, call, tmp_path, monkeypatch):
    """Says how much is wanted and free, as when there is no room for the pages."""
    saved = train(make(CAME8bit), 2)
    save_checkpoint(saved, tmp_path / "checkpoint")
    directory = tmp_path / "pages"
    directory.mkdir()
    optimizer = make(PagedCAME8bit, page_dir=directory)
    calls = {
        "step": lambda: train(optimizer, 1),
        "load_state_dict": lambda: optimizer.load_state_dict(saved.state_dict()),
        "load_checkpoint": lambda: load_checkpoint(optimizer, tmp_path / "checkpoint"),
    }
    wanted = r"wanted \d+\.?\d* KiB more for .*came8bit-0.pages, had \d+ KiB free .*\(No space"
    name, replacement = FULL[how]
    real = getattr(os, name)

    def selective(first, *rest, **options):
        """Only page files are on the full disk."""
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        return (replacement if "pages" in path else real)(first, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pagefile.os, "statvfs", almost_full)
        patch.setattr(pagefile.os, name, selective)
        if call == "load_checkpoint":
            with pytest.raises(RuntimeError, match=wanted + ".*; nothing has been changed$"):
                calls[call]()
        else:
            with unchanged(optimizer, OSError, wanted):
                calls[call]()
    assert not optimizer.state
    assert not list(directory.iterdir())
    calls[call]()
    assert page_file(directory).name == "came8bit-0.pages"


def test_an_unnamed_file_on_a_full_disk(monkeypatch):
    optimizer = make(PagedCAME8bit)
    with monkeypatch.context() as patch:
        patch.setattr(pagefile.tempfile, "TemporaryFile", no_space)
        wanted = r"wanted \d+\.?\d* KiB more for the unnamed page file in .*, had .* free"
        with unchanged(optimizer, OSError, wanted):
            train(optimizer, 1)
    train(optimizer, 1)


def test_loading_that_fails_in_the_middle_says_so(tmp_path, monkeypatch):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path), 2)
    saved = optimizer.state_dict()
    message = "no more. A part of the state has been replaced: load again"
    with monkeypatch.context() as patch:
        refuse_a_window(patch, 3)
        with pytest.raises(OSError, match=message):
            optimizer.load_state_dict(saved)
    # Into a new file, the old one is left as it was.
    page_file(tmp_path).unlink()
    with monkeypatch.context() as patch:
        refuse_a_window(patch, 3)
        with pytest.raises(OSError, match=r"no more\. Nothing has been changed"):
            optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert_same(complete(train(make(CAME8bit), 3)), complete(train(optimizer, 1, first=2)))


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
    message = rf"page_dir .* is not there .*mkdir -p {directory}\).*Nothing has been"
    with unchanged(optimizer, FileNotFoundError, message):
        train(optimizer, 1)
    directory.mkdir()
    train(optimizer, 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_directory_in_which_no_file_can_be_made():
    """It is there, and opening a new file says that there is no such file."""
    with pytest.raises(FileNotFoundError, match=r"cannot open /proc/came8bit-0\.pages"):
        PageFile(Path("/proc")).reserve([GRANULE])


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


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_whose_directory_has_gone(how, tmp_path):
    """They cannot be given another one: the message says what can be done."""
    directory = tmp_path / "a directory"
    directory.mkdir()
    optimizer = train(make(PagedCAME8bit, page_dir=directory), 2)
    shutil.rmtree(directory)
    message = rf"Make it again \(mkdir -p '{directory}'\).* only way .* is unpickled or copied"
    with pytest.raises(FileNotFoundError, match=message):
        how(optimizer)
    directory.mkdir()
    assert_same(complete(optimizer), complete(how(optimizer)))


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
    # Reading changes nothing, and its error speaks of no updates.
    ends = "continues in a new file$"
    with pytest.raises(OSError, match="cut it short.*" + ends):
        optimizer.state_dict()
    with pytest.raises(OSError, match="cut it short.*" + ends):
        save_checkpoint(optimizer, tmp_path / "checkpoint")
    optimizer.load_state_dict(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["came8bit-1.pages"]
    assert_same(complete(train(make(CAME8bit), 3)), complete(train(optimizer, 1, first=2)))


def test_a_cut_that_rounding_would_hide_is_given_in_bytes(tmp_path):
    optimizer = train(make(PagedCAME8bit, shapes=[(4096, 4096)], page_dir=tmp_path), 1)
    size = page_file(tmp_path).stat().st_size
    os.truncate(page_file(tmp_path), size - 4096)
    message = f"has {size - 4096} bytes, expected {size} bytes"
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(OSError, match=message):
            call()


def test_a_file_that_is_cut_short_during_a_step(tmp_path, monkeypatch):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    saved, real, calls = optimizer.state_dict(), stepping._call_operators, []

    def step_and_cut(group, squares, members):
        real(group, squares, members)
        calls.append(len(members))
        if len(calls) == 3:
            os.truncate(page_file(tmp_path), 0)

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "_call_operators", step_and_cut)
        message = "Parameters that came before this one have been updated"
        with pytest.raises(OSError, match=message) as caught:
            train(optimizer, 1, first=2)
    assert "Nothing has been changed" not in str(caught.value)
    assert len(calls) == 3
    optimizer.load_state_dict(saved)
    train(optimizer, 1, first=2)


def test_windows_that_cannot_be_had_during_a_step(tmp_path, monkeypatch):
    """The step breaks off; no page is lost, and the next step finds everything."""
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    with monkeypatch.context() as patch:
        refuse_a_window(patch, 3)
        with pytest.raises(OSError, match="no more"):
            train(optimizer, 1, first=2)
    steps = [int(state["step"]) for state in optimizer.state.values()]
    assert set(steps) == {2, 3}
    train(optimizer, 1, first=3)
    assert [int(state["step"]) for state in optimizer.state.values()] == [s + 1 for s in steps]
    expected = make(CAME8bit)
    left_out = {(2, index) for index, step in enumerate(steps) if step == 2}
    assert_same(complete(train(expected, 4, left_out=left_out)), complete(optimizer))


# --- the backing stores themselves --------------------------------------------------------------


def backings(tmp_path):
    yield PageFile(tmp_path)
    yield PageFile(None)
    yield PinnedMemory(lambda n: torch.zeros(n, dtype=torch.uint8), slab=1 << 13)


def test_homes_keep_bytes_and_give_out_zeros(tmp_path):
    for backing in backings(tmp_path):
        sizes = [5000, 70_000, 256, 5000]
        places = list(zip(backing.reserve(sizes), sizes, strict=True))
        for number, (address, size) in enumerate(places):
            pieces = backing.pieces(address, size)
            assert sum(piece.numel() for piece in pieces) == size
            for piece in pieces:
                assert not piece.any()
                piece.fill_(number + 1)
        for number, (address, size) in enumerate(places):
            for piece in backing.pieces(address, size):
                assert piece.eq(number + 1).all()
        backing.release(*places[0])
        (again,) = backing.reserve([5000])
        assert again == places[0][0]
        assert not any(piece.any() for piece in backing.pieces(again, 5000))
        (other,) = backing.reserve([5000])
        assert other not in [address for address, _ in places]
        backing.check()


# This machine may have no accelerator: then PyTorch itself refuses to pin.


def test_refused_pinned_memory_says_how_much_and_offers_the_file(monkeypatch):
    def refuse_the_third(nbytes, given=[]):  # noqa: B006
        given.append(nbytes)
        if len(given) == 3:
            raise RuntimeError("CUDA error: out of memory\nmore text")
        return torch.zeros(nbytes, dtype=torch.uint8)

    backing = PinnedMemory(refuse_the_third, slab=1 << 20)
    message = (
        r"wanted 4 MiB of pinned host memory, had 2 MiB of it when 1 MiB more were refused "
        r"\(CUDA error: out of memory; .* available then\)\. Give page_dir="
    )
    with pytest.raises(MemoryError, match=message):
        backing.reserve([1 << 21, 1 << 21])
    assert backing.reserve([1 << 21]) == [0]  # as if nothing had been asked for
    monkeypatch.setattr(pages, "_available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"more than is available; 1000 bytes of host memory"):
        backing.reserve([1 << 22])


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory is to be had here")
def test_pytorch_refuses_to_pin_without_an_accelerator():
    with pytest.raises(MemoryError, match=r"wanted 64 KiB of pinned host memory, had 0 bytes"):
        PinnedMemory().reserve([1 << 16])
    with pytest.raises(MemoryError, match=r"as much as page_budget is, .* Lower page_budget="):
        pages.pinned_staging(1 << 16)


def test_bytes_in_words():
    expected = ["0 bytes", "1023 bytes", "1 KiB", "1.5 MiB", "6.519 GiB", "2048 TiB"]
    assert [readable(n) for n in (0, 1023, 1024, 3 << 19, 7 * 10**9, 1 << 51)] == expected
    assert both_readable(1 << 30, 3 << 29) == ("1 GiB", "1.5 GiB")
    assert both_readable(1 << 30, (1 << 30) - 1) == ("1073741824 bytes", "1073741823 bytes")
    assert both_readable(1 << 30, 1 << 30) == ("1 GiB", "1 GiB")
