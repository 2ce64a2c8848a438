"""A save leaves the old file or the new one, whatever happens; nothing piles up."""

import json
import os
import re
import resource
import shutil
import stat

import pytest
from checkpoints import copies, trained
from paths import ROOT
from processes import run_python
from training import in_threads

from came8bit import CAME8bit, load_checkpoint, save_checkpoint
from came8bit import atomic_file as atomic
from came8bit.checkpoint import save

SHAPES = {"m": (256, 600), "v": (20,)}


@pytest.fixture(scope="module")
def optimizer():
    return trained(shapes=SHAPES, steps=1)[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(folder, *arguments):
    """What kill_saves.py found."""
    script = ROOT / "tests" / "support" / "kill_saves.py"
    done = run_python("-W", "ignore", script, folder, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("what", "kills"), [("save", 30), ("file", 200)])
def test_kill_9_at_random_instants_leaves_a_whole_file(tmp_path, what, kills):
    seen = killed(tmp_path, what, str(kills))
    assert seen["0"] + seen["1"] == kills  # the one version or the other, to the last bit
    assert min(seen["0"], seen["1"]) > kills // 20
    assert seen["in the middle"] > kills // 20  # or the kills have not met a save
    assert seen["piled up"] == 0
    assert seen["left at the end"] == 0


def test_kill_9_before_every_line_leaves_a_whole_file(tmp_path):
    found = killed(tmp_path, "lines")
    seen = found["seen"]
    assert len(seen) > 30
    new = seen.index("new")
    assert set(seen[:new]) == {"old"}
    assert set(seen[new:]) == {"new"}
    assert found["left at the end"] == 0


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, optimizer):
    dead = tmp_path / ".came8bit-0123456789abcdef.tmp"
    dead.write_bytes(b"half a file")
    others = ["notes.tmp", ".came8bit-notes", ".came8bit-link.tmp"]
    (tmp_path / others[0]).touch()
    (tmp_path / others[1]).touch()
    (tmp_path / others[2]).symlink_to(tmp_path / others[0])
    with atomic.atomic_file(tmp_path / "living") as file:
        file.write(b"begun")
        (living,) = set(names(tmp_path)) - set(others)
        save_checkpoint(optimizer, tmp_path / "x")
        assert names(tmp_path) == sorted([living, "x", *others])
        file.write(b" and finished")
    assert (tmp_path / "living").read_bytes() == b"begun and finished"
    assert names(tmp_path) == sorted(["living", "x", *others])


def test_threads_do_not_disturb_each_other(tmp_path, optimizer):
    save_checkpoint(optimizer, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()

    def work():
        for _ in range(15):
            save_checkpoint(optimizer, tmp_path / "x")
            assert (tmp_path / "x").read_bytes() == content

    in_threads(*[work] * 4)
    assert names(tmp_path) == ["x"]


def test_a_new_file_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch, optimizer):
    """Another process may look between the making of a file and its lock."""
    lock, taken = atomic._lock, []

    def late(descriptor, path):
        if len(taken) < 3:
            taken.append(path)
            atomic.remove_leftovers(tmp_path)
        return lock(descriptor, path)

    monkeypatch.setattr(atomic, "_lock", late)
    save_checkpoint(optimizer, tmp_path / "x")
    assert len(set(taken)) == 3
    assert names(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_old_file(tmp_path, optimizer):
    path = tmp_path / "x"
    size = save_checkpoint(optimizer, path)
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            save_checkpoint(optimizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    said = re.search(
        r"wanted ([\d,]+) bytes, ([\d,]+) are free in .*; what was there", str(caught.value)
    )
    wanted, free = (int(number.replace(",", "")) for number in said.groups())
    assert wanted == size
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, optimizer, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupted(tensor):
        raise error

    monkeypatch.setattr(save, "pieces", interrupted)
    with pytest.raises(error):
        save_checkpoint(optimizer, path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_the_order_of_system_calls_is_the_durable_one(tmp_path, monkeypatch, optimizer):
    """Written out before it gets its name; the folder after that."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        mode = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(mode.st_mode) else mode.st_size)
        fsync(descriptor)

    def noted_replace(*arguments):
        calls.append("replace")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    size = save_checkpoint(optimizer, tmp_path / "x")
    assert calls == [size, "replace", "folder"]


def test_unusable_paths_are_refused(tmp_path, optimizer):
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        save_checkpoint(optimizer, tmp_path / "nowhere" / "x")
    with pytest.raises(OSError, match="exists and is not a file"):
        save_checkpoint(optimizer, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="exists and is not a file"):
        save_checkpoint(optimizer, tmp_path / "pipe")
    assert names(tmp_path) == ["pipe"]


def test_a_folder_that_takes_no_files_is_told_by_the_path(tmp_path, optimizer, monkeypatch):
    """Not by a temporary name, of which nobody has heard."""

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(atomic.os, "open", denied)
    with pytest.raises(PermissionError) as caught:
        save_checkpoint(optimizer, tmp_path / "x")
    assert caught.value.filename == tmp_path / "x"
    assert names(tmp_path) == []


def test_a_link_stays_a_link(tmp_path, optimizer):
    (tmp_path / "there").mkdir()
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "there" / "x")
    save_checkpoint(optimizer, link)
    assert link.is_symlink()
    assert names(tmp_path / "there") == ["x"]
    params, _ = trained(shapes=SHAPES, steps=0)
    load_checkpoint(CAME8bit(copies(params).items()), link)


# --- permissions ----------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the umask of the test; restored afterwards."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_what_the_umask_leaves(tmp_path, optimizer, umask, mask, expected):
    umask(mask)
    save_checkpoint(optimizer, tmp_path / "x")
    assert mode(tmp_path / "x") == expected


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666, 0o444, 0o400])
@pytest.mark.parametrize("link", [False, True])
def test_a_replaced_file_keeps_its_permissions(tmp_path, optimizer, umask, kept, link):
    """A read-only file too is replaced, for it is the folder that has to be writable."""
    path = target = tmp_path / "x"
    if link:
        target = tmp_path / "latest"
        target.symlink_to(path)
    path.write_bytes(b"old")
    path.chmod(kept)
    umask(0o022)
    save_checkpoint(optimizer, target)
    assert path.stat().st_size > 3
    assert mode(path) == kept


def test_nobody_else_reads_a_private_file_while_it_is_written(tmp_path, umask):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o600)
    umask(0)
    with atomic.atomic_file(path) as file:
        file.write(b"secret")
        (temporary,) = tmp_path.glob(".came8bit-*.tmp")
        assert mode(temporary) == 0o600
    assert path.read_bytes() == b"secret"


@pytest.mark.parametrize(("refused", "expected"), [(False, 0o654), (True, 0o644)])
def test_owner_and_group_are_kept_where_the_system_allows(tmp_path, monkeypatch, refused, expected):
    """Where it does not, the group is another one, and gets what everybody may."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o654)
    here, fstat, asked = path.stat(), os.fstat, []

    def of_others(descriptor):
        return os.stat_result((0o100600, 0, 0, 1, here.st_uid + 1, here.st_gid + 1, *[0] * 4))

    def chown(descriptor, owner, group):
        asked.append((owner, group))
        if refused:
            raise PermissionError

    monkeypatch.setattr(os, "fchown", chown)
    with atomic.atomic_file(path) as file:
        file.write(b"new")
        monkeypatch.setattr(os, "fstat", of_others)
    monkeypatch.setattr(os, "fstat", fstat)
    assert asked == [(-1, here.st_gid), (here.st_uid, -1)]
    assert path.read_bytes() == b"new"
    assert mode(path) == expected


def test_a_file_system_without_permissions_is_no_error(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)

    def refused(descriptor, mode):
        raise PermissionError

    monkeypatch.setattr(os, "fchmod", refused)
    with atomic.atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600


def test_a_leftover_that_has_become_read_only_goes(tmp_path, monkeypatch):
    dead = tmp_path / ".came8bit-0123456789abcdef.tmp"
    dead.write_bytes(b"a whole file, but for its name")
    dead.chmod(0o444)
    real = os.open

    def strict(path, flags, *rest):
        """As for those who are not root."""
        if os.fspath(path) == os.fspath(dead) and flags & os.O_RDWR:
            raise PermissionError
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", strict)
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_file_replaced_while_it_is_read_does_not_mix(tmp_path, monkeypatch, optimizer):
    from came8bit.checkpoint import load

    path = tmp_path / "x"
    save_checkpoint(optimizer, path)
    _, later = trained(shapes=SHAPES, steps=2)
    verify = load.verify

    def verify_and_replace(source):
        faults = verify(source)
        save_checkpoint(later, path)
        return faults

    monkeypatch.setattr(load, "verify", verify_and_replace)
    params, _ = trained(shapes=SHAPES, steps=0)
    other = CAME8bit(copies(params).items())
    load_checkpoint(other, path)
    steps = {int(state["step"]) for state in other.state.values()}
    assert steps == {1}
