"""Which runs of a sweep a run needs: its trunk, the run that initialises it, and its teacher.

The latter two must be finished. The trunk is the run from whose checkpoint a branch continues;
without that checkpoint the branch trains the trunk's steps itself, with the same result.
"""

import dataclasses
import functools
from pathlib import Path

from prmoe_jax import stores
from prmoe_jax.config.loading import check_resume, load
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, telling
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.metrics import finished
from prmoe_jax.stores import expand
from prmoe_jax.sweep import records
from prmoe_jax.sweep.definition import Run, branch


@dataclasses.dataclass(frozen=True)
class Work:
    """The runs of a sweep, the folder of its records, and the parent of the runs' folders."""

    runs: dict[str, Run]
    folder: Path
    root: Path

    @functools.cached_property
    def needs(self) -> dict[str, list[str]]:
        """For each run, the names of the sweep's runs that it needs."""
        names = {_place(self.root / name): name for name in self.runs}
        needs = {}
        for name, (config, trunk) in self.runs.items():
            read = [config.init.workdir, config.teacher.workdir]
            found = [trunk, *(names.get(place) for place in _places(read))]
            needs[name] = [other for other in dict.fromkeys(found) if other not in (None, name)]
        return needs

    def recorded(self) -> set[str]:
        """The runs that have a record with the same settings."""
        return {row["run"] for row in records.of_runs(records.read(self.folder), self.runs)}


def share(needs: dict[str, list[str]], number: int, count: int) -> list[str]:
    """The runs in the `number`-th of `count` shares; runs that need one another stay together."""
    first = {name: name for name in needs}  # the same for all runs that belong together
    for name, others in needs.items():
        for other in others:
            old, new = first[name], first[other]
            first = {one: new if of == old else of for one, of in first.items()}
    mine = set(list(dict.fromkeys(first.values()))[number - 1 :: count])
    return [name for name in needs if first[name] in mine]


def check_needed(work: Work, name: str, begins: Config | None) -> None:
    """Checks that the runs that a run needs, except its trunk, are finished as the sweep says.

    `begins` is the config with which the run starts, or None if it resumes from its own checkpoint.
    """
    config, trunk = work.runs[name]
    starts = _starts(config, begins) if begins else []
    for other in work.needs[name]:
        if other == trunk:
            continue
        config, workdir = work.runs[other].config, work.root / other
        where = work.folder / records.RESULTS
        again = f"to train {other} again, delete its folder and its line in {where}"
        if not finished(config, workdir):
            fix = f"the same command goes on with {name} once it is"
            if other in work.recorded():
                fix = f"since it is recorded, {again}"
            raise UserError(f"it needs {other}, which is not finished in {workdir}; {fix}")
        saved = load(workdir / workdirs.CONFIG)
        if work.runs[other].trunk is not None:  # a branch may have started anywhere
            config = dataclasses.replace(config, init=saved.init)
        with telling(f"it needs {other}: in {workdir} "):
            check_resume(saved, config)
        if _place(workdir) in starts and not has_checkpoint(workdir, config.total_steps):
            raise UserError(
                f"it needs the checkpoint of step {config.total_steps} of {other}, which is not in "
                f"{workdir}; {again}"
            )


def has_checkpoint(workdir: Path, step: int) -> bool:
    """Whether a run's folder has the checkpoint of a step."""
    return (workdir / workdirs.CHECKPOINTS / str(step)).is_dir()


def discard_checkpoints(work: Work, name: str) -> None:
    """Deletes the checkpoints of a recorded run that no run of the sweep needs any more.

    The checkpoint at the start of its decay stays if no run branches off there, so that a longer
    run can be added to the sweep.
    """
    config, workdir, done = work.runs[name].config, work.root / name, work.recorded()
    branches = {other: run.config for other, run in work.runs.items() if run.trunk == name}
    starts = {other: branch(one, config, workdir).init.step for other, one in branches.items()}
    needed = {step for other, step in starts.items() if other not in done}
    if config.decay_start not in starts.values():
        needed.add(config.decay_start or 0)
    learners = {other for other, others in work.needs.items() if name in others} - starts.keys()
    if name not in done or not learners <= done:
        return
    for path in (workdir / workdirs.CHECKPOINTS).glob("*"):
        if path.is_dir() and path.name not in map(str, needed):
            stores.delete_folder(path)


def _place(folder: Path) -> Path:
    """The path of a run's folder in one form, without links, so that paths can be compared."""
    return folder.resolve() if stores.is_local(folder) else folder


def _places(folders: list[str]) -> list[Path]:
    return [_place(expand("the folder of another run", folder)) for folder in folders if folder]


def _starts(config: Config, begins: Config) -> list[Path]:
    """The folders of the runs whose last checkpoint a run reads when it starts.

    `begins` is its config with another `init` if it is a branch.
    """
    step, starts = begins.init.step, []
    if not step:
        starts.append(config.init.workdir)
    inherits = config.teacher.inherit and not step
    learns = step < config.kd_steps and not config.teacher.cache
    if inherits or learns:
        starts.append(config.teacher.workdir)
    return _places(starts)
