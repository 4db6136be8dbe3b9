"""The larger text: what is taken out of packages, what is left out, and the files it makes."""

import gzip
import importlib.util
import json
import random
import shutil
import subprocess
import tarfile

import pytest

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.errors import UserError
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.paths import REPOSITORY

needs_html = needs_extra("text", "resiliparse")
needs_minhash = needs_extra("text", "datasketch")
SENTENCE = "The quick brown fox jumps over the lazy dog and then sleeps in the warm sun. "
FOREIGN = [
    "Der schnelle braune Fuchs springt über den faulen Hund und schläft dann in der Sonne. ",
    "Le renard brun et rapide saute par-dessus le chien paresseux, puis il dort au soleil. ",
]
PAGE = """<html><head><title>Title</title><style>p {}</style></head><body>
<nav><a href="a">Home</a></nav><div class="nav-panel">Next: <a href="b">Syntax</a></div>
<main><h1>Loops</h1><p>A loop runs\n its&nbsp;body   as long
as its condition holds.</p><pre>while x:\n    x -= 1\n\n\n\nprint("one &lt; two")</pre>
<script>track()</script><p>Written by hand.</p></main></body></html>"""


@pytest.fixture
def build():
    """The script as a module, each test its own."""
    spec = importlib.util.spec_from_file_location("build", REPOSITORY / "experiments/text/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_html
@pytest.mark.parametrize("whole", [False, True])
def test_a_page_without_its_navigation(build, whole):
    expected = [
        "Loops",
        "A loop runs its body as long as its condition holds.",
        'while x:\n    x -= 1\n\nprint("one < two")',
        "Written by hand.",
    ]
    home = ["Home"] if whole else []  # only what `NAVIGATION` names is left out
    assert build.plain(PAGE, whole).split("\n\n", 3 + whole) == home + [
        *expected[:2],
        *"\n\n".join(expected[2:]).split("\n\n", 1),
    ]


def test_lines_that_repeat(build):
    long = "Advances the iterator and returns the next value."
    pages = {f"{n:02}": f"On this page\n{long}\nReturns\n\n\n{{\n}}\nonly {n}" for n in range(50)}
    for n in range(25, 50):  # "Returns" on half of the pages, not on more
        pages[f"{n:02}"] = pages[f"{n:02}"].replace("Returns\n", "")
    kept = build.without_repeats(pages)
    assert list(kept) == list(pages)
    assert kept["00"] == "Returns\n\n{\n}\nonly 0"  # the long line is on every page
    pages["50"] = "Last"
    pages.update({f"x{n:02}": f"another {n}" for n in range(60)})
    kept = build.without_repeats(pages)
    assert kept["19"] == f"On this page\n{long}\nReturns\n\n{{\n}}\nonly 19"
    assert kept["20"] == "On this page\nReturns\n\n{\n}\nonly 20"
    assert kept["50"] == "Last"


def test_prose_and_lists(build):
    assert build.is_prose(SENTENCE)
    assert not build.is_prose("std::set\nstd::map\nstd::list")
    assert not build.is_prose("")
    # 8 of 20 words are not more than 0.4, 8 of 19 are.
    lists = "one two three\n" * 3
    assert not build.is_prose("a b c d e f g h\n" + lists + "one two three")
    assert build.is_prose("a b c d e f g h\n" + lists + "one two")


@needs_html
def test_unfit_pages(build):
    assert build.unfit(SENTENCE * 6) == ""
    assert build.unfit(SENTENCE) == "short"
    assert build.unfit("std::vector\n" * 50) == "list"
    assert [build.unfit(text * 6) for text in FOREIGN] == ["foreign", "foreign"]


def test_articles_of_dictd(build):
    texts = [
        "The licence.\n",
        "aard {vark}\n   An animal\n   of Africa, an ant's\n\n   Syn: anteater\n",
        f"abbé [1913 Webster]\n{'x' * 5000}\n",
        "able\n",
    ]
    assert [len(text.encode()) for text in texts] == [13, 66, 5022, 5]
    # In base 64: 13 is N, 66 is BC, 79 is BP, 5022 is BOe, 5101 is BPt, and 5 is F.
    index = (
        "00-database-info\tA\tN\naardvark\tN\tBC\nable\tBPt\tF\nabbe\tBP\tBOe\nanteater\tN\tBC\n"
    )
    assert list(build.articles(index, "".join(texts).encode())) == [
        "aard vark An animal of Africa, an ant's\nSyn: anteater",
        f"abbé {'x' * 5000}",
        "able",
    ]


def test_glosses_of_wordnet(build):
    data = (
        "  1 This software and database is being provided to you\n"
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which exists  \n"
        '02084071 05 n 0a dog 0 lap_dog 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | pet; "sit"\n'
        "00002098 00 a 01 unable(p) 0 001 = 1 n 0000 | not having the means  \n"
    )
    assert list(build.glosses(data)) == [
        "entity: that which exists",
        'dog, lap dog, c, d, e, f, g, h, i, j: pet; "sit"',
        "unable: not having the means",
    ]


def test_entries_in_pages(build):
    entries = ["a" * 5000, "b" * 2999, "c", "d" * 9000, "e"]
    assert list(build.in_pages(iter(entries), "\n")) == [
        f"{entries[0]}\n{entries[1]}\nc",
        entries[3],
        "e",
    ]
    assert list(build.in_pages(iter([]), "\n")) == []


def test_shingles(build):
    assert build.shingles("One two  three four five\nSix") == {
        b"one two three four five",
        b"two three four five six",
    }
    assert build.shingles("One two") == {b"one two"}


@needs_minhash
def test_equal_and_alike(build):
    """Documents of a known Jaccard similarity, well above and well below the threshold."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(1000)]
    first = " ".join(words)
    seen = build.Seen()
    assert seen.add(first) == ""
    assert seen.add(first) == "equal"

    def changed(every):
        return " ".join("x" if n % every == 0 else word for n, word in enumerate(words))

    def similarity(text):
        one, other = build.shingles(first), build.shingles(text)
        return len(one & other) / len(one | other)

    assert similarity(changed(50)) > 0.8
    assert seen.add(changed(50)) == "alike"
    # Whichever documents the index finds, their similarity decides.
    seen.index.query = lambda _: range(len(seen.hashes))
    assert 0.5 < similarity(changed(18)) < 0.58
    assert seen.add(changed(18)) == ""
    assert seen.add(first.upper()) == "alike"


def package(folder, name, contents):
    """A Debian package of the given files."""
    root = folder / name
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1:2.0\nArchitecture: all\nMaintainer: m <m@m>\nDescription: d\n"
    )
    deb = folder / f"{name}_1%3a2.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", root, deb], check=True, stdout=subprocess.DEVNULL)
    return deb


@needs_html
@needs_minhash
@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_corpus_of_packages(build, tmp_path, monkeypatch, capsys):
    draw = random.Random(1)

    def page():
        words = SENTENCE.split()
        return "<p>" + " ".join(draw.choice(words) for _ in range(150)) + "</p>"

    one, two = page(), page()
    manual = {
        "usr/share/doc/x/b.html": one,
        "usr/share/doc/x/a.html": two,
        "usr/share/doc/x/c.htm": one + "<p>and one word</p>",
        "usr/share/doc/x/latin.html": two + "<p>\xe9clair</p>" + page(),
        "usr/share/doc/x/d.html": "<p>short</p>",
        "usr/share/doc/x/src/e.html": page(),
        "usr/share/doc/x/f.txt": page(),
    }
    manual = {path: text.encode("cp1252") for path, text in manual.items()}
    words = {
        "usr/share/dictd/x.dict.dz": gzip.compress(b"a: the first letter\n"),
        "usr/share/dictd/x.index": b"a\tA\tU\n",
    }
    debs = {"dict-x": package(tmp_path, "dict-x", words)}
    debs["x-doc"] = package(tmp_path, "x-doc", manual)
    monkeypatch.setattr(build, "DICTIONARIES", ["dict-x"])
    monkeypatch.setattr(build, "MANUALS", ["x-doc"])
    monkeypatch.setattr(build, "download", lambda packages: debs)
    monkeypatch.setattr(build, "prose", lambda: {"00000": "It is a truth."})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        build.build(folder, tmp_path)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert not list(tmp_path.glob("*.partial"))
    found = [json.loads(line) for line in contents[0]["x-doc.jsonl"].splitlines()]
    assert [document["name"] for document in found] == [
        "usr/share/doc/x/a.html",
        "usr/share/doc/x/b.html",
        "usr/share/doc/x/latin.html",
    ]
    assert "éclair" in found[2]["text"]
    assert json.loads(contents[0]["dict-x.jsonl"])["text"] == "a: the first letter"
    record = json.loads(contents[0]["sources.json"])[2]
    assert {key: record[key] for key in ("source", "version", "documents", "short", "alike")} == {
        "source": "x-doc",
        "version": "1:2.0",
        "documents": 3,
        "short": 1,
        "alike": 1,
    }
    assert record["bytes"] == sum(len(document["text"].encode()) for document in found)
    corpus = open_corpus(DataConfig(str(folders[0]), cache_dir=str(tmp_path / "cache")))
    assert len([*corpus.train, *corpus.validation]) == 5
    with pytest.raises(UserError, match="one exists; remove it"):
        build.build(folders[0], tmp_path)


def test_versions_of_a_package(build, tmp_path, monkeypatch):
    """Packages of an earlier time beside today's: one must be chosen."""
    monkeypatch.setattr(build, "DICTIONARIES", ["dict-x"])
    monkeypatch.setattr(build, "MANUALS", [])
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: None)
    (tmp_path / "dict-x_1_all.deb").touch()
    assert build.download(tmp_path) == {"dict-x": tmp_path / "dict-x_1_all.deb"}
    (tmp_path / "dict-x_2_all.deb").touch()
    with pytest.raises(UserError, match="has 2 versions of dict-x; keep one"):
        build.download(tmp_path)


def test_without_the_extra_nothing_is_downloaded(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(build, "download", pytest.fail)
    monkeypatch.setattr(build.sys, "argv", ["build.py", str(tmp_path / "text"), str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        build.main()
    line = "build.py: datasketch is not installed; pip install 'prmoe_jax[data,text]'"
    assert (end.value.code, only_line(capsys.readouterr().err)) == (2, line)
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_not_there(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded .* they are Debian 13's"):
        build.download(tmp_path)
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(UserError, match="cannot be downloaded .CalledProcessError"):
        build.download(tmp_path)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_damaged_package(build, tmp_path):
    deb = package(tmp_path, "x-doc", {"usr/a.html": b"x" * 100_000})
    deb.write_bytes(deb.read_bytes()[:-200])
    with pytest.raises(UserError, match="dpkg-deb cannot read it"):
        build.files(deb, lambda path: True)


def test_a_package_damaged_behind_its_files(build, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "files.tar", "w") as files:
        files.add(__file__, "./usr/a.py")
    command = tmp_path / "dpkg-deb"
    command.write_text(f"#!/bin/sh\ncat {tmp_path}/files.tar\nexit $STATUS\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("STATUS", "0")
    assert list(build.files("x.deb", lambda path: True)) == ["usr/a.py"]
    monkeypatch.setenv("STATUS", "2")
    with pytest.raises(UserError, match="x.deb: dpkg-deb cannot read it"):
        build.files("x.deb", lambda path: True)
