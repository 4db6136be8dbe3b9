"""Reads damaged files in a process of its own, and judges what comes of it.

python -m tests.support.fuzz 1000              # so many examples of every reader, or of those
python -m tests.support.fuzz 1000 npy shards   # that are named
python -m tests.support.fuzz npy:29            # one example again
"""

import collections
import contextlib
import faulthandler
import fnmatch
import functools
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import prmoe_jax
from prmoe_jax import boundary
from prmoe_jax.cli import output
from prmoe_jax.errors import UserError, ending

PACKAGE = str(Path(prmoe_jax.__file__).parent)

SECONDS = 30  # for one example
ROOM = 4 << 30  # bytes of memory, beside what the process has

GOOD = REFUSED, EQUAL, OTHER = "refused", "equal", "another input"


class Outcome(NamedTuple):
    """What became of an example."""

    kind: str  # one of GOOD, or a failure in a few words
    change: str = ""  # what was done to which file
    message: str = ""


class Worker:
    """A process that reads examples, and is replaced when it ends or hangs."""

    def __init__(self, folder: Path):
        """Takes an empty folder for all files."""
        self._folder = folder
        self._process = None

    def read(self, reader: str, number: int) -> Outcome:
        """Damages the files of a reader in the way of this number, and reads them."""
        if self._process is None:
            self._start()
        for request, seconds in ((None, 120), (number, SECONDS)):
            self._connection.send((reader, request))
            end = f"no end after {seconds} s"
            try:
                found = self._connection.recv() if self._connection.poll(seconds) else None
            except EOFError:
                self._process.join()
                found, end = None, f"exit code {self._process.exitcode}"
            if found is None:
                self.close()
                said = (self._folder / "stderr").read_text(errors="replace")
                change = (self._folder / "change").read_text()
                return Outcome(f"{end} {_deepest(said)}", change, said[-3000:])
        return found

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(self._folder, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join(2)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(folder: Path, connection) -> None:
    """Answers requests, in the worker."""
    stderr = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 1), os.dup2(stderr, 2)
    faulthandler.enable()
    boundary.prepare()
    warnings.filterwarnings("always", category=RuntimeWarning)
    output.log_to_stderr()
    (folder / "change").write_text("none: the files are valid")
    watch = _Watch(folder.absolute())
    ready = functools.cache(functools.partial(_prepare, folder.absolute(), watch))
    with contextlib.suppress(EOFError):  # the connection was closed
        while True:
            name, number = connection.recv()
            original = ready(name)
            if number is None:
                connection.send(True)
                continue
            os.truncate(folder / "stderr", 0)
            faulthandler.dump_traceback_later(SECONDS - 1)
            try:
                connection.send(_example(name, number, original, folder.absolute(), watch))
            finally:
                faulthandler.cancel_dump_traceback_later()


def _prepare(folder: Path, watch: "_Watch", name: str) -> str:
    """Makes the valid files of a reader; returns what they hold."""
    from tests.support.readers import FILES, READERS

    place = folder / name
    if not (place / "valid").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)
        READERS[name].build()
        shutil.copytree(FILES, folder / "outside" / name)
        FILES.rename("valid")
    os.chdir(place)
    _fresh()
    return _plain(READERS[name].read())


def _fresh() -> None:
    shutil.rmtree("files", ignore_errors=True)
    shutil.copytree("valid", "files")


def _example(name: str, number: int, original: str, folder: Path, watch: "_Watch") -> Outcome:
    from tests.support.mutations import mutate
    from tests.support.readers import FILES, READERS

    reader, rng = READERS[name], random.Random(f"{name} {number}")
    os.chdir(folder / name)
    _fresh()
    path = FILES
    while path.is_dir():  # a file alone is as likely as a whole folder beside it
        names = path.glob(reader.files if path == FILES else "*")
        found = sorted(x for x in names if x.is_file() or any(x.iterdir()))
        path = rng.choice(found + [x for x in found if x.suffix == ".json"] * 2)
    inner = path.relative_to(FILES)
    outside = folder / "outside" / name / inner
    change = f"{inner}: {mutate(path, outside, rng)}"
    signed = reader.sign and path.is_file() and not path.is_symlink() and rng.random() < 0.8
    if signed:
        with contextlib.suppress(Exception):  # what can't be signed stays as it is
            reader.sign(path)
            change += ", signed"
    (folder / "change").write_text(change)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    told = fnmatch.fnmatch(str(inner), reader.told) and os.path.lexists(path)
    told = told and not path.is_dir()  # a corpus may have folders
    again = "packed again" in change or (path.suffix == ".gz" and "append" in change)
    told = told and not (signed or again)  # a .gz file may have several parts
    with watch.watching(may_open=outside if path.is_symlink() else None) as seen:
        kind, message = _outcome(reader, original, told)
    if kind in GOOD and seen:
        kind, message = f"beside it: {seen[0]:.60}", "\n".join(seen)
    return Outcome(kind, change, message)


def _outcome(reader, original: str, told: bool) -> tuple[str, str]:
    try:
        value = reader.read()
    except UserError as error:
        line = ending.describe(error).line
        if len(line) > ending.LONGEST:
            return f"a line of {len(line)} characters {_place(error)}", f"{line[:300]}…"
        if not _is_plain(line):
            return f"a line with control characters {_place(error)}", repr(line)
        return REFUSED, line
    except BaseException as error:  # a panic of a library's is no Exception
        text = "".join(traceback.format_exception(error))
        return f"{type(error).__name__} {_place(error)}", text[-6000:]
    if _plain(value) == original:
        return EQUAL, ""
    if told:
        return "different, unnoticed", _difference(_plain(value), original)
    try:
        sound = reader.sound(value)
    except Exception as error:
        sound, value = False, f"{type(error).__name__}: {error} in {_plain(value)}"
    return (OTHER, "") if sound else ("unsound", _difference(_plain(value), original))


def _is_plain(line: str) -> bool:
    """Whether a terminal shows a line as it is: nothing in it controls the terminal."""
    return not {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, line))


def _plain(value) -> str:
    """A text that is equal for equal values, NaN included."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}{value.tolist()}"
    if isinstance(value, dict):
        return f"dict{_plain(list(value.items()))}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return repr(value)


def _difference(found: str, original: str) -> str:
    at = len(os.path.commonprefix([found, original]))
    start = max(0, at - 200)
    return f"…{found[start : at + 200]}…\nwas …{original[start : at + 200]}…"


def _place(error: BaseException) -> str:
    """The last line of ours that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{f.filename}:{f.lineno}" for f in frames if f.filename.startswith(PACKAGE)]
    return f"at {ours[-1].removeprefix(PACKAGE)[1:]}" if ours else ""


def _deepest(said: str) -> str:
    """The same, of what faulthandler wrote."""
    ours = re.findall(rf'File "{re.escape(PACKAGE)}/(.*)", line (\d+)', said)
    return f"at {ours[0][0]}:{ours[0][1]}" if ours else ""


class _Watch:
    """Notes what a reader does besides reading its own files."""

    def __init__(self, folder: Path):
        self._folder, self._seen, self._may = folder, None, None
        handler = logging.Handler()
        handler.emit = self._logged
        logging.getLogger("prmoe_jax").handlers = [handler]
        sys.addaudithook(self._opened)

    @contextlib.contextmanager
    def watching(self, may_open: Path | None):
        """Yields a list, which is filled with what was seen at the end."""
        before = self._tree()
        self._seen, self._may = [], may_open
        seen = self._seen
        try:
            yield seen
        finally:
            self._seen = None
        seen += [f"changed {path}" for path, _ in before ^ self._tree()]
        if said := (self._folder / "stderr").read_text(errors="replace"):
            seen.append(f"printed {said[:2000]}")

    def _tree(self) -> set:
        """The files beside those of the reader."""
        outside = (path for path in (self._folder / "outside").rglob("*") if path.is_file())
        found = {(str(path), path.stat().st_mtime_ns) for path in outside}
        return found | {(str(path), 0) for path in [*Path(".").iterdir(), *self._folder.iterdir()]}

    def _opened(self, event: str, arguments: tuple) -> None:
        if event != "open" or self._seen is None or not isinstance(arguments[0], (str, bytes)):
            return
        path, _, flags = arguments
        path = os.path.abspath(os.fsdecode(path))
        own = path.startswith(os.getcwd() + "/")
        if path.startswith(str(self._folder)) and not own or path.startswith("/etc/passwd"):
            self._seen.append(f"opened {path}")
        if flags & (os.O_WRONLY | os.O_RDWR) and not own and not path.startswith(("/dev/", "/tmp")):
            self._seen.append(f"wrote {path}")

    def _logged(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if self._seen is not None and not (_is_plain(line) and len(line) <= ending.LONGEST):
            self._seen.append(f"logged at {record.filename}:{record.lineno} {line[:300]!r}")


def main(first: str, *names: str) -> int:
    from tests.support.readers import READERS

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    worker = Worker(folder)
    if ":" in first:
        name, number = first.split(":")
        print(*worker.read(name, int(number)), f"the files are in {folder / name}/files", sep="\n")
        worker.close()
        return 0
    kinds, failures = (*GOOD, "anything else"), collections.defaultdict(list)
    print(f"{'reader':20}" + "".join(f"{kind:>15}" for kind in kinds) + "        seconds")
    total = collections.Counter()
    for name in names or READERS:
        counts, start = collections.Counter(), time.monotonic()
        for number in range(int(first)):
            outcome = worker.read(name, number)
            counts[outcome.kind if outcome.kind in GOOD else kinds[-1]] += 1
            if outcome.kind not in GOOD:
                failures[f"{name}: {outcome.kind}"].append((number, outcome))
        print(f"{name:20}" + "".join(f"{counts[kind]:15}" for kind in kinds), end="")
        print(f"{time.monotonic() - start:15.1f}", flush=True)
        total += counts
    print(f"{'all':20}" + "".join(f"{total[kind]:15}" for kind in kinds))
    worker.close()
    for kind, found in failures.items():
        number, outcome = found[0]
        print(f"\n{len(found)} times {kind}, first with number {number}: {outcome.change}")
        print(outcome.message)
    return bool(failures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
    sys.exit(main(*sys.argv[1:]))
