"""What a run keeps of the released model that it comes from: files that say how to talk to it.

They are exact copies of the model's own files, in the folder `hugging_face` of the run's folder. A
chat template is text here; `template.py` runs it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prmoe_jax import files, stores
from prmoe_jax.data.tokenizer import Tokenizer
from prmoe_jax.errors import UserError, refusing

FOLDER = "hugging_face"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
FILES = CONFIG, GENERATION, TOKENIZER, SPECIAL, TEMPLATE
MORE = "additional_chat_templates"  # a folder of templates, named for their use
LARGEST = 2**24  # bytes of one file


def read(folder: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """The text of each of these files that a folder holds, by name.

    By default, these are `FILES` and the templates in `MORE`.
    """
    if names is None:
        names = *FILES, *sorted(f"{MORE}/{path.name}" for path in (folder / MORE).glob("*.jinja"))
    kept = {}
    for name in names:
        path = folder / name
        with contextlib.ExitStack() as stack:
            stack.enter_context(refusing(f"{path} cannot be read", (OSError, ValueError)))
            if not path.exists():
                continue
            content = stack.enter_context(files.regular(path).open("rb")).read(LARGEST + 1)
            kept[name] = content.decode()
        if len(content) > LARGEST:
            raise UserError(f"{path} has more than {LARGEST:,} bytes; shorten it, or remove it")
        if name.endswith(".json"):
            files.read_json(path, fix="copy it from its source again")
    return kept


def write(kept: Mapping[str, str], workdir: Path) -> None:
    """Writes the files into a run's folder."""
    for name, text in kept.items():
        path = workdir / FOLDER / name
        if stores.is_local(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text)


def settings(kept: Mapping[str, str], name: str) -> dict[str, Any]:
    """The settings in one of the JSON files; {} without it."""
    return files.parse_json(kept[name].encode()) if name in kept else {}


def ids(value: Any) -> list[int]:
    """The ids that a setting names, which is a number or a list of them; [] for anything else."""
    several = value if isinstance(value, list) else [value]
    return several if all(type(each) is int for each in several) else []


def end_ids(kept: Mapping[str, str], name: str) -> list[int]:
    """The ids at which the model stops, as one of the JSON files says; [] if it says nothing."""
    return ids(settings(kept, name).get("eos_token_id"))


def ends(kept: Mapping[str, str], tokenizer: Tokenizer) -> set[int]:
    """The special tokens at which the model stops, as its files say."""
    named = {*end_ids(kept, CONFIG), *end_ids(kept, GENERATION)}
    return named & tokenizer.special_ids
