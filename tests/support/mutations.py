"""Damages a valid file: by chance, and as somebody would who knows its format."""

import contextlib
import gzip
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

# JSON texts of what no writer of ours would write.
RAW = (
    "null true false -1 0 1 2 255 2147483648 9223372036854775807 18446744073709551616 -1e308 1e308 "
    '1e400 NaN -Infinity 0.5 1.0 "" "." ".." "/" "a\\u0000b" "\\ud800" "\\u001b[31m\\n\\u202e" '
    '"../../x" "/etc/passwd" "/dev/zero" "~nobody/x" "1" "|O" "<f8" "gs://nobody/x" [] {} [[]] '
    '[null] {"a":null} [1] ["a"] "\\ue000\\ud83d\\ude00"'
).split(" ")
RAW += ["1" + "0" * 400, "1" * 5000, '"' + "x" * 100_000 + '"', "[" * 100_000 + "]" * 100_000]
DESCR = "|O <f8 >u2 <u2 <i2 <u4 <u1 <i8 |b1 <c16 |S2 <U1 |V2 <m8[D] <M8[s] <f2 u2 xyz".split()
EXTREMES = [0, 1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NPY, MEGATRON = b"\x93NUMPY", b"MMIDIDX"
_BACK = "/".join([".."] * 20)  # from any folder to the top
_MARK, _KEY = "\0 a value", "\0 a key"


def mutate(path: Path, outside: Path, rng: Random) -> str:
    """Changes a file in place; returns what was done, in words.

    Args:
      path: the file.
      outside: a copy of it that no reader has any business with.
      rng: makes all choices.
    """
    if rng.random() < 0.12:
        return _replaced(path, outside, rng)
    content = path.read_bytes()
    if rng.random() < 0.35:
        changed, how = _bytes(content, path, rng)
    else:
        changed, how = _structure(content, path, outside, rng)
    path.write_bytes(changed)
    return how


def _replaced(path: Path, outside: Path, rng: Random) -> str:
    """Puts something else in the place of a file."""
    how = rng.choice(("missing", "link outside", "link", "loop", "device", "folder", "pipe"))
    path.unlink()
    if how == "link outside":
        path.symlink_to(outside)
    elif how in ("link", "loop", "device"):
        path.symlink_to({"link": "nowhere", "loop": path.name, "device": "/dev/zero"}[how])
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    return how


def _bytes(content: bytes, path: Path, rng: Random) -> tuple[bytes, str]:
    """Changes some bytes."""
    how = rng.choice("flip insert delete truncate repeat append splice zeros empty".split())
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 2, 4, 16, 1000)))
    before, part, behind = content[:at], content[at:end], content[end:]
    if how == "flip":
        part = bytes(x ^ 1 << rng.randrange(8) for x in part)
    elif how == "insert":
        part = rng.randbytes(rng.choice((1, 2, 8))) + part
    elif how == "delete":
        part = b""
    elif how == "truncate":
        part = behind = b""
    elif how == "repeat":
        part *= rng.choice((2, 3, 100))
    elif how == "append":
        behind += rng.choice((b"\0", b"\n", b"{}", rng.randbytes(8), content))
    elif how == "splice":
        other = rng.choice(sorted(x for x in path.parent.iterdir() if x.is_file())).read_bytes()
        start = rng.randrange(len(other) + 1)
        part = other[start : start + rng.choice((4, 100, len(other)))]
    elif how == "zeros":
        part = bytes(len(part))
    elif how == "empty":
        before = part = behind = b""
    return before + part + behind, f"{how} {at}:{end}"


def _structure(content: bytes, path: Path, outside: Path, rng: Random) -> tuple[bytes, str]:
    """Changes a file of a known format in a way that keeps most of it well formed."""
    if content.startswith(NPY):
        return _npy(content, rng)
    if content.startswith(MEGATRON):
        return _megatron(content, rng)
    if content.startswith(b"PK\3\4"):
        return _zip(content, path, rng)
    if path.suffix == ".safetensors":
        (size,) = struct.unpack_from("<Q", content)
        header, how = _json(content[8 : 8 + size], outside, rng)
        size = rng.choice([len(header)] * 9 + EXTREMES)
        return struct.pack("<Q", size) + header + content[8 + size :], f"header: {how}"
    if path.suffix in (".gz", ".zst"):
        import zstandard

        plain, packed = gzip.decompress, gzip.compress
        if path.suffix == ".zst":
            plain = zstandard.ZstdDecompressor().decompress
            packed = zstandard.ZstdCompressor(write_checksum=True).compress
        inner, how = _structure(plain(content), path.with_suffix(""), outside, rng)
        return packed(inner), f"packed again, {how}"
    with contextlib.suppress(ValueError):
        return _json(content, outside, rng)
    lines = content.splitlines(keepends=True)
    if lines and lines[0].startswith(b"{"):
        at = rng.randrange(len(lines))
        line, how = _json(lines[at], outside, rng)
        how, *lines[at : at + 1] = rng.choice(
            ((how, line + b"\n"),) * 8 + (("without", b""), ("twice", lines[at], lines[at]))
        )
        return b"".join(lines), f"line {at + 1}: {how}"
    return _bytes(content, path, rng)


def _json(content: bytes, outside: Path, rng: Random) -> tuple[bytes, str]:
    """Changes one place of a JSON text; ValueError if it is none."""
    root = [json.loads(content)]
    holder, key, where = _place(root, rng)
    old, raw = holder[key], _other(holder[key], outside, rng)
    how = rng.choice(["set"] * 12 + "delete again add rename swap".split())
    if how == "delete" and holder is not root:
        del holder[key]
    elif how == "again" and isinstance(holder, dict):
        holder[_KEY] = _MARK
    elif how == "add":
        if isinstance(old, list):
            old.insert(rng.randrange(len(old) + 1), rng.choice([_MARK, *old]))
        elif isinstance(old, dict):
            old[rng.choice(("more", "", "dtype", "__class__"))] = _MARK
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice((_KEY, key + "x", key.upper(), key[:-1]))] = holder.pop(key)
        key = raw if raw.startswith('"') else '"\\u001b[2J"'
    elif how == "swap":
        other, place, there = _place(root, rng)
        with contextlib.suppress(KeyError, IndexError):  # one may be inside the other
            holder[key], other[place] = other[place], holder[key]
        how += f" with {there}"
    else:
        how, holder[key] = "set", _MARK
    try:
        text = json.dumps(root[0])
    except (ValueError, RecursionError):  # a swap made a circle
        return content[::-1], "backwards"
    name = key if isinstance(key, str) and key.startswith('"') else json.dumps(key)
    text = text.replace(json.dumps(_KEY), name).replace(json.dumps(_MARK), raw)
    return text.encode(), f"{how} {where} {raw if len(raw) < 200 else f'{raw[:9]}… ({len(raw)})'}"


def _place(root: list, rng: Random) -> tuple[list | dict, int | str, str]:
    """A random place in nested lists and dicts: one on a way from the top, or any of them.

    Names of files are likelier than other texts.
    """
    if rng.random() < 0.6:
        places = list(_places(root, 0, ""))
        named = [place for place in places if _is_name(place[0][place[1]])]
        return rng.choice(named if named and rng.random() < 0.3 else places)
    holder, key, where = root, 0, ""
    while isinstance(holder[key], (list, dict)) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        where += f"[{key!r:.80}]"
    return holder, key, where


def _places(holder: list | dict, key: int | str, where: str) -> Iterator[tuple]:
    yield holder, key, where
    inner = holder[key]
    if isinstance(inner, (list, dict)):
        for name in inner if isinstance(inner, dict) else range(len(inner)):
            yield from _places(inner, name, f"{where}[{name!r:.80}]")


def _is_name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]+\.[a-z]+", value) is not None


def _other(value, outside: Path, rng: Random) -> str:
    """The JSON text of another value: something near it, or anything."""
    near = []
    if isinstance(value, str):
        paths = [f"{outside.parent}/{value}", f"{_BACK}{outside.parent}/{value}"] * 2
        paths += f"./{value}", f"x/../{value}", f"../{value}", f"/{value}"
        words = value + "x", value[:-1], value.upper(), value + "\0", f" {value}", [value]
        near = paths if _is_name(value) else words
    elif isinstance(value, (int, float)):
        near = [value + 1, value - 1, -value, value * 2, value + 0.5, float(value), str(value)]
        near += [value * 2**32, [value]]
    elif isinstance(value, list):
        near = [value * 2, value[::-1], value[1:], dict(enumerate(value)), str(value)]
    elif isinstance(value, dict):
        near = [list(value), list(value.items()), dict(list(value.items())[1:]), str(value)]
    return json.dumps(rng.choice(near)) if near and rng.random() < 0.5 else rng.choice(RAW)


def _npy(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes the header of a .npy file, which is a Python expression."""
    size = struct.unpack_from("<H", content, 8)[0]
    text, data = content[10 : 10 + size].decode("latin-1").rstrip(), content[10 + size :]
    count = int(re.search(r"\((\d+)", text)[1])
    shape = re.search(r"'shape': (\([^)]*\))", text)[1]
    old, new = rng.choice(
        [(re.search(r"'descr': ('[^']*')", text)[1], repr(descr)) for descr in DESCR]
        + [(shape, f"({n},)") for n in (*EXTREMES, -1, count - 1, count + 1, count * 2)]
        + [(shape, x) for x in ("()", "(1.5,)", "None", f"({count},1)", f"(1,{count})", "(True,)")]
        + [(shape, f"({count // 2},2)"), (shape, shape[1:-1] or "1"), (shape, f"[{count}]")]
        + [("False", x) for x in ("True", "None", "1", "'x'")]
        + [(text, x) for x in ("", "{}", "[]", "(" * 5000, "__import__('os').getpid()", "1+", "\0")]
        + [("'descr'", "'other'"), ("'shape'", "'descr'"), ("'descr': ", "'descr': [('a', ")]
        + [("}", ""), ("{", "{'more': 1, "), ("'<", "'>"), (", }", ", 'x': " + "[" * 300 + "}")]
    )  # fmt: skip
    header = text.replace(old, new).encode("latin-1")
    header += b" " * (-(11 + len(header)) % 64) + b"\n"
    version = rng.choice((b"\1\0",) * 6 + (b"\2\0", b"\3\0", b"\4\0", b"\0\0"))
    length = struct.pack("<I" if version in (b"\2\0", b"\3\0") else "<H", len(header))
    return NPY + version + length + header + data, f"version {version[0]}, {old} -> {new:.40}"


def _megatron(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes one number of an .idx file, or two that belong together."""
    sequences, documents = struct.unpack_from("<QQ", content, 18)
    kinds = [("<Q", 9), ("<B", 17), ("<Q", 18), ("<Q", 26)] * 3
    kinds += [("<i", 34 + 4 * i) for i in range(sequences)]
    kinds += [("<q", 34 + 4 * sequences + 8 * i) for i in range(sequences + documents)]
    changed, said = bytearray(content), []
    for _ in range(rng.choice((1, 1, 2))):
        kind, at = rng.choice(kinds)
        size, (value,) = 8 * struct.calcsize(kind), struct.unpack_from(kind, changed, at)
        value = rng.choice([*EXTREMES, value + 1, value - 1, value + 2, -value, value * 2])
        value %= 2**size
        changed[at : at + size // 8] = value.to_bytes(size // 8, "little")
        said.append(f"{kind} at {at} = {value}")
    return bytes(changed), ", ".join(said)


def _zip(content: bytes, path: Path, rng: Random) -> tuple[bytes, str]:
    """Changes one file of an archive, whose checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*entries] + [x for x in entries if x.endswith("data.pkl")] * len(entries))
    entries[name], how = _bytes(entries[name], path, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for other, inner in entries.items():
            archive.writestr(other, inner)
    return out.getvalue(), f"{name}: {how}"
