"""Writes gpt2/: a random GPT-2 by Hugging Face's transformers, and its logits.

pip install -e '.[interop]'
python tests/goldens/generate_gpt2.py [--out=tests/goldens/gpt2]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gpt2")
    out = parser.parse_args().out
    rng = np.random.default_rng(0)  # not transformers' own start, which versions may change
    shape = {"vocab_size": 300, "n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too
            values = 0.15 * rng.normal(size=parameter.shape) + (parameter.ndim == 1)
            parameter.copy_(torch.tensor(values))
    model.save_pretrained(out)
    (out / "generation_config.json").unlink()
    ids = torch.tensor(rng.integers(0, 300, (2, 17)))
    with torch.inference_mode():
        np.savez(out / "logits.npz", ids=ids.numpy(), logits=model(ids).logits.numpy())


if __name__ == "__main__":
    main()
