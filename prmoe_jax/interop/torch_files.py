"""torch's files, read without running anything that they hold."""

import importlib.util
from pathlib import Path

from prmoe_jax.errors import UserError

# Modules of what a training script keeps beside its tensors: settings and states of random numbers.
# None of it is imported: an `Inert` takes its place.
HARMLESS = "_codecs", "argparse", "deepspeed", "megatron", "numpy"


class Inert:
    """Stands for an object of a file: holds its attributes, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def require_torch() -> None:
    """Raises UserError unless torch is installed."""
    if not importlib.util.find_spec("torch"):
        raise UserError("DeepSpeed's checkpoints are torch files: pip install torch")


def read_torch(path: Path) -> dict:
    """What torch.save wrote; tensors on the CPU, objects of other classes as `Inert`.

    Raises:
      UserError: no such file, not one of torch's, no dict, or it wants to call something that is
        not of a checkpoint.
    """
    require_torch()
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
        for name in foreign:
            if name.partition(".")[0] not in HARMLESS:
                raise UserError(
                    f"{path} calls {name}, which no checkpoint needs; nothing of it was run"
                )
        with safe_globals([(Inert, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} can't be read as torch's: {line}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dict")
    return content
