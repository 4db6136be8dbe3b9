"""Makes the larger text: the prose, and dictionaries and manuals from Debian's packages.

    pip install 'prmoe_jax[data,text]'
    python experiments/text/build.py [FOLDER [PACKAGES]]

FOLDER, ~/.cache/prmoe_jax/text unless given, gets one .jsonl a source, and sources.json, which has
the counts. PACKAGES keeps what is downloaded, for the next time. The same packages and the same
prose make the same bytes.
"""

import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache, sources
from prmoe_jax.errors import UserError

# A document that is like an earlier one is left out, so the order tells which source keeps it.
DICTIONARIES = "dict-gcide wordnet-base dict-foldoc dict-jargon dict-vera dict-devil".split()
MANUALS = """
    ada-reference-manual-2020 apache2-doc aptitude-doc-en bash-doc bind9-doc buildbot-doc
    clisp-doc cmake-doc csound-doc debian-handbook debian-policy debian-reference-en
    developers-reference docutils-doc exim4-doc-html ganeti-doc gap-doc git-doc grass-doc
    icu-doc installation-guide-amd64 krb5-doc libreoffice-help-en-us libvirt-doc
    lilypond-doc-html linux-doc-6.12 llvm-19-doc maxima-doc mit-scheme-doc numba-doc octave-doc
    postgis-doc postgresql-doc-17 python3.13-doc r-doc-html racket-doc rsyslog-doc sbcl-doc
    singular-doc slurm-wlm-doc snakemake-doc sphinx-doc sqlite3-doc swi-prolog-doc valgrind
    vim-doc xen-doc zsh-doc cinder-doc keystone-doc neutron-doc nova-doc python-biopython-doc
    python-dask-doc python-django-doc python-numpy-doc python-scipy-doc python-sklearn-doc
    python-sqlalchemy-doc python-sympy-doc python-xarray-doc cppreference-doc-en-html erlang-doc
    libboost1.83-doc libgtk-3-doc nodejs-doc php-doc qt6-base-doc-html
""".split()
# The folder that is read where a package has several languages or editions.
FOLDERS = {
    "ada-reference-manual-2020": "/aarm2020.html/",
    "apache2-doc": "/manual/en/",
    "debian-handbook": "/en-US/",
    "installation-guide-amd64": "/en/",
}
# Folders of source code, of lists of uses and of translations.
SKIPPED = {"_modules", "_sources", "class-use", "src", "src-html", "translations"}
# Navigation beside what resiliparse knows: of DocBook, Texinfo, Lilypond and Racket.
NAVIGATION = (
    ".navheader .navfooter .nav-panel .nav_table .toc_uplink .navsettop .navsetbottom".split()
)
WHOLE = {"php-doc"}  # has no other navigation, and loses dashes where resiliparse looks for it

LEAST = 400  # characters of a document
PAGE = 8000  # characters from which on a page of a dictionary ends
LONG, FEW = 25, 20  # a line of 25 characters stays in the first 20 pages of a package that have it
WORDS, PROSE = 8, 0.4  # 0.4 of a page's words are in lines of at least 8 words
SHINGLE, PERMUTATIONS, THRESHOLD = 5, 128, 0.7  # MinHash: words a shingle, hashes, similarity


def plain(html: str, whole: bool = False) -> str:
    """The text of an HTML page, without navigation and with at most one empty line in a row.

    Args:
      html: the page.
      whole: whether only the elements of `NAVIGATION` are left out.
    """
    from resiliparse.extract.html2text import extract_plain_text

    text = extract_plain_text(
        html, preserve_formatting=True, main_content=not whole, skip_elements=NAVIGATION
    )
    lines = (line.rstrip() for line in text.translate({9: " ", 0xA0: " ", 0: None}).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def without_repeats(pages: dict[str, str]) -> dict[str, str]:
    """The pages of one package without its furniture.

    A line with letters is left out where more than half of the pages have it, and after its first
    `FEW` pages if it has `LONG` characters.
    """

    def lines(text: str) -> set[str]:
        return {line.strip() for line in text.split("\n") if any(map(str.isalpha, line))}

    count = Counter(line for text in pages.values() for line in lines(text))
    everywhere = {line for line, n in count.items() if n > max(FEW, len(pages) / 2)}
    often = {line for line, n in count.items() if n > FEW and len(line) >= LONG}
    seen: Counter[str] = Counter()
    kept = {}
    for name, text in pages.items():
        gone = everywhere | {line for line in often & lines(text) if seen[line] >= FEW}
        seen.update(often & lines(text))
        rest = "\n".join(line for line in text.split("\n") if line.strip() not in gone)
        kept[name] = re.sub(r"\n{3,}", "\n\n", rest).strip()
    return kept


def is_prose(text: str) -> bool:
    """Whether enough words stand in lines of prose; lists of names and code have short lines."""
    lines = [len(line.split()) for line in text.split("\n")]
    return sum(n for n in lines if n >= WORDS) > PROSE * sum(lines)


def unfit(text: str) -> str:
    """Why a page of a manual is left out: 'short', 'list' or 'foreign'; '' if it stays."""
    from resiliparse.parse.lang import detect_fast

    if len(text) < LEAST:
        return "short"
    if not is_prose(text):
        return "list"
    return "" if detect_fast(text)[0] == "en" else "foreign"


def articles(index: str, data: bytes) -> Iterator[str]:
    """The articles of a dictionary of dictd, a line a paragraph, without the braces of links.

    Args:
      index: a line for each headword: the word, and the article's offset and size in base 64.
      data: the articles, unpacked.
    """
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = {digit: n for n, digit in enumerate(digits)}

    def number(text: str) -> int:
        total = 0
        for digit in text:
            total = total * 64 + value[digit]
        return total

    places = set()  # several headwords may share an article
    for line in index.splitlines():
        word, offset, size = line.split("\t")[:3]
        if not word.startswith(("00-", "00database")):  # the dictionary's own licence and history
            places.add((number(offset), number(size)))
    for offset, size in sorted(places):
        article = data[offset : offset + size].decode("utf-8", "replace")
        article = re.sub(r"\[1913 Webster\]|[{}]", "", article)
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", article))
        yield "\n".join(part for part in paragraphs if part)


def glosses(data: str) -> Iterator[str]:
    """The synsets of one of WordNet's data files: the words, a colon and what they mean."""
    for line in data.splitlines():
        if not line.startswith("  "):  # the licence
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            names = ", ".join(re.sub(r"\((a|p|ip)\)$", "", word) for word in words)
            yield f"{names.replace('_', ' ')}: {gloss.strip()}"


def in_pages(entries: Iterator[str], between: str) -> Iterator[str]:
    """Joins entries to pages of at least `PAGE` characters; the last one may have fewer."""
    page: list[str] = []
    for entry in entries:
        page.append(entry)
        if sum(map(len, page)) >= PAGE:
            yield between.join(page)
            page = []
    if page:
        yield between.join(page)


def shingles(text: str) -> set[bytes]:
    """Runs of `SHINGLE` words; a shorter text is one run."""
    words = text.lower().split()
    starts = range(max(1, len(words) - SHINGLE + 1))
    return {" ".join(words[start : start + SHINGLE]).encode() for start in starts}


class Seen:
    """The documents so far, which tells whether another one is equal to one of them or like it."""

    def __init__(self):
        from datasketch import MinHash, MinHashLSH

        # A fixed seed, so that the same documents are found alike each time.
        self.empty = MinHash(PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        self.index = MinHashLSH(THRESHOLD, PERMUTATIONS)
        self.hashes, self.digests = [], set()

    def add(self, text: str) -> str:
        """Adds a document, or returns why not: 'equal', 'alike', or '' if it is new."""
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self.digests:
            return "equal"
        self.digests.add(digest)
        new = self.empty.copy()
        new.update_batch(shingles(text))
        if any(new.jaccard(self.hashes[n]) >= THRESHOLD for n in self.index.query(new)):
            return "alike"
        self.index.insert(len(self.hashes), new)
        self.hashes.append(new)
        return ""


def files(package: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a Debian package whose paths are wanted, by path.

    Raises:
      UserError: the package is damaged.
    """
    found = {}
    command = ["dpkg-deb", "--fsys-tarfile", package]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacked:
        try:
            with tarfile.open(fileobj=unpacked.stdout, mode="r|") as members:
                for member in members:
                    if member.isfile() and wanted(member.name):
                        found[member.name.removeprefix("./")] = members.extractfile(member).read()
            unpacked.stdout.read()  # what pads the archive
        except tarfile.ReadError:
            unpacked.kill()
            found = None
    if found is None or unpacked.returncode:
        raise UserError(f"{package}: dpkg-deb cannot read it; remove it to download it again")
    return dict(sorted(found.items()))


def decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def manual(source: str, package: Path) -> dict[str, str]:
    """The HTML pages of a package, by path."""
    folder = FOLDERS.get(source, "/")

    def wanted(path: str) -> bool:
        page = path.endswith((".html", ".htm")) and folder in path
        return page and SKIPPED.isdisjoint(path.split("/"))

    found = files(package, wanted)
    return without_repeats(
        {path: plain(decoded(content), source in WHOLE) for path, content in found.items()}
    )


def dictionary(source: str, package: Path) -> dict[str, str]:
    """The pages of a dictionary, by number."""
    if source == "wordnet-base":
        found = files(package, lambda path: "/wordnet/data." in path)
        texts = [in_pages(glosses(data.decode()), "\n") for data in found.values()]
    else:
        found = files(package, lambda path: path.endswith((".dict.dz", ".index")))
        (index,) = (data for path, data in found.items() if path.endswith(".index"))
        (packed,) = (data for path, data in found.items() if path.endswith(".dz"))
        texts = [in_pages(articles(index.decode(), gzip.decompress(packed)), "\n\n")]
    return {f"{n:05}": text for n, text in enumerate(itertools.chain(*texts))}


def prose() -> dict[str, str]:
    """The documents of the corpus `prose`, by number."""
    config = DataConfig("prose")
    paths = sources.files("prose", cache.root(config))
    texts = sources.read_documents(paths, config.text_field)
    return {f"{n:05}": text.strip() for n, text in enumerate(texts)}


def write(source: str, documents: dict[str, str], seen: Seen, folder: Path) -> dict:
    """Writes a source's documents but for unfit pages and repetitions; returns the counts."""
    counts = Counter(documents=0, bytes=0, short=0, list=0, foreign=0, equal=0, alike=0)
    digest = hashlib.sha256()
    with open(folder / f"{source}.jsonl", "wb") as out:
        for name, text in documents.items():
            reason = (unfit(text) if source in MANUALS else "") or seen.add(text)
            counts[reason or "documents"] += 1
            if not reason:
                counts["bytes"] += len(text.encode())
                line = json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n"
                out.write(line.encode())
                digest.update(line.encode())
    return {"source": source, **counts, "sha256": digest.hexdigest()}


def download(packages: Path) -> dict[str, Path]:
    """The package of each source, downloaded unless it is there.

    Raises:
      UserError: apt-get fails, or several versions of a package are there.
    """
    names = DICTIONARIES + MANUALS
    command = ["apt-get", "--quiet=2", "download", *names]
    try:
        subprocess.run(command, cwd=packages, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"the packages cannot be downloaded ({error.__class__.__name__}); "
            "they are Debian 13's: run apt-get update there first"
        ) from error
    found = {}
    for name in names:
        versions = sorted(packages.glob(f"{name}_*.deb"))
        if len(versions) != 1:
            raise UserError(f"{packages} has {len(versions)} versions of {name}; keep one")
        found[name] = versions[0]
    return found


def build(folder: Path, packages: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists; remove it, or give another folder")
    for library in "datasketch", "resiliparse":
        if not importlib.util.find_spec(library):
            raise UserError(f"{library} is not installed; pip install 'prmoe_jax[data,text]'")
    texts, debs = prose(), download(packages)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    seen = Seen()
    records = []
    for source in ["prose", *debs]:
        version = ""
        if source != "prose":
            take = dictionary if source in DICTIONARIES else manual
            texts = take(source, debs[source])
            version = debs[source].name.split("_")[1].replace("%3a", ":")
        records.append({"version": version, **write(source, texts, seen, partial)})
        print(json.dumps(records[-1]), flush=True)
    (partial / "sources.json").write_text(json.dumps(records, indent=1) + "\n")
    os.replace(partial, folder)


def main() -> None:
    given = [Path(argument).expanduser().absolute() for argument in sys.argv[1:]]
    folder = given[0] if given else cache.root(DataConfig()) / "text"
    try:
        if given[1:]:
            given[1].mkdir(parents=True, exist_ok=True)
            build(folder, given[1])
        else:
            with tempfile.TemporaryDirectory() as packages:
                build(folder, Path(packages))
    except UserError as error:
        print(f"build.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
