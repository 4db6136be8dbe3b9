"""Arguments that subcommands share: --config and its overrides, paths, meshes."""

import argparse
import difflib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from prmoe_jax import stores
from prmoe_jax.config import userfile
from prmoe_jax.errors import UserError
from prmoe_jax.stores import expand

log = logging.getLogger(__name__)

CONFIG_HELP = """
settings:
  --config=FILE:NAME            a config file and the architecture in it, for example
                                configs/tiny.py:prmoe, configs/paper.py:prmoe_1.3b or
                                configs/tiny.py:'6 layers, E=8x2+16, residual'; tiny, paper,
                                prose and open_moes name the files that come with
                                prmoe_jax (tiny:prmoe); or a run's own config.json
  --config.GROUP.NAME=VALUE     overrides any setting:
                                --config.train.steps=40 --config.model.experts=8,8,16
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a `UserError`, which is shown on one line."""

    takes_config = False  # whether the help lists the settings

    def format_help(self) -> str:
        return super().format_help() + (_settings_help() if self.takes_config else "")

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _settings_help() -> str:
    """Every setting with its default, meaning and choices."""
    from prmoe_jax.config.schema import declarations

    lines = ["", "all settings, with their defaults:"]
    for name, setting in declarations().items():
        shown = setting.default
        if shown and isinstance(shown, tuple):
            shown = ",".join(map(str, shown))
        lines.append(f"  --config.{name}={shown}")
        lines += textwrap.wrap(
            setting.described(), 96, initial_indent="  " * 4, subsequent_indent="  " * 4
        )
    return "\n".join(lines) + "\n"


def parse_config(arguments: list[str]):
    """The `Config` that --config and its overrides describe."""
    from prmoe_jax.config.loading import resolve

    path, name, overrides = config_argument(arguments)
    settings = _load_settings(path, name)
    _override(settings, overrides)
    return resolve(settings)


def config_argument(arguments: list[str]) -> tuple[Path, str, list[str]]:
    """The FILE and NAME of --config=FILE:NAME, and the other arguments."""
    parser = Parser(prog="prmoe", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    options, rest = parser.parse_known_args(arguments)
    if stores.scheme(options.config):
        return stores.as_path(options.config), "", rest
    file, _, name = options.config.partition(":")
    if not file:
        raise UserError("no --config; for example --config=configs/tiny.py:prmoe")
    if os.path.isfile(whole := expand("--config", options.config)):  # its name has a colon
        return whole, "", rest
    return expand("--config", file), name, rest


def _load_settings(path: Path, name: str):
    """Reads a run's config.json, or calls get_config(NAME) or get_config() of a config file."""
    from ml_collections import ConfigDict

    from prmoe_jax.config.loading import resolve
    from prmoe_jax.config.schema import default_config

    if re.fullmatch(r"\w+", str(path)) and not path.is_file():  # a folder may have this name
        path = userfile.shipped(str(path))
    if not stores.is_local(path) and path.suffix != ".json":
        raise UserError(f"--config={path} is in an object store: there only a run's config.json")
    if not path.is_file():
        raise UserError(f"--config={path} is not a file; for example configs/tiny.py:prmoe")
    if path.suffix == ".json":  # a run's config
        if name:
            raise UserError(
                f"--config={path}:{name}: a run's config.json has no names; give it alone"
            )
        from prmoe_jax.config.loading import load
        from prmoe_jax.config.schema import as_settings

        settings = as_settings(load(path))
        if settings.execution.compile_cache not in ("", "auto"):
            log.warning(
                "%s: execution.compile_cache=%s is left out, since JAX runs the programs in that "
                "folder; to use it, give --config.execution.compile_cache",
                *(path, settings.execution.compile_cache),
            )
            settings.execution.compile_cache = "auto"
        return settings
    arguments = [name] if name else []
    settings = userfile.call(path, "get_config", *arguments, named=f"--config={path}")
    if not isinstance(settings, ConfigDict):
        raise UserError(
            f"--config={path}: get_config returns {type(settings).__name__}, not a ConfigDict; "
            "start from prmoe_jax.config.default_config()"
        )
    whole = default_config()  # a file need not name all settings, and any can be overridden
    with userfile.mistakes(path, f"--config={path}"), whole.unlocked():
        try:
            whole.update(settings)
        except (TypeError, AttributeError):
            resolve(settings)  # names the setting that has a wrong type
            raise
    return whole


def _override(settings, arguments: list[str]) -> None:
    """Applies arguments such as --config.train.steps=40 to `settings`."""
    from absl import flags
    from ml_collections import config_flags

    from prmoe_jax.config.schema import Config, declarations, leaves

    known = leaves(Config())
    for name, setting in declarations().items():
        if setting.formerly:
            whole = re.compile(re.escape(f"--config.{setting.formerly}") + "(?==|$)")
            arguments = [whole.sub(f"--config.{name}", argument) for argument in arguments]
    for argument in arguments:
        if not argument.startswith("--"):
            continue  # the value of the flag before it; any other is `leftover` below
        match = re.fullmatch(r"--(?:no)?config\.(.*)", argument.partition("=")[0])
        if not match:
            raise UserError(f"'{argument}' is not understood; settings look like --config.seed=1")
        if match[1] not in known:
            raise UserError(f"--config.{match[1]} is not a setting{_did_you_mean(match[1], known)}")

    argv = ["prmoe", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
    try:
        leftover = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        # 'flag --config.seed=x: invalid literal for int() with base 10'
        given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        kind = type(known[given.partition("=")[0].removeprefix("--config.")])
        wanted = "whole numbers such as 8,8,16" if kind is tuple else f"of type {kind.__name__}"
        raise UserError(f"{given} must be {wanted}") from error
    except (flags.Error, ValueError) as error:  # --noconfig.x=1 is a ValueError
        raise UserError(str(error)) from error
    if leftover:
        raise UserError(f"'{leftover[0]}' is not understood; settings look like --config.seed=1")


def _did_you_mean(name: str, known) -> str:
    """A hint: a setting of the group `name`, the setting spelled most like it, or all groups."""
    members = [setting for setting in known if setting.startswith(f"{name}.")]
    if members:
        return f" but a group of them, such as --config.{members[0]}"
    by_last_part = {setting.rpartition(".")[2]: setting for setting in known}
    close = difflib.get_close_matches(name, known, 1)
    for last_part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, 1):
        close.append(by_last_part[last_part])
    groups = ", ".join(dict.fromkeys(setting.partition(".")[0] for setting in known))
    return f"; did you mean --config.{close[0]}?" if close else f"; there are {groups}"


def path(text: str) -> Path:
    """Converts an option's value to a path, local or in an object store; refuses an empty one."""
    return _path(text, stores.as_path)


def local_path(text: str) -> Path:
    """Converts an option's value to a local path; refuses an empty one."""
    return _path(text, stores.as_local_path)


def filled(text: str) -> str:
    """An option's value as it is; refuses an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; if it was a shell variable, it isn't set")
    return text


def _path(text: str, convert: Callable[[str], Path]) -> Path:
    try:
        convert(filled(text))
        return expand("the path", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Declares --distributed, which `prmoe_jax.cli` handles before it parses the arguments."""
    kind = "be one process of several: on a TPU pod, under SLURM or on GKE"
    parser.add_argument("--distributed", action="store_true", help=kind)


def parse_mesh(text: str):
    """Parses 'expert:4,tensor:2' into a `MeshConfig`."""
    import dataclasses

    from prmoe_jax.config.schema import MeshConfig

    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in names or name in sizes or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise UserError(
                f"--mesh={text} must be axes and their devices such as expert:4,tensor:2; there "
                f"are {', '.join(names)}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def check_run(workdir: Path) -> None:
    """Raises UserError if a folder holds no run; imports no JAX."""
    from prmoe_jax.config.loading import load
    from prmoe_jax.run.directory import CONFIG

    load(workdir / CONFIG)


def compile_only() -> None:
    """Prepares JAX to compile for devices that aren't there; call it before JAX is used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Without these two, libtpu complains of a TPU that isn't there. They change no topology.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    if jax := sys.modules.get("jax"):  # imported by a config file; it has read JAX_PLATFORMS
        jax.config.update("jax_platforms", "cpu")
