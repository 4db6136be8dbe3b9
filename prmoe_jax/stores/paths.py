"""Makes paths from text, local or in an object store.

A local path is a `pathlib.Path`. A path in a store is an `etils.epath.Path`, which has the same
methods. Stores have no locks, no renaming of folders, no appending and no memory maps; code for
which that matters asks `is_local`.
"""

import errno
import importlib
import os
import re
from pathlib import Path

from etils import epath

from prmoe_jax.errors import UserError, missing, refusing

# A scheme at the start of a text. One slash matches, too: pathlib makes one of two.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
# Of each scheme the module of its store, its library, and the extra that installs it.
_CLIENTS = {"gs": ("prmoe_jax.stores.gcs", "gcsfs", "prmoe_jax[gcs]")}
KNOWN = tuple(_CLIENTS)


def scheme(text: str | os.PathLike) -> str:
    """The scheme of a text such as gs://bucket/run, '' for a local path."""
    text = os.fspath(text)
    found = _SCHEME.match(text)
    if not found:
        return ""
    name, slashes = found.groups()
    if name not in KNOWN and slashes != "//":  # a file's name, such as 'tokens:/shards'
        return ""
    if name not in KNOWN:
        raise UserError(f"{text}: there is no store {name}://; give a local folder, or gs://BUCKET")
    if slashes != "//":
        raise UserError(
            f"{text}: a slash of {name}:// is missing; give text, since pathlib.Path removes it"
        )
    if not re.match(r"[a-z0-9][\w.-]+(/|$)", text[found.end() :], re.ASCII):
        raise UserError(f"{text}: the bucket is missing; give {name}://BUCKET/FOLDER")
    return name


def as_path(text: str | os.PathLike) -> Path:
    """The path that a text names, local or in a store."""
    if not scheme(text):
        return Path(text)
    client(text)  # epath then uses it
    return epath.Path(os.fspath(text))


def client(path: str | os.PathLike):
    """The module for the object store of a path, which need not exist."""
    module, library, extra = _CLIENTS[scheme(path)]
    with missing(f"{os.fspath(path)}: {scheme(path)}:// needs {library}", extra):
        return importlib.import_module(module)


def expand(name: str, text: str | os.PathLike) -> Path:
    """The path in the setting `name`, local or in an object store; `~` is the home directory."""
    path = as_path(text)
    with refusing(f"{name}={text}", RuntimeError, fix="set HOME or give a path without ~"):
        return path.expanduser() if is_local(path) else path


def as_local_path(text: str | os.PathLike) -> Path:
    """The local path that a text names."""
    if scheme(text):
        raise UserError(f"{os.fspath(text)} is in an object store; only local folders work here")
    return Path(text)


def is_local(path: os.PathLike) -> bool:
    """Whether a path that `as_path` made is local."""
    return isinstance(path, Path)


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a link: it may lead to a file of another folder."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "it is a link, which is not followed; remove it"
            raise OSError(errno.ELOOP, reason, path) from None
        raise


def check_reachable(folder: Path, named: str) -> None:
    """If a folder is in an object store, checks that the store can be read."""
    if is_local(folder):
        return
    with refusing(f"{named}={folder} cannot be used", OSError):
        client(folder).ask(folder)


def delete_folder(folder: Path) -> None:
    """Deletes a folder with all that is in it."""
    epath.Path(folder).rmtree()


def upload(folder: Path, target: Path, last: str = "") -> None:
    """Copies the files of a local folder to a folder in a store, that named `last` at the end."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(found, key=lambda file: (file == folder / last, file)):
        client(target).upload(file, target / file.relative_to(folder))
