"""Makes a run's folder for an imported or a pruned model."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from prmoe_jax import files, stores
from prmoe_jax.config.loading import save
from prmoe_jax.config.schema import Config
from prmoe_jax.data import released
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.run import directory as workdirs
from prmoe_jax.run.checkpoint import Checkpoints


def write_run(
    option: str,
    workdir: Path,
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    text: dict[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
) -> None:
    """Writes a run at step 0 atomically into a folder that `check_free` accepts.

    `option` is the command's that names the folder, `text`, from `trained_text`, the fingerprint of
    what the model was trained on, and `kept` the files of `released.read`.
    """

    def build(folder: Path) -> None:
        with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
            data = {"fingerprint": (text or {}) | {"tokenizer": tokenizer.fingerprint}}
            checkpoints.save_model(0, model, data)
        tokenizer.save(folder / workdirs.TOKENIZER)
        released.write(kept or {}, folder)
        save(config, folder / workdirs.CONFIG)

    write_folder(option, workdir, build)


def check_free(option: str, folder: Path) -> None:
    """Raises UserError unless a new folder can be made here.

    It must be missing or empty, not the current folder, and not among a run's checkpoints.
    """
    workdirs.check_outside_checkpoints(f"--{option}", folder)
    if not stores.is_local(folder):
        files.check_free_in_store(folder, f"--{option}")
    elif folder.is_dir() and folder.samefile(Path.cwd()):
        raise UserError(f"--{option}={folder} is the current folder; give one that is not there")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--{option}={folder} exists; give another folder, or remove it")


def write_folder(
    option: str, folder: Path, build: Callable[[Path], None], last: str | None = None
) -> None:
    """Builds a folder atomically; libraries' errors become a UserError of one line.

    In an object store, `build` writes to a local folder, which is then uploaded; `last` names the
    file that comes last, as a sign of completeness. Without `last`, `build` writes to the store.
    """
    expected = OSError, RuntimeError, SafetensorError
    with refusing(f"--{option}={folder} cannot be written", expected):
        if stores.is_local(folder):
            with files.whole_folder(folder) as temporary:
                build(temporary)
        elif last:
            files.build_in_store(folder, f"--{option}", build, last)
        else:
            with files.building_in_store(folder, f"--{option}"):
                build(folder)
