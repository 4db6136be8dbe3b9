"""Writes and checks results.jsonl, which has one line, a record, for each finished run."""

import json
import statistics
from pathlib import Path
from typing import BinaryIO

from prmoe_jax import files
from prmoe_jax.config.loading import RESUMABLE, load
from prmoe_jax.config.schema import Config, InitConfig, changed
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.model.sizes import cost
from prmoe_jax.run.directory import CONFIG
from prmoe_jax.run.metrics import METRICS, read_metrics
from prmoe_jax.stores import expand
from prmoe_jax.stores.lock import hold
from prmoe_jax.sweep.definition import Run
from prmoe_jax.tables import aligned

RESULTS = "results.jsonl"
LOCK = ".results.lock"
NUMBER = (int, float)
TEXT = "data.", "model.vocab_size"  # the settings of a run's text
LARGEST = 1e18  # numbers of a record must be smaller
# The fields of a record that `prmoe sweep` and `prmoe report` show; `record` describes them.
# Old records have no `layers` and no `evaluated_tokens`; only some have `documents`.
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
POINTS = 100  # a record keeps at most so many points of the training loss
# The fields from which a record is made: of steps and of evaluations in metrics.jsonl, and of
# starts in environment.json.
TRAINED = {"tokens": int, "loss": NUMBER, "lm_loss": NUMBER, "tokens_per_second": NUMBER}
EVALUATED = {"eval/tokens": int, "eval/loss": NUMBER, "eval/bits_per_byte": NUMBER}
EVALUATED |= {"eval/drop_fraction": NUMBER}
START = {"git_revision": (str, type(None)), "versions": dict, "device": str}


def record(name: str, config: Config, workdir: Path) -> dict:
    """The results of a finished run.

    Returns:
      run, seed, total_params, active_params, versions and device; and:
        settings: those that differ from the defaults and may not change on resuming.
        flops_per_token: of training.
        tokens, loss, bits_per_byte, drop_fraction: at the end of the run.
        layers: the last evaluation's statistics of each MoE layer, see `metrics.summarise`.
        evaluations, losses (of training): lists of [tokens, nats per token].
        evaluated_tokens: number of tokens of each evaluation.
        documents: with `eval.documents`, of each validation document [nats, targets] at the end;
          nats are rounded to 0.01, and the order is that of the split.
        tokens_per_second: median over steps, of a branch over its own ones.
        revisions: git revisions, of a branch also the trunk's, from which it continued.
    """
    (trained, evaluated), size = logged(workdir), cost(config.model, config.moe)
    if not (trained and evaluated):
        raise UserError(f"{workdir}/metrics.jsonl holds no step, or no evaluation")
    last, a_step = evaluated[-1], config.tokens_per_step
    starts, branch_step = _starts(workdir)
    own = [line for line in trained if line["step"] > branch_step] or trained
    every = -(-len(trained) // POINTS)
    layers: dict[str, dict] = {}
    for key, value in last.items():
        if key.startswith("eval/layers/"):
            layer, _, of = key.removeprefix("eval/layers/").partition("/")
            layers.setdefault(layer, {})[of] = value
    return {
        "run": name,
        "settings": _settings(config),
        "seed": config.seed,
        "total_params": size.total_params,
        "active_params": size.active_params,
        "flops_per_token": size.train_flops_per_token,
        "tokens": last["step"] * a_step,
        "loss": last["eval/loss"],
        "bits_per_byte": last["eval/bits_per_byte"],
        "drop_fraction": last["eval/drop_fraction"],
        "layers": layers,
        "evaluations": [[line["step"] * a_step, line["eval/loss"]] for line in evaluated],
        "evaluated_tokens": [line["eval/tokens"] for line in evaluated],
        "losses": [[line["tokens"], line["lm_loss"]] for line in trained[::every]],
        **({"documents": last["eval/documents"]} if "eval/documents" in last else {}),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in own),
        "revisions": sorted({start["git_revision"] or "unknown" for start in starts}),
        "versions": starts[-1]["versions"],
        "device": starts[-1]["device"],
    }


def logged(workdir: Path) -> tuple[list[dict], list[dict]]:
    """The lines of a run's metrics.jsonl: those of steps, and those of evaluations."""
    path = workdir / METRICS
    lines = read_metrics(path)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval/loss" in line]
    fix = "delete that line, or restore a copy of the file"
    for kind, some in (TRAINED, trained), (EVALUATED, evaluated):
        for line in some:
            files.require(line, kind, f"{path}: the line of step {line['step']}", fix)
    return trained, evaluated


def read(folder: Path) -> list[dict]:
    """All records of a folder's results.jsonl, in the file's order; none if there is no file.

    Each record has the name of its run and its settings; `complete` checks the rest.
    """
    path = folder / RESULTS
    rows = files.read_json_lines(path, {}, FIX)
    if rows and not any("run" in row for row in rows):
        raise UserError(f"{path} holds no runs of prmoe sweep")
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number},"
        files.require(row, {"run": str, "settings": dict}, where, FIX)
        if not (row["run"] and row["run"].isprintable()):
            raise UserError(f"{where} is damaged: run is {row['run']!r:.60}; {FIX}")
    return rows


def complete(folder: Path, rows: list[dict]) -> list[dict]:
    """Checks that each record has all fields that are shown, and returns the records.

    Settings that may change on resuming are left out.
    """
    for row in rows:
        where = f"{folder / RESULTS}: the record of {row['run']}"
        files.require(row, FIELDS, where, FIX)
        layers, counts = row.get("layers", {}), row.get("evaluated_tokens")
        documents = row.get("documents")
        for name, good in {
            "evaluations": row["evaluations"] and _are_pairs(row["evaluations"]),
            "evaluated_tokens": counts is None or _are_numbers(counts, len(row["evaluations"])),
            "losses": _are_pairs(row["losses"]),
            "documents": documents is None
            or (isinstance(documents, list) and _are_pairs(documents)),
            "layers": isinstance(layers, dict) and all(map(_is_layer, layers.values())),
            "versions": all(isinstance(v, (str, type(None))) for v in row["versions"].values()),
            "revisions": all(isinstance(revision, str) for revision in row["revisions"]),
            **{name: _fits(row[name]) for name, kind in FIELDS.items() if kind in (int, NUMBER)},
        }.items():
            if not good:
                raise UserError(f"{where} is damaged: {name} is {row[name]!r:.60}; {FIX}")
    return [row | {"settings": _lasting(row["settings"])} for row in rows]


def check_one_text(rows: list[dict]) -> None:
    """Checks that runs with equal text settings were evaluated on equal numbers of tokens."""
    counted: dict[str, dict] = {}
    for row in rows:
        if not row.get("evaluated_tokens"):
            continue
        of_text = {n: v for n, v in row["settings"].items() if n.startswith(TEXT)}
        other = counted.setdefault(json.dumps(of_text, sort_keys=True), row)
        ours, theirs = (one["evaluated_tokens"][-1] for one in (row, other))
        if ours != theirs:
            raise UserError(
                f"{other['run']} was evaluated on {theirs:,} tokens and {row['run']} on {ours:,}, "
                "with the same settings of the text, which has changed between them; train one of "
                "them again"
            )


def of_runs(rows: list[dict], runs: dict[str, Run]) -> list[dict]:
    """The records of `runs` with the same settings, in the order of `runs`."""
    known = {
        row["run"]: row
        for row in rows
        if row["run"] in runs and _lasting(row["settings"]) == _settings(runs[row["run"]].config)
    }
    return [known[name] for name in runs if name in known]


def add(folder: Path, record: dict, order: list[str]) -> None:
    """Adds a record, which replaces an older one of the same run.

    Other processes may add to the file at the same time. The records of the runs `order` come
    first, in this order.
    """
    rank = {name: number for number, name in enumerate(order)}
    with locked(folder):
        rows = [row for row in read(folder) if row["run"] != record["run"]]
        rows.append(record)
        rows.sort(key=lambda row: rank.get(row["run"], len(rank)))
        files.replace(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))


def locked(folder: Path) -> BinaryIO:
    """Waits for the lock of a folder's results, and returns it; closing it frees it."""
    path = folder / LOCK
    with refusing(f"{path} cannot be written", OSError):
        return hold(path, wait=True)


def table(records: list[dict]) -> str:
    """The records as text."""
    rows = [
        (
            row["run"],
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['total_params'] / 1e6:.2f}M",
            f"{row['active_params'] / 1e6:.2f}M",
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in records
    ]
    return aligned(("run", "loss", "bits/byte", "params", "active", "tokens/s"), rows)


def _starts(workdir: Path) -> tuple[list[dict], int]:
    """Reads a run's starts from its environment.json, and the step at which it left its trunk or 0.

    The starts are at least one ('unknown' if none is recorded), oldest first. The trunk's come
    before, if its folder is still there.
    """
    path = workdir / "environment.json"
    fix = "delete it (the record then says 'unknown'), or restore a copy"
    starts = files.read_json(path, list, fix) if path.exists() else []
    for start in starts:
        files.require(start, START, str(path), fix)
    starts = starts or [{"git_revision": None, "versions": {}, "device": "unknown"}]
    init = load(workdir / CONFIG).init if (workdir / CONFIG).exists() else InitConfig()
    if init.step and (trunk := expand("init.workdir", init.workdir)).is_dir():
        starts = _starts(trunk)[0] + starts
    return starts, init.step


def _settings(config: Config) -> dict:
    """Settings that differ from the defaults, as JSON has them, but those that may change."""
    return _lasting(json.loads(json.dumps(changed(config))))


def _lasting(settings: dict) -> dict:
    """Leaves out settings that may change on resuming; older records may have them."""
    return {name: v for name, v in settings.items() if not name.startswith(RESUMABLE)}


def _are_pairs(values: list) -> bool:
    return all(_are_numbers(value, 2) for value in values)


def _is_layer(value) -> bool:
    shares = value.get("position_drop_fraction") if isinstance(value, dict) else None
    return bool(shares) and all(_fits(x) or _are_numbers(x) for x in value.values())


def _are_numbers(values, count: int | None = None) -> bool:
    of_length = isinstance(values, list) and count in (None, len(values))
    return of_length and all(map(_fits, values))


def _fits(value) -> bool:
    """Whether a value is a number of plausible size; NaN is not."""
    return isinstance(value, NUMBER) and abs(value) < LARGEST
