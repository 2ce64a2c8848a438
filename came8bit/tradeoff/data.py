"""The data: where text and images come from, how they are split, and the batches cut from them.

Every source is a fixed sequence of bytes or images, described by a sha256, and is split in one
fixed way into a part to train on, a part on which learning rates are chosen, and a part on which
results are reported. The parts are contiguous and do not touch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import CliError
from .config import TaskConfig

#: Text that ``tools/fetch_data.py`` can fetch; ``stdlib`` needs no fetching.
CORPORA = ("stdlib", "gcide", "austen", "wordnet", "linux-docs", "python-docs", "shakespeare")

# Folders of the standard library that are left out: installed packages, tests (not on every
# machine), and the character tables in encodings, which are generated.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_STDLIB_WITHOUT |= {"encodings", "lib2to3"}

_FASHION_MNIST = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

Item = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Text:
    """Text as bytes (uint8, 1-D) in three parts; ``about`` describes the source."""

    about: dict[str, Any]
    train: np.ndarray
    tune: np.ndarray
    validation: np.ndarray


@dataclass(frozen=True)
class Images:
    """Per part, images (uint8, n×28×28) and labels (uint8, n). ``about`` describes the source."""

    about: dict[str, Any]
    train: tuple[np.ndarray, np.ndarray]
    tune: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]


Data = Text | Images


def load_text(files: Sequence[Path] | None, corpus: str, data_dir: Path) -> Text:
    """Load text from ``files`` in the order given or, without any, from ``corpus``.

    Raises:
        CliError: If a file cannot be read, or a corpus has not been fetched.
    """
    if files:
        return split_text(_read_files(files), {"source": "files", "files": [f.name for f in files]})
    if corpus == "stdlib":
        return _standard_library()
    path = data_dir / "text" / f"{corpus}.txt"
    if not path.is_file():
        raise CliError(
            f"corpus {corpus!r} is not in {data_dir} (looked for {path}): run `make data`, or give "
            f"--data-dir, or use --corpus stdlib, which needs no fetching"
        )
    return split_text(path.read_bytes(), {"source": corpus, **_provenance(corpus, data_dir)})


def _provenance(name: str, data_dir: Path) -> dict[str, Any]:
    """Return package, version and licence as written down by ``tools/fetch_data.py``, if any."""
    try:
        entry = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))[name]
        return {key: entry[key] for key in ("package", "version", "licence")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def split_text(text: bytes, about: dict[str, Any]) -> Text:
    """Cut the text: 90 % to train on, the next 5 % to tune on, the last 5 % to report on."""
    tokens = np.frombuffer(text, dtype=np.uint8)
    first, second = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    about = about | {
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
        "split": "contiguous: first 90 % train, next 5 % tune, last 5 % validation",
    }
    return Text(about, tokens[:first], tokens[first:second], tokens[second:])


def _read_files(files: Sequence[Path]) -> bytes:
    parts = []
    for path in files:
        if path.is_dir():
            raise CliError(f"--text {path}: is a folder; name its files, for example {path}/*.txt")
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise CliError(f"--text {path}: cannot be read: {error.strerror or error}") from error
    return b"\n".join(parts)


def _standard_library() -> Text:
    """Join the sources of the running Python's standard library, sorted by their relative paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _STDLIB_WITHOUT.intersection(relative.parts) and path.is_file():
            found[relative.as_posix()] = path
    text = b"\n".join(found[name].read_bytes() for name in sorted(found))
    if len(text) < 1_000_000:
        raise CliError(
            f"this Python has almost no sources in {root} ({len(text)} bytes, expected some "
            f"10 MB): name files with --text"
        )
    about = {
        "source": f"Python {sysconfig.get_python_version()} standard library sources",
        "files": len(found),
        "order": "sorted by path below the library's folder",
        "without": sorted(_STDLIB_WITHOUT),
    }
    return split_text(text, about)


def load_images(data_dir: Path) -> Images:
    """Load Fashion-MNIST: 5,000 of the training images to tune on, the test images to report on.

    Raises:
        CliError: If it has not been fetched.
    """
    folder = data_dir / "fashion-mnist"
    arrays = {}
    digest = hashlib.sha256()
    for part, names in _FASHION_MNIST.items():
        for name in names:
            if not (folder / name).is_file():
                raise CliError(f"Fashion-MNIST is not in {folder} (no {name}): run `make data`")
        images, labels = (_read_idx(folder / name) for name in names)
        if images.ndim != 3 or len(images) != len(labels):
            raise CliError(f"{folder}: got images {images.shape}, labels {labels.shape}")
        digest.update(images.tobytes() + labels.tobytes())
        arrays[part] = (images, labels)
    images, labels = arrays["train"]
    cut = len(images) - 5000
    about = {
        "source": "Fashion-MNIST",
        **_provenance("fashion-mnist", data_dir),
        "images": sum(len(labels) for _, labels in arrays.values()),
        "sha256": digest.hexdigest(),
        "split": "training images but the last 5,000 train, those tune, test images validation",
    }
    return Images(about, (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), arrays["test"])


def _read_idx(path: Path) -> np.ndarray:
    """Read IDX: two zero bytes, type 8 (unsigned byte), rank, big-endian sizes, values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise CliError(f"{path}: not an IDX file of unsigned bytes (starts with {raw[:4].hex()})")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape([int(s) for s in shape])


class Windows(Dataset[Item]):
    """Windows of text: ``context`` bytes and, as targets, the byte after each of them (int64)."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, context: int) -> None:
        self._tokens, self._starts, self._context = tokens, starts, context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Item:
        start = int(self._starts[index])
        window = torch.from_numpy(self._tokens[start : start + self._context + 1].astype(np.int64))
        return window[:-1], window[1:]


class Pictures(Dataset[Item]):
    """Images as float32 of shape (1, h, w), scaled to [−1, 1], and labels (int64, 0-D)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> None:
        self._images, self._labels, self._chosen = images, labels, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Item:
        number = int(self._chosen[index])
        image = torch.from_numpy(self._images[number].astype(np.float32) / 127.5 - 1)
        return image[None], torch.tensor(int(self._labels[number]))


def train_items(data: Data, task: TaskConfig, seed: int) -> Dataset[Item]:
    """Return the items of a whole run, in order: a function of data, task and seed alone.

    Windows start anywhere, drawn with replacement; images are drawn in shuffled passes.
    """
    generator = np.random.default_rng([seed, 1])
    count = task.steps * task.accumulate * task.batch_size
    if isinstance(data, Text):
        last = _last_start(data.train, task, "training")
        return Windows(data.train, generator.integers(0, last + 1, count), task.context)
    images, labels = data.train
    passes = math.ceil(count / len(labels))
    order = np.concatenate([generator.permutation(len(labels)) for _ in range(passes)])
    return Pictures(images, labels, order[:count])


def eval_items(data: Data, task: TaskConfig, split: str) -> Dataset[Item]:
    """Return the fixed items of the split ``"tune"`` or ``"validation"``, the same for every run.

    Text is cut into windows that do not overlap, evenly spread over the split; of images the first
    ones are taken. Their number is a multiple of the batch size.
    """
    if isinstance(data, Text):
        tokens = data.tune if split == "tune" else data.validation
        last = _last_start(tokens, task, split)
        starts = np.arange(0, last + 1, task.context)
        count = _whole_batches(min(task.eval_items, len(starts)), task, split)
        spread = np.linspace(0, len(starts) - 1, count).astype(np.int64)
        return Windows(tokens, starts[spread], task.context)
    images, labels = data.tune if split == "tune" else data.validation
    count = _whole_batches(min(task.eval_items, len(labels)), task, split)
    return Pictures(images, labels, np.arange(count))


def _last_start(tokens: np.ndarray, task: TaskConfig, part: str) -> int:
    last = len(tokens) - task.context - 1
    if last < 0:
        raise CliError(
            f"the {part} part of the text has {len(tokens)} bytes, but a window needs "
            f"{task.context + 1}: give more text, or a smaller --context"
        )
    return last


def _whole_batches(count: int, task: TaskConfig, part: str) -> int:
    whole = count // task.batch_size * task.batch_size
    if whole == 0:
        raise CliError(
            f"the {part} part of the data has {count} windows or images, less than one batch of "
            f"{task.batch_size}: give more data, or a smaller --batch-size"
        )
    return whole
