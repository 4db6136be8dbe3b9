"""Google Cloud Storage through gcsfs, with patient retries and conditional writes.

Importing this module needs the extra [gcs].
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import fsspec
import google.auth.exceptions
from etils import epath
from fsspec.asyn import sync_wrapper
from gcsfs.core import GCSFileSystem  # gcsfs.GCSFileSystem asks by gRPC for the kind of a bucket
from gcsfs.retry import HttpError, is_retriable
from google.api_core.exceptions import RetryError
from google.api_core.retry import AsyncRetry

from prmoe_jax.errors import first_line

log = logging.getLogger(__name__)

# Seconds for which a request is retried if the store does not answer, or answers 429 or 5xx; with
# gcsfs alone it is half a minute.
PATIENCE = 300.0
LONGEST_WAIT = 30.0  # seconds between two attempts
_OBJECT = "b/{}/o/{}"  # the part of a URL that names an object


class Version(NamedTuple):
    """An object as it was read."""

    content: bytes
    generation: int  # the store's number of this version; each write has another
    age: float  # seconds since it was written, by the store's clock


class PatientGCS(GCSFileSystem):
    """gcsfs's file system, which retries for `PATIENCE` and raises the store's errors as OSError.

    `etils.epath`, and through it Orbax, use it as well. Listings are not cached, because other
    processes write, too.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **{"use_listings_cache": False} | named)
        self._failing_since = math.inf

    async def _call(self, method, path, *arguments, **named):
        # All requests share the time limit, which starts at the first failure.
        failing = max(0.0, time.monotonic() - self._failing_since)
        repeat = AsyncRetry(
            predicate=_may_pass,
            maximum=LONGEST_WAIT,
            timeout=PATIENCE - failing,
            on_error=self._failed,
        )
        try:
            answer = await repeat(super()._call)(method, path, *arguments, **named)
        except Exception as error:
            cause = error.cause if isinstance(error, RetryError) else error
            if not _may_pass(cause):
                self._failing_since = math.inf
            raise _as_os_error(cause, _named(path, arguments)) from error
        self._failing_since = math.inf
        return answer

    call = sync_wrapper(_call)

    def _failed(self, error: Exception) -> None:
        self._failing_since = min(self._failing_since, time.monotonic())
        log.warning("the object store fails (%s)", first_line(error))


def read(path: Path) -> Version:
    """Reads an object with its generation; FileNotFoundError if there is none."""
    store, bucket, name = _located(path)
    while True:
        headers, about = store.call("GET", _OBJECT, bucket, name)
        described = json.loads(about)
        generation = described["generation"]
        with contextlib.suppress(FileNotFoundError):  # replaced since, or deleted
            _, content = store.call(
                "GET", _OBJECT, bucket, name, alt="media", generation=generation
            )
            written = datetime.fromisoformat(described["updated"])
            age = parsedate_to_datetime(headers["Date"]) - written
            return Version(content, int(generation), max(0.0, age.total_seconds()))


def write_if(path: Path, content: bytes, generation: int) -> int:
    """Writes an object if it still has this generation (0: does not exist); returns the new one.

    Raises:
      FileExistsError: it has another one, perhaps from an attempt of ours whose answer was lost.
      FileNotFoundError: the bucket does not exist.
    """
    store, bucket, name = _located(path)
    described = store.call(
        "POST",
        f"{store._location}/upload/storage/v1/b/{quote(bucket)}/o",
        uploadType="media",
        name=name,
        ifGenerationMatch=str(generation),
        headers={"Content-Type": "text/plain"},
        data=content,
        json_out=True,
    )
    return int(described["generation"])


def delete_if(path: Path, generation: int) -> None:
    """Deletes an object; FileExistsError if it has another generation."""
    store, bucket, name = _located(path)
    store.call("DELETE", _OBJECT, bucket, name, ifGenerationMatch=str(generation))


def write(path: Path, content: bytes) -> None:
    """Writes an object whole: readers see the old content or the new one."""
    _store().pipe_file(os.fspath(path), content)


def upload(file: Path, path: Path) -> None:
    """Copies a local file, part by part, to an object."""
    _store().put_file(os.fspath(file), os.fspath(path))


def ask(folder: Path) -> None:
    """Lists one object; OSError if there is no such bucket, or no permission."""
    store, bucket, name = _located(folder)
    store.call("GET", "b/{}/o", bucket, prefix=f"{name}/", maxResults="1")


def find(folder: Path) -> list[Path]:
    """All objects of a folder and its subfolders."""
    return [epath.Path(f"gs://{name}") for name in _store().find(os.fspath(folder))]


def move_folder(source: Path, target: Path, last: str) -> None:
    """Copies all objects of a folder within the store, then deletes them.

    `last` is the object that was written last to `source`. It is deleted first: until then the
    folder counts as complete, so that a killed process's move can be repeated.
    """
    store = _store()
    old, new = (os.fspath(path).removeprefix("gs://") for path in (source, target))
    names = store.find(old)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        store.copy(names, [new + name.removeprefix(old) for name in names], on_error="ignore")
        if f"{old}/{last}" in names:
            store.rm_file(f"{old}/{last}")
        store.rm(old, recursive=True)


def _located(path: Path) -> tuple[PatientGCS, str, str]:
    """The store, and the bucket and the name of an object in it."""
    bucket, name, _ = _store().split_path(os.fspath(path))
    return _store(), bucket, name


def _store() -> PatientGCS:
    # With epath's arguments, so that both share one file system.
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later, so that a retry makes sense."""
    transient = isinstance(error, TimeoutError) or is_retriable(error)
    return transient and not _lacks_credentials(error)


def _lacks_credentials(error: Exception) -> bool:
    refused = isinstance(error, HttpError) and error.code in (401, "401")
    return refused or isinstance(error, google.auth.exceptions.GoogleAuthError)


def _named(path: str, arguments: Sequence[str]) -> str:
    """The name of what a request reads or writes: gs://BUCKET/OBJECT, or gs://BUCKET."""
    bucket = re.search(r"(?:^|/)b/([^/{}]+)", path)  # the path may be a whole URL
    return "gs://" + ("/".join(arguments[:2]) or (bucket[1] if bucket else ""))


def _as_os_error(error: Exception, name: str) -> Exception:
    """Turns errors of the store into OSErrors that tell a user what to do; returns others as is."""
    line = first_line(error)
    if isinstance(error, FileExistsError):
        return error
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object, or no such bucket", name)
    if _lacks_credentials(error):
        reason = (
            f"no valid credentials ({line}); run gcloud auth application-default login, or set "
            "GOOGLE_APPLICATION_CREDENTIALS"
        )
        return PermissionError(errno.EACCES, reason, name)
    if isinstance(error, OSError) and line.startswith("Forbidden"):
        reason = str(error).partition("\n")[2] or line
        reason = f"permission denied ({first_line(OSError(reason))})"
        return PermissionError(errno.EACCES, reason, name)
    if isinstance(error, HttpError) or is_retriable(error):
        return OSError(errno.EIO, f"the object store fails ({line})", name)
    return error


# For gs://, fsspec uses `PatientGCS`, and epath uses fsspec. Without this variable, epath would
# prefer TensorFlow's file system where TensorFlow is installed.
os.environ.setdefault("EPATH_USE_TF", "false")
for _name in ("gcs", "gs"):
    fsspec.register_implementation(_name, PatientGCS, clobber=True)
# gcsfs logs each failure with a traceback; `PatientGCS` logs one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
