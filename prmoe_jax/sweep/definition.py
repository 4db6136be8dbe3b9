"""Reads a sweep's sweep.py: the runs and the constants that it defines.

A run may be a branch: it continues from a checkpoint of another run, its trunk, as the decay branch
of a WSD schedule does.
"""

import ast
import contextlib
import dataclasses
import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from prmoe_jax.config import userfile
from prmoe_jax.config.loading import check_branch, resolve
from prmoe_jax.config.schema import Config, InitConfig, leaves
from prmoe_jax.errors import UserError, refusing, telling

log = logging.getLogger(__name__)

LONGEST_NAME = 255  # bytes, on every common file system


class Run(NamedTuple):
    """A run of a sweep: its config, as if it started at step 0, and the name of its trunk."""

    config: Config
    trunk: str | None = None


class Constants(NamedTuple):
    """The constants that a sweep.py may define, in capitals."""

    keep_checkpoints: bool = True  # whether checkpoints of recorded runs stay
    margin: float | None = None  # nats per token; smaller differences count as none, `report.arms`
    pooled: bool = False  # whether to estimate seed noise from all arms, `report.arms.spread`
    ladder: bool = False  # whether to compare MoEs with the dense arms, `report.multiplier`
    predicted: dict[str, float] = {}  # by arm: multiplier of active parameters by a scaling law
    law: str = "a scaling law"  # name of that law
    varying: tuple[str, ...] = ()  # settings besides the seed that may differ in an arm
    contrasts: tuple[tuple[str, str], ...] = ()  # pairs of arms that are compared


NAMES = {name.upper() for name in Constants._fields}


class Sweep(NamedTuple):
    """The runs of a sweep by name, in order, and its constants."""

    runs: dict[str, Run]
    constants: Constants


def planned(folder: Path) -> Sweep:
    """Reads the sweep in a folder's sweep.py.

    The file's function `runs` yields (name, settings) for each run, or (name, settings, trunk) for
    a branch; the trunk is the name of an earlier run.
    """
    path = folder / "sweep.py"
    if not _is_there(path):
        raise UserError(f"{path} is missing; it must define runs(), which yields (name, settings)")
    stated = constants(folder)
    with userfile.mistakes(path, str(path)):
        runs = _checked(path, userfile.call(path, "runs", named=str(path)))
    arms = dict.fromkeys(name.rpartition("/")[0] or name for name in runs)
    if wrong := [arm for pair in stated.contrasts for arm in pair if arm not in arms]:
        raise UserError(
            f"{path}: CONTRASTS names {wrong[0]!r:.80}; the runs' arms are {', '.join(arms)}"
        )
    return Sweep(runs, stated)


def constants(folder: Path) -> Constants:
    """Reads a sweep.py's constants without running it; the defaults if there is no file."""
    path = folder / "sweep.py"
    if not _is_there(path):
        return Constants()
    found = _assigned(path)
    for name, value in found.items():
        if not _is_good(name, value):
            wanted = WANTED.get(name, "True or False")
            raise UserError(f"{path}: {name.upper()} is {value!r:.80}; it must be {wanted}")
    return Constants(**found)


def _is_there(path: Path) -> bool:
    with refusing(f"{path} cannot be read", OSError):
        return path.is_file()


def _assigned(path: Path) -> dict:
    """The values of the constants that a file assigns, by their names in lower case."""
    with userfile.mistakes(path, str(path)):
        tree = ast.parse(path.read_bytes(), str(path))
    plain: dict[ast.AST, object] = {}  # the values of plain assignments, by their targets
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            with contextlib.suppress(ValueError, TypeError):  # {[1]: 2} is a TypeError
                plain[target] = ast.literal_eval(node.value)
    found = {}
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.alias):
            name = node.asname or node.name
        if name in NAMES and node in plain:
            found[name.lower()] = plain[node]
        elif wrong := _wrong(name):
            raise UserError(f"{path}, line {node.lineno}: {wrong}")
    return found


def _wrong(name: str) -> str:
    """What is wrong with a name that isn't assigned a plain value; '' if nothing is."""
    if name in NAMES:
        return (
            f"{name} must be a plain value, such as 0.02 or True, since a report reads the file "
            "without running it"
        )
    if name == "*":
        names = ", ".join(sorted(NAMES))
        return f"import names, not *: a report reads {names} without running the file"
    close = difflib.get_close_matches(name, NAMES, 1, 0.8) if name.isupper() else []
    return f"{name} is no constant of a sweep; did you mean {close[0]}?" if close else ""


# What a constant must be, other than True or False.
WANTED = {
    "margin": "nats above 0, such as 0.02",
    "predicted": "arms and numbers above 0, such as {'E8/3M': 0.6}",
    "law": "a text",
    "varying": "settings, such as ('init.workdir',)",
    "contrasts": "pairs of two arms, such as (('a', 'b'), ('c', 'b'))",
}


def _is_good(name: str, value) -> bool:
    if name == "margin":
        return _is_number(value)
    if name == "predicted":
        named = isinstance(value, dict) and all(isinstance(arm, str) for arm in value)
        return named and all(map(_is_number, value.values()))
    if name == "law":
        return isinstance(value, str)
    if name == "varying":
        return isinstance(value, tuple) and set(map(str, value)) <= leaves(Config()).keys()
    if name == "contrasts":
        pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) for pair in value)
        two = pairs and all(list(map(type, pair)) == [str, str] for pair in value)
        return two and all(arm != base for arm, base in value)
    return isinstance(value, bool)


def _is_number(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _checked(path: Path, items) -> dict[str, Run]:
    if not isinstance(items, Iterable):
        raise UserError(
            f"{path}: runs() returns {type(items).__name__}; it must yield (name, settings)"
        )
    found: dict[str, Run] = {}
    named: dict[tuple, str] = {}  # the runs' names by their settings
    for item in items:  # one by one: the file may reuse one settings object
        if not (isinstance(item, tuple) and len(item) in (2, 3) and isinstance(item[0], str)):
            raise UserError(f"{path}: runs() yields {item!r:.80}, not (name, settings)")
        name, settings, trunk = (*item, None)[:3]
        _check_name(path, name, found)
        if not isinstance(settings, (Mapping, ConfigDict)):
            kind = type(settings).__name__
            raise UserError(f"{path}: the settings of {name} are {kind}, not a dict or ConfigDict")
        if not (trunk is None or trunk in found):
            raise UserError(
                f"{path}: {name} goes on from {trunk!r:.80}, which is no run that comes before it"
            )
        with telling(f"{path}: {name}: "):
            run = Run(resolve(settings), trunk)
            if trunk is not None:
                other = found[trunk]
                start = 0
                if other.trunk is not None:
                    start = branch(other.config, found[other.trunk].config, path).init.step
                _check_trunk(run.config, trunk, other.config, start)
            same = named.setdefault(tuple(leaves(run.config).items()), name)
            if same != name:
                log.warning("%s: %s has the settings of %s and is the same run", path, name, same)
            found[name] = run
    if not found:
        raise UserError(f"{path}: runs() yields nothing")
    return found


def _check_name(path: Path, name: str, found: Iterable[str]) -> None:
    """Checks that a run's folder is a new one, neither inside nor around another run's folder."""
    parts = name.split("/")
    if not re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", name) or ".." in name or "." in parts:
        raise UserError(f"{path}: {name!r:.80} can't name a folder; use letters, digits, '-', '/'")
    if (longest := max(len(part.encode()) for part in parts)) > LONGEST_NAME:
        raise UserError(
            f"{path}: the name {name:.40}… has {longest} bytes, a folder's has at most "
            f"{LONGEST_NAME}; shorten it"
        )
    if name in found:
        raise UserError(f"{path} yields {name!r} twice")
    for before in found:
        outer, inner = sorted((before, name), key=len)
        if inner.startswith(f"{outer}/"):
            raise UserError(
                f"{path}: the folder of {inner!r} would lie in that of {outer!r}, which holds the "
                "files of that run alone; rename one of them"
            )


def branch(config: Config, trunk: Config, workdir: Path) -> Config:
    """The config with which a branch is trained.

    It starts from the trunk's checkpoint of the step at which the trunk's or the branch's learning
    rate begins to decay, whichever comes first.

    Args:
      config: the branch's config, as if it started at step 0.
      trunk: the trunk's config.
      workdir: the trunk's folder.
    """
    starts = [start for start in (trunk.decay_start, config.decay_start) if start is not None]
    init = InitConfig(workdir=str(workdir), step=min(starts, default=0))
    return dataclasses.replace(config, init=init)


def _check_trunk(config: Config, name: str, trunk: Config, start: int) -> None:
    """Checks that a run can branch off a trunk, and that the trunk keeps the checkpoint for it.

    `start` is the step at which the trunk itself branched off another run, or 0.
    """
    if config.decay_start is None:
        raise UserError(
            f"a run that goes on from {name} needs optimizer.schedule=wsd, not "
            f"{config.optimizer.schedule}"
        )
    if config.init != trunk.init:
        raise UserError(f"{name} has another init; the sweep itself sets where a run goes on")
    begun = branch(config, trunk, Path(name))
    check_branch(trunk, begun, name)
    step, every = begun.init.step, trunk.checkpoint.keep_every
    if step == 0:
        raise UserError("its learning rate decays from step 0 on, so that it has no trunk")
    if not start < step <= trunk.total_steps:
        raise UserError(
            f"it goes on from step {step} of {name}, which trains steps {start + 1} to "
            f"{trunk.total_steps}; let it go on from the run that trains step {step}"
        )
    if step != trunk.decay_start and not (every and step % every == 0):
        raise UserError(
            f"it goes on from step {step} of {name}, which keeps the checkpoint of step "
            f"{trunk.decay_start} and of none before; give {name} a checkpoint.keep_every that "
            f"divides {step}, or let the longer run go on from the shorter one"
        )
