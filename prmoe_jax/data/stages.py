"""Makes shards of text in three stages, whose tasks exchange data only by files.

    digest    for each chunk: the sorted digests of its documents                 (`split`)
    compare   for each group of digest ranges: duplicates of earlier documents    (`split`)
    write     for each chunk: its documents as tokens, in both splits             (`tokens`)

A task's result does not depend on which process runs it, when, or how often. A small JSON file,
written last, says that a task is done. A task holds the digests of a chunk, the digests of a group
of ranges, or the text that is encoded at once; texts never leave the task that reads them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import tqdm
from etils import epath

from prmoe_jax import files, stores
from prmoe_jax.config.schema import DataConfig
from prmoe_jax.errors import refusing


@dataclasses.dataclass(frozen=True)
class Work:
    """The folder of the shards, and the arguments that all tasks share."""

    out: str
    config: DataConfig
    chunks: int

    @property
    def folder(self) -> epath.Path:
        """The folder of the shards."""
        return epath.Path(self.out)

    @property
    def staging(self) -> epath.Path:
        """The folder of temporary files, removed at the end."""
        return self.folder / "work"

    @contextlib.contextmanager
    def written(self, path: epath.Path) -> Iterator[BinaryIO]:
        """Opens a file that gets its name only when it is complete, as a store's objects do.

        On a disk it has a temporary name in `staging` until then.
        """
        in_store = stores.scheme(self.out)
        whole = path.open("wb") if in_store else files.whole(Path(path), Path(self.staging))
        with whole as file:
            yield file

    def save(self, path: epath.Path, content: bytes) -> None:
        """Writes a file whole."""
        with self.written(path) as file:
            file.write(content)

    def done(self, name: str) -> Any:
        """The result of a finished task, or None."""
        path = self.staging / f"{name}.json"
        missing, fix = contextlib.suppress(FileNotFoundError), "delete it, it is made again"
        with refusing(f"{path} is damaged", ValueError, fix), missing:
            return files.parse_json(path.read_bytes())
        return None

    def finish(self, name: str, result: Any) -> None:
        """Records that a task is done, and its result."""
        self.save(self.staging / f"{name}.json", json.dumps(result).encode())


# Runs a function with the arguments of each task, by the task's name; returns all results.
Run = Callable[[Callable[..., None], dict[str, tuple]], list[Any]]


@contextlib.contextmanager
def in_this_process(folder: Path, config: DataConfig, chunks: int) -> Iterator[tuple[Work, Run]]:
    """Gives the Work of a new local folder, and a Run that this process does task by task."""
    work = Work(str(folder), config, chunks)
    work.staging.mkdir()

    def run(function: Callable[..., None], tasks: dict[str, tuple]) -> list[Any]:
        for arguments in tqdm.tqdm(tasks.values(), function.__name__, unit="task", disable=None):
            function(work, *arguments)
        return [work.done(name) for name in tasks]

    yield work, run
    work.staging.rmtree()
