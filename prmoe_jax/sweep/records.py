"""results.jsonl: one line for each finished run, checked when it is read back."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from prmoe_jax import files
from prmoe_jax.errors import UserError

RESULTS = "results.jsonl"
LOCK = ".results.lock"
NUMBER = (int, float)
# The fields of a record that `prmoe sweep` and `prmoe report` show; `run.record` describes them.
# Old records have no `layers` and no `evaluated_tokens`.
FIELDS = {
    "seed": int,
    "total_params": int,
    "active_params": int,
    "flops_per_token": NUMBER,
    "tokens": int,
    "loss": NUMBER,
    "bits_per_byte": NUMBER,
    "drop_fraction": NUMBER,
    "evaluations": list,
    "losses": list,
    "tokens_per_second": NUMBER,
    "revisions": list,
    "versions": dict,
    "device": str,
}
FIX = "delete that line (prmoe sweep records its run again, from the run's folder if that is left)"


def read(folder: Path) -> list[dict]:
    """All records of a folder's results.jsonl, in the file's order; none if there is no file.

    Each record has the name of its run and its settings; `complete` checks the rest.

    Raises:
      UserError: the file cannot be read, one of its lines is not a record (names the line), or
        the file holds something else.
    """
    path = folder / RESULTS
    rows = files.read_json_lines(path, (), FIX)
    if rows and not any("run" in row for row in rows):
        raise UserError(f"{path} holds no runs of prmoe sweep")
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number},"
        files.require(row, {"run": str, "settings": dict}, where, FIX)
        if not (row["run"] and row["run"].isprintable()):
            raise UserError(f"{where} is damaged: run is {row['run']!r:.60}; {FIX}")
    return rows


def complete(folder: Path, rows: list[dict]) -> list[dict]:
    """Returns `rows`, after checking that each has all fields that are shown.

    Raises:
      UserError: a record lacks a field or is damaged; names the record.
    """
    for row in rows:
        where = f"{folder / RESULTS}: the record of {row['run']}"
        files.require(row, FIELDS, where, FIX)
        layers, counts = row.get("layers", {}), row.get("evaluated_tokens")
        for name, good in {
            "evaluations": row["evaluations"] and all(map(_is_pair, row["evaluations"])),
            "evaluated_tokens": counts is None or _are_numbers(counts, len(row["evaluations"])),
            "losses": all(map(_is_pair, row["losses"])),
            "layers": isinstance(layers, dict) and all(map(_is_layer, layers.values())),
            "revisions": all(isinstance(revision, str) for revision in row["revisions"]),
        }.items():
            if not good:
                raise UserError(f"{where} is damaged: {name} is {row[name]!r:.60}; {FIX}")
    return rows


def add(folder: Path, record: dict, order: list[str]) -> None:
    """Adds a record in place of those of the same run; records of other runs are kept.

    Args:
      folder: the folder of results.jsonl, to which other processes may add at the same time.
      record: from `run.record`.
      order: names of runs, whose records come first and in this order.

    Raises:
      UserError: the file cannot be read or written; it is then unchanged.
    """
    rank = {name: number for number, name in enumerate(order)}
    with locked(folder):
        rows = [row for row in read(folder) if row["run"] != record["run"]]
        rows.append(record)
        rows.sort(key=lambda row: rank.get(row["run"], len(rank)))
        files.replace(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder's results, and holds it.

    Raises:
      UserError: the folder cannot be written.
    """
    path = folder / LOCK
    try:
        file = path.open("a")  # NFS locks only files that are open for writing
    except OSError as error:
        raise files.cannot_write(path, error) from error
    with file:  # closing it frees the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}") from error
        yield


def _is_pair(value) -> bool:
    return _are_numbers(value, 2)


def _is_layer(value) -> bool:
    return isinstance(value, dict) and _are_numbers(value.get("position_drop_fraction"))


def _are_numbers(values, count: int | None = None) -> bool:
    if not isinstance(values, list) or count not in (None, len(values)):
        return False
    return all(isinstance(value, NUMBER) for value in values)
