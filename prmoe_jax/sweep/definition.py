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
        is_good, wanted = RULES.get(name, (lambda value: isinstance(value, bool), "True or False"))
        if not is_good(value):
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
        match node:
            case ast.Assign([target], value) | ast.AnnAssign(target, _, value):
                with contextlib.suppress(ValueError, TypeError):  # {[1]: 2} is a TypeError
                    plain[target] = ast.literal_eval(value)
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Store()) | ast.alias(_, str(name)) | ast.alias(name):
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


def _is_number(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_numbers(value) -> bool:
    named = isinstance(value, dict) and set(map(type, value)) <= {str}
    return named and all(map(_is_number, value.values()))


def _are_settings(value) -> bool:
    return isinstance(value, tuple) and set(map(str, value)) <= leaves(Config()).keys()


def _are_pairs(value) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and list(map(type, pair)) == [str, str] and pair[0] != pair[1]
        for pair in value
    )


# What a constant must be, other than True or False.
RULES = {
    "margin": (_is_number, "nats above 0, such as 0.02"),
    "predicted": (_are_numbers, "arms and numbers above 0, such as {'E8/3M': 0.6}"),
    "law": (lambda value: isinstance(value, str), "a text"),
    "varying": (_are_settings, "settings, such as ('init.workdir',)"),
    "contrasts": (_are_pairs, "pairs of two arms, such as (('a', 'b'), ('c', 'b'))"),
}


def _checked(path: Path, items) -> dict[str, Run]:
    if not isinstance(items, Iterable):
        kind = type(items).__name__
        raise UserError(f"{path}: runs() returns {kind}; it must yield (name, settings)")
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
            config = resolve(settings)
            if trunk is not None:
                _check_trunk(config, trunk, found)
        same = named.setdefault(tuple(leaves(config).items()), name)
        if same != name:
            log.warning("%s: %s has the settings of %s and is the same run", path, name, same)
        found[name] = Run(config, trunk)
    if not found:
        raise UserError(f"{path}: runs() yields nothing")
    return found


def _check_name(path: Path, name: str, found: Iterable[str]) -> None:
    """Checks that a run's folder is a new one, neither inside nor around another run's folder."""
    good = re.fullmatch(r"[\w.+=-]+(/[\w.+=-]+)*", name)
    if not good or ".." in name or "." in name.split("/"):
        raise UserError(f"{path}: {name!r:.80} can't name a folder; use letters, digits, '-', '/'")
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
    """The config with which a branch is trained, from its config as if it started at step 0.

    It starts from the trunk's checkpoint of the step at which the trunk's or the branch's learning
    rate begins to decay, whichever comes first. `workdir` is the trunk's folder.
    """
    starts = [start for start in (trunk.decay_start, config.decay_start) if start is not None]
    init = InitConfig(workdir=str(workdir), step=min(starts, default=0))
    return dataclasses.replace(config, init=init)


def _check_trunk(config: Config, name: str, runs: dict[str, Run]) -> None:
    """Checks that a run can branch off the run `name`, which keeps the checkpoint for it."""
    trunk, before = runs[name]
    start = 0  # where the trunk itself branched off
    if before is not None:
        start = branch(trunk, runs[before].config, Path(before)).init.step
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
