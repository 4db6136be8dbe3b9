"""Text to shards is work in stages: each task reads files and writes files of its own.

    digest    for each chunk: the digest of every document, in sorted order       (`split`)
    compare   for each range of digests: the documents that repeat an earlier one (`split`)
    write     for each chunk: its documents as tokens, in both splits             (`tokens`)

A task's result does not depend on which process runs it, when, or how often. A small JSON file,
written last, says that a task is done. Memory is bounded by a chunk's digests, by a range of
digests, and by the text that is encoded at once; texts never leave the task that reads them.
"""

import contextlib
import dataclasses
import json
import sys
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
    """The folder of the shards, and what all tasks know."""

    out: str
    config: DataConfig
    chunks: int

    @property
    def folder(self) -> epath.Path:
        """The folder of the shards."""
        return epath.Path(self.out)

    @property
    def staging(self) -> epath.Path:
        """The folder of the files that are removed at the end."""
        return self.folder / "work"

    @property
    def local(self) -> bool:
        """Whether the folder is on this machine."""
        return not stores.scheme(self.out)

    @contextlib.contextmanager
    def written(self, path: epath.Path) -> Iterator[BinaryIO]:
        """A file that gets its name when it is complete.

        Until then it is among those that are removed at the end. An object of a store appears
        whole anyway.
        """
        if not self.local:
            with path.open("wb") as file:
                yield file
            return
        with files.whole(Path(path), Path(self.staging)) as file:
            yield file

    def done(self, name: str) -> Any:
        """The result of a finished task, or None."""
        path = self.staging / f"{name}.json"
        fix = "delete it, it is made again"
        with (
            refusing(f"{path} is damaged", ValueError, fix),
            contextlib.suppress(FileNotFoundError),
        ):
            return files.parse_json(path.read_bytes())
        return None

    def finish(self, name: str, result: Any) -> None:
        """Records that a task is done."""
        with self.written(self.staging / f"{name}.json") as file:
            file.write(json.dumps(result).encode())


# Runs the tasks of a stage, given as a function and its arguments by the task's name; returns the
# results of all.
Run = Callable[[Callable[..., None], dict[str, tuple]], list[Any]]


@contextlib.contextmanager
def in_this_process(folder: Path, config: DataConfig, chunks: int) -> Iterator[tuple[Work, Run]]:
    """Work in a new local folder, whose tasks this process runs one after the other."""
    work = Work(str(folder), config, chunks)
    work.staging.mkdir()

    def run(function: Callable[..., None], tasks: dict[str, tuple]) -> list[Any]:
        hidden = not sys.stderr.isatty()
        for arguments in tqdm.tqdm(tasks.values(), function.__name__, unit="task", disable=hidden):
            function(work, *arguments)
        return [work.done(name) for name in tasks]

    yield work, run
    work.staging.rmtree()
