"""Kills processes that are saving, and looks at what they leave; run by test_checkpoint_atomic.

    python kill_saves.py FOLDER save 50         processes that save an optimizer's state
    python kill_saves.py FOLDER file 300        processes that write with atomic_file alone
    python kill_saves.py FOLDER lines           one death before every line of atomic_file

Prints one JSON object. Children are forked. With torch in memory a fork takes long, so only the
first kind imports it; the others load the module they test by its path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Save = Callable[[int, Path], object]
"""Writes version 0 or 1 to a path."""


def load_atomic():
    source = Path(__file__).resolve().parents[2] / "came8bit" / "atomic_file.py"
    spec = importlib.util.spec_from_file_location("atomic", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_file() -> Save:
    atomic = load_atomic()

    def save(version: int, path: Path) -> None:
        with atomic.atomic_file(path) as file:
            file.write(b" " * 100)
            for _ in range(20):
                file.write(b"%d" % version * 10_000)
            file.seek(0)
            file.write(b"%d" % version)

    return save


def save_state() -> Save:
    import torch
    from checkpoints import trained

    from came8bit import save_checkpoint

    torch.set_num_threads(1)
    shapes = {"m": (256, 600), "n": (100, 256), "v": (20,)}
    optimizers = [trained(shapes=shapes, steps=steps)[1] for steps in (1, 2)]
    return lambda version, path: save_checkpoint(optimizers[version], path)


def contents_of(save: Save, path: Path) -> list[bytes]:
    """The bytes of both versions; the first of them stays."""
    contents = []
    for version in (1, 0):
        save(version, path)
        contents.insert(0, path.read_bytes())
    return contents


def leftovers(folder: Path) -> int:
    return sum(name.startswith(".came8bit-") for name in os.listdir(folder))


def wait(pid: int) -> int:
    """Signal that ended the process, 0 if it ended by itself."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the saving process failed"
    return 0


def at_random_instants(folder: Path, save: Save, kills: int) -> dict[str, object]:
    """Children that save one version after the other for ever, killed at any time."""
    path = folder / "x.safetensors"
    contents = contents_of(save, path)
    choose = random.Random(0)
    seen: Counter[str] = Counter()
    for kill in range(kills):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                first = turn = kill // 2  # both versions are seen even if no second save ends
                while True:
                    save(turn % 2, path)
                    if turn == first:
                        os.write(writing, b"!")
                    turn += 1
            finally:
                os._exit(1)
        begin = time.perf_counter()
        if kill % 2:
            # The first save is done; what it took, with a slow fork, bounds the time to wait.
            os.read(reading, 1)
        else:
            time.sleep(0.001)
        took = time.perf_counter() - begin
        time.sleep(choose.uniform(0, min(took, 0.02)))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == signal.SIGKILL
        os.close(reading)
        os.close(writing)
        content = path.read_bytes()
        seen[str(contents.index(content)) if content in contents else "broken"] += 1
        count = leftovers(folder)
        seen["in the middle"] += count > 0
        seen["piled up"] += count > 1
    save(0, path)
    return {**seen, "left at the end": leftovers(folder)}


def at_every_line(folder: Path) -> dict[str, object]:
    """A child per line of the module that writes, killed before that line."""
    save = save_file()
    path = folder / "x.safetensors"
    contents = contents_of(save, path)
    seen: list[str] = []
    killed = -1
    while killed:
        save(0, path)
        pid = os.fork()
        if pid == 0:
            left = len(seen)

            def trace(frame, event, argument):
                nonlocal left
                if not frame.f_code.co_filename.endswith("atomic_file.py"):
                    return None
                if event == "line":
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            try:
                sys.settrace(trace)
                save(1, path)
                sys.settrace(None)
                os._exit(0)
            finally:
                os._exit(1)
        killed = wait(pid)
        content = path.read_bytes()
        seen.append(("old", "new")[contents.index(content)] if content in contents else "broken")
    return {"seen": seen, "left at the end": leftovers(folder)}


def main(folder: str, what: str, kills: str = "0") -> None:
    if what == "lines":
        found = at_every_line(Path(folder))
    else:
        save = save_state() if what == "save" else save_file()
        found = at_random_instants(Path(folder), save, int(kills))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
