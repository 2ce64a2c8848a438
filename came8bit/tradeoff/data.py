"""The data: where text and images come from, how they are split, and the batches cut from them.

Every source is a fixed sequence of bytes or images, described by a sha256, and is split in a fixed
way into a part to train on, a part on which learning rates are chosen, and a part on which results
are reported. The parts are contiguous and do not touch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .config import TaskConfig

#: Most bytes of text, and of one unpacked file of images: they are held in memory.
TEXT_LIMIT, IMAGES_LIMIT = 1 << 30, 1 << 28

# Folders of the standard library that are left out: installed packages, tests (not on every
# machine), and the character tables in encodings, which are generated.
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_STDLIB_WITHOUT |= {"encodings", "lib2to3"}

#: Files of the task on mails, below the data folder: texts with labels, and the pretrained model.
_MAILS = "mails/mails.jsonl"
_TOKENIZER, _WEIGHTS = "minilm/tokenizer.json", "minilm/model.safetensors"

_FASHION_MNIST = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

Item = tuple[torch.Tensor, torch.Tensor]
Labelled = tuple[np.ndarray, np.ndarray]


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
    train: Labelled
    tune: Labelled
    validation: Labelled


@dataclass(frozen=True)
class Mails(Images):
    """The same with tokens (int64, n×512, 0 after the end) for images, and 1 as label of spam.

    ``weights`` is the safetensors file of the pretrained model.
    """

    weights: Path


Data = Text | Images


def load(
    tasks: Sequence[TaskConfig],
    files: Sequence[Path] | None,
    corpus: str,
    data_dir: Path | None,
    needed: bool = True,
) -> tuple[dict[str, Data], dict[str, str]]:
    """Load the data of each task, from ``data_dir`` or else from the folder ``data``.

    Returns:
        Task → its data, and task → why it has none; the latter for images only, and unless they are
        ``needed``.

    Raises:
        ValueError: If data cannot be read or are too small, or ``data_dir`` is no folder.
    """
    if data_dir is None:
        data_dir = Path("data")
    elif not data_dir.is_dir():
        raise ValueError(f"--data-dir {data_dir} is not a folder: run `make data`, or leave it out")
    readers = {"mails": load_mails, "images": load_images}
    loaded: dict[str, Data] = {}
    data: dict[str, Data] = {}
    missing: dict[str, str] = {}
    for task in tasks:
        kind = task.data.removeprefix("noised ")
        try:
            if kind not in loaded:
                reader = readers.get(kind, partial(load_text, files, corpus))
                loaded[kind] = reader(data_dir)
        except ValueError as error:
            if kind == "text" or needed:
                raise
            missing[task.name] = str(error)
        else:
            check_size(loaded[kind], task)
            data[task.name] = loaded[kind]
    return data, missing


def load_text(files: Sequence[Path] | None, corpus: str, data_dir: Path) -> Text:
    """Load text from ``files`` in the order given or, without any, from ``corpus``.

    Raises:
        ValueError: If a file cannot be read, is not a regular one or too large, or a corpus has not
            been fetched.
    """
    if files:
        left, parts = TEXT_LIMIT, []
        for path in files:
            parts.append(_read(path, left, "--text "))
            left -= len(parts[-1])
        text = b"\n".join(parts)
        return split_text(text, {"source": "files", "files": [f.name for f in files]})
    if corpus == "stdlib":
        return _standard_library()
    path = data_dir / "text" / f"{corpus}.txt"
    if not path.is_file():
        raise ValueError(
            f"corpus {corpus!r} is not in {data_dir} (looked for {path}). Run `make data`, give "
            f"--data-dir, or use --corpus stdlib, which needs no fetching"
        )
    about = {"source": corpus, **_provenance(corpus, data_dir)}
    return split_text(_read(path, TEXT_LIMIT), about)


def _read(path: Path, limit: int, option: str = "") -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes."""
    try:
        # Before it is opened: opening a pipe waits for its other end.
        if path.is_dir():
            raise ValueError(f"{option}{path}: is a folder; name its files, as in {path}/*.txt")
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{option}{path}: is not a regular file")
        content = b""
        if found.st_size <= limit:  # which may be wrong, as in /proc
            with open(path, "rb") as file:
                content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{option}{path}: cannot be read: {error.strerror or error}") from error
    if max(len(content), found.st_size) > limit:
        raise ValueError(f"{option}{path}: has more than the {limit:,} bytes that are left for it")
    return content


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
        raise ValueError(
            f"{root} has {len(text)} bytes of sources, expected some 10 MB. Name files with --text"
        )
    about = {
        "source": f"Python {sysconfig.get_python_version()} standard library sources",
        "files": len(found),
        "order": "sorted by path below the library's folder",
        "without": sorted(_STDLIB_WITHOUT),
    }
    return split_text(text, about)


def load_images(data_dir: Path) -> Images:
    """Load Fashion-MNIST; raises ValueError if it has not been fetched, or is damaged."""
    folder = data_dir / "fashion-mnist"
    arrays = {}
    digest = hashlib.sha256()
    for part, names in _FASHION_MNIST.items():
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"Fashion-MNIST is not in {folder} (no {name}): run `make data`")
        images, labels = (_read_idx(folder / name) for name in names)
        if images.ndim != 3 or len(images) != len(labels):
            raise ValueError(f"{folder}: got images {images.shape}, labels {labels.shape}")
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


def load_mails(data_dir: Path) -> Mails:
    """Load SpamAssassin's public mails, for MiniLM; ValueError if either has not been fetched."""
    from tokenizers import Tokenizer

    for name in (_MAILS, _TOKENIZER, _WEIGHTS):
        if not (data_dir / name).is_file():
            raise ValueError(f"the task on mails needs {data_dir / name}: run `make data`")
    raw = _read(data_dir / _MAILS, TEXT_LIMIT)
    mails = [json.loads(line) for line in raw.splitlines()]
    tokenizer = Tokenizer.from_file(str(data_dir / _TOKENIZER))
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding(length=512)
    coded = tokenizer.encode_batch([mail["text"] for mail in mails])
    tokens = np.array([code.ids for code in coded], dtype=np.int64)
    labels = np.array([mail["spam"] for mail in mails], dtype=np.uint8)
    first, second = int(0.7 * len(mails)), int(0.85 * len(mails))
    about = {
        "source": "SpamAssassin's public mails, MiniLM's weights",
        **_provenance("mails", data_dir),
        "mails": len(mails),
        "sha256": hashlib.sha256(raw + (data_dir / _WEIGHTS).read_bytes()).hexdigest(),
        "split": "first 70 % train, next 15 % tune, last 15 % validation",
    }
    cuts = (slice(first), slice(first, second), slice(second, None))
    train, tune, validation = ((tokens[cut], labels[cut]) for cut in cuts)
    return Mails(about, train, tune, validation, data_dir / _WEIGHTS)


def _read_idx(path: Path) -> np.ndarray:
    """Read IDX: two zero bytes, type 8 (unsigned byte), rank, big-endian sizes, values."""
    try:
        with gzip.open(path) as file:
            raw = file.read(IMAGES_LIMIT)
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError(f"not an IDX file of unsigned bytes (starts with {raw[:4].hex()})")
        shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4).astype(np.int64)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: {error}. Fetch it again with `make data`") from error


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


class Labels(Dataset[Item]):
    """Images (float32, (1, h, w), in [−1, 1]) or tokens (int64, 1-D); and labels (int64, 0-D)."""

    def __init__(self, part: Labelled, chosen: np.ndarray) -> None:
        (self._images, self._labels), self._chosen = part, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Item:
        number = int(self._chosen[index])
        inputs = torch.tensor(self._images[number])
        if inputs.dtype == torch.uint8:
            inputs = inputs[None].float() / 127.5 - 1
        return inputs, torch.tensor(int(self._labels[number]))


class NoisedImages(Labels):
    """Images in denoising diffusion: the noised image with a plane that holds the time; the noise.

    Time in [0, 1) and noise are a function of ``seed`` and the position alone. The variances are
    those of Ho et al. 2020: 1,000 steps, from 1e-4 to 0.02.
    """

    _KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def __init__(self, part: Labelled, chosen: np.ndarray, seed: int) -> None:
        super().__init__(part, chosen)
        self._seed = seed

    def __getitem__(self, index: int) -> Item:
        image, _ = super().__getitem__(index)
        generator = np.random.default_rng([self._seed, 2, index])
        step = int(generator.integers(len(self._KEPT)))
        noise = torch.from_numpy(generator.standard_normal(image.shape, dtype=np.float32))
        kept = float(self._KEPT[step])
        noised = kept**0.5 * image + (1 - kept) ** 0.5 * noise
        return torch.cat([noised, torch.full_like(noised, step / len(self._KEPT))]), noise


def train_items(data: Data, task: TaskConfig, seed: int) -> Dataset[Item]:
    """Return the items of a whole run, in order: a function of data, task and seed alone.

    Windows start anywhere, drawn with replacement; images are drawn in shuffled passes.
    """
    generator = np.random.default_rng([seed, 1])
    count = task.steps * task.accumulate * task.batch_size
    if isinstance(data, Text):
        last = _last_start(data.train, task, "training")
        return Windows(data.train, generator.integers(0, last + 1, count), task.context)
    size = len(data.train[1])
    order = [generator.permutation(size) for _ in range(math.ceil(count / size))]
    return _labels(data.train, task, np.concatenate(order)[:count], seed)


def eval_items(data: Data, task: TaskConfig, split: str) -> Dataset[Item]:
    """Return the fixed items of the split ``"tune"`` or ``"validation"``, the same for every run.

    Text is cut into windows that do not overlap, evenly spread over the split; of images the first
    ones are taken. Their number is a multiple of the batch size.
    """
    if isinstance(data, Text):
        tokens = data.tune if split == "tune" else data.validation
        starts = np.arange(0, _last_start(tokens, task, split) + 1, task.context)
        count = _whole_batches(len(starts), task, split)
        spread = np.linspace(0, len(starts) - 1, count).astype(np.int64)
        return Windows(tokens, starts[spread], task.context)
    part = data.tune if split == "tune" else data.validation
    return _labels(part, task, np.arange(_whole_batches(len(part[1]), task, split)), 0)


def check_size(data: Data, task: TaskConfig) -> None:
    """Raise ValueError if the data are too small for the task."""
    for split in ("tune", "validation"):
        eval_items(data, task, split)
    if isinstance(data, Text):
        _last_start(data.train, task, "training")


def _labels(part: Labelled, task: TaskConfig, chosen: np.ndarray, seed: int) -> Labels:
    if task.data == "mails":
        return Labels((part[0][:, : task.context], part[1]), chosen)
    noised = task.data == "noised images"
    return NoisedImages(part, chosen, seed) if noised else Labels(part, chosen)


def _last_start(tokens: np.ndarray, task: TaskConfig, part: str) -> int:
    last = len(tokens) - task.context - 1
    if last < 0:
        raise ValueError(
            f"the {part} part of the text has {len(tokens)} bytes, but a window needs "
            f"{task.context + 1}. Give more text, or a smaller --context"
        )
    return last


def _whole_batches(available: int, task: TaskConfig, part: str) -> int:
    count = min(task.eval_items, available)
    whole = count // task.batch_size * task.batch_size
    if whole == 0:
        raise ValueError(
            f"the {part} part of the data has {count} {task.items}, less than one batch of "
            f"{task.batch_size}. Give more data, or a smaller --batch-size"
        )
    return whole
