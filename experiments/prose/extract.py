"""Takes the text out of Debian's packages: one .txt a document, as `install.sh` calls it.

    python extract.py UNPACKED FOLDER

UNPACKED holds the packages' files. A document is a page of the FAQ, a psalm's commentary, a chapter
of the Bible (notes left out) or of a novel.
"""

import bz2
import lzma
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# HTML and OSIS: elements whose text is no prose, and those that begin a new line.
SKIPPED = {"head", "script", "style", "note"}
BREAKING = set("blockquote br dd div dt h1 h2 h3 h4 h5 h6 l lb lg li p td title tr ul".split())
R_STRING, R_STRINGS = 9, 16  # types in a serialised R object


class Prose(HTMLParser):
    """The text of markup, a line a paragraph."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces, self.skipped = [], 0

    def handle_starttag(self, tag, attributes):
        self.skipped += tag in SKIPPED
        if tag in BREAKING:
            self.pieces.append("\n")

    def handle_startendtag(self, tag, attributes):  # a milestone: nothing to skip up to its end
        if tag in BREAKING:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self.skipped -= tag in SKIPPED
        if tag in BREAKING:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self.skipped:
            # A line's end inside a paragraph is a space.
            self.pieces.append(re.sub(r"\s+", " ", data))


def plain(markup: str) -> str:
    parser = Prose()
    parser.feed(markup)
    parser.close()
    lines = (re.sub(r" +", " ", line).strip() for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def pages(folder: Path) -> Iterator[str]:
    """The FAQ's pages."""
    for path in sorted(folder.rglob("*.html")):
        yield plain(path.read_text(encoding="utf-8", errors="replace"))


def blocks(stem: Path, letter: str) -> Iterator[str]:
    """The blocks of a compressed SWORD module: an index of (offset, size, size unpacked) each."""
    index = stem.with_suffix(f".{letter}zs").read_bytes()
    packed = stem.with_suffix(f".{letter}zz").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index):
        if size:
            yield zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace")


def chapters(stem: Path, letter: str) -> Iterator[str]:
    """The chapters of a module, whose blocks are chapters or books."""
    for block in blocks(stem, letter):
        for part in re.split(r"(?=<chapter [^>]*sID=)", block):
            yield plain(part)


def novels(rdb: Path) -> Iterator[str]:
    """The chapters of R's novels: objects one after another, each compressed on its own."""
    data = rdb.read_bytes()
    while data:
        # Four bytes of size; then Z or 2 for xz or bzip2, or zlib's own start.
        body, kind = data[4:], data[4:5]
        if kind in (b"Z", b"2"):
            unpack, body = (
                lzma.LZMADecompressor() if kind == b"Z" else bz2.BZ2Decompressor(),
                body[1:],
            )
        else:
            unpack = zlib.decompressobj()
        lines = strings(unpack.decompress(body))
        data = unpack.unused_data
        for chapter in re.split(r"(?im)^(?=(?:chapter|volume)\b)", "\n".join(lines)):
            paragraphs = re.split(r"\n\s*\n", chapter)
            yield "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()


def strings(serialised: bytes) -> list[str]:
    """The first vector of strings of a serialised R object, in XDR."""
    start = serialised.index(struct.pack(">B", R_STRINGS), 14)
    (count,) = struct.unpack_from(">i", serialised, start + 1)
    found, place = [], start + 5
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", serialised, place)
        if flags & 255 != R_STRING:
            raise ValueError(f"no string at byte {place} of an R object")
        found.append(serialised[place + 8 : place + 8 + max(size, 0)].decode("utf-8", "replace"))
        place += 8 + max(size, 0)
    return found


def main() -> None:
    unpacked, folder = Path(sys.argv[1]), Path(sys.argv[2]).expanduser()
    modules = unpacked / "usr/share/sword/modules"
    bible = modules / "texts/ztext/engWEB2015eb"
    documents = {
        "faq": pages(unpacked / "usr/share/doc/anarchism"),
        "psalms": chapters(modules / "comments/zcom/tdavid/ot", "c"),
        "bible": (text for part in ("ot", "nt") for text in chapters(bible / part, "b")),
        "novels": novels(unpacked / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
    }
    for source, texts in documents.items():
        (folder / source).mkdir(parents=True, exist_ok=True)
        size = number = 0
        for text in texts:
            if len(text) >= 200:  # less is a title page
                (folder / source / f"{number:04}.txt").write_text(text + "\n", encoding="utf-8")
                number, size = number + 1, size + len(text)
        print(f"{source}: {number} documents, {size / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
