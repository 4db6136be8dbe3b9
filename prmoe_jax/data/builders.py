"""The corpora `tfds:NAME`: TFDS datasets, stored as array_record and read without TensorFlow."""

import contextlib
import difflib
import errno
import io
import logging
import math
import os
import pathlib
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data import cache
from prmoe_jax.errors import UserError, first_line, refusing

log = logging.getLogger(__name__)

# The other formats fail without TensorFlow (tfrecord) or lose rows (parquet).
_FORMAT = "array_record"
_HOST = "https://storage.googleapis.com"
_READ_AHEAD = 64


class Documents:
    """The documents of one prepared split, read from disk on demand."""

    def __init__(self, examples: Sequence[dict], text_field: str, directory: pathlib.Path):
        self._examples, self._field, self._directory = examples, text_field, directory

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, first: int, last: int) -> Iterator[str]:
        """Documents [first, last)."""
        for start in range(first, last, _READ_AHEAD):  # one read for many examples
            indices = range(start, min(start + _READ_AHEAD, last))
            with cache.reading(self._directory):
                examples = self._examples.__getitems__(list(indices))
            for index, example in zip(indices, examples, strict=True):
                with refusing(f"document {index} of {self._directory} is not text", ValueError):
                    text = example[self._field].decode()
                yield text


def prepare_named(config: DataConfig, directory: pathlib.Path) -> dict[str, Documents]:
    """Opens the TFDS dataset of 'tfds:NAME'; downloads it to `directory` the first time.

    The validation split is the dataset's 'validation' split, else its 'test' split, else the first
    `validation_fraction` of 'train'.
    """
    name = config.corpus.removeprefix("tfds:")
    builder = _find_builder(name, directory)
    _check_text_field(builder, config)
    prepared = pathlib.Path(builder.data_path)
    if prepared.exists():
        with cache.reading(prepared):
            cache.check(prepared)
    else:
        _check_network(name, directory)
        with cache.locked(prepared):
            if not prepared.exists():  # another process may have prepared it meanwhile
                _prepare(builder, config.corpus)
                cache.seal(prepared)
        builder = _find_builder(name, directory)  # unlike the old one, it knows the splits
    splits = _named_splits(builder.info.splits, config)
    with cache.reading(prepared):
        return {
            part: Documents(builder.as_data_source(instruction), config.text_field, prepared)
            for part, instruction in splits.items()
        }


def _prepare(builder: tfds.core.DatasetBuilder, corpus: str) -> None:
    """Prepares a dataset; raises an OSError if the disk is full, else a one-line UserError."""
    log.info("preparing the corpus %s in %s", corpus, builder.data_path)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        # TFDS prints to stdout, which is for the command's own results.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and "tensorflow" in str(error):
            raise UserError(
                f"{corpus!r} can't be prepared without TensorFlow, which TFDS needs for some "
                "datasets, and for those of more than 1 GB; pip install tensorflow"
            ) from error
        # A writer may wrap the system's error and only quote its message.
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise UserError(
            f"cannot prepare {corpus!r} in {builder.data_path}: {first_line(error)}"
        ) from error


def _find_builder(name: str, directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    dataset, _, config = name.split(":")[0].partition("/")
    known = set(tfds.list_builders(with_community_datasets=False))
    if dataset not in known:
        close = difflib.get_close_matches(dataset, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it knows {len(known)} others"
        raise UserError(f"TFDS has no dataset {dataset!r}; {hint}")
    configs = tfds.builder_cls(dataset).builder_configs
    if config and config not in configs:
        close = difflib.get_close_matches(config, configs, n=8, cutoff=0) or ["none"]
        raise UserError(f"TFDS dataset {dataset!r} has no config {config!r}; it has {close}")
    prepared = directory / dataset
    fix = f"if {prepared} is damaged, delete it, it is made again" * prepared.exists()
    # Datasets are code by many authors, which may raise anything.
    with refusing(f"cannot open TFDS dataset {name!r}", fix=fix):
        return tfds.builder(name, data_dir=directory, file_format=_FORMAT)


def _check_text_field(builder: tfds.core.DatasetBuilder, config: DataConfig) -> None:
    features = builder.info.features or {}
    text = [field for field in features if isinstance(features[field], tfds.features.Text)]
    if config.text_field not in text:
        raise UserError(
            f"{config.corpus!r} has no text field {config.text_field!r}; its text fields are "
            f"{text or 'none'}, of {list(features)}; set --config.data.text_field"
        )


def _check_network(name: str, directory: pathlib.Path) -> None:
    """Fails within seconds if there is no network; TFDS would retry for minutes."""
    what = f"TFDS dataset {name!r} is not prepared in {directory} and {_HOST} cannot be reached"
    fix = "prepare it where there is a network, and copy it into that folder"
    any_answer = contextlib.suppress(urllib.error.HTTPError)  # shows that the host can be reached
    with refusing(what, OSError, fix), any_answer:
        urllib.request.urlopen(_HOST, timeout=3).close()


def _named_splits(splits: dict, config: DataConfig) -> dict[str, str]:
    if "train" not in splits:
        raise UserError(f"{config.corpus!r} has no 'train' split; it has {list(splits)}")
    for name in ("validation", "test"):
        if name in splits:
            return {"train": "train", "validation": name}
    total = splits["train"].num_examples
    count = math.ceil(config.validation_fraction * total)
    return {"train": f"train[{count}:]", "validation": f"train[:{count}]"}
