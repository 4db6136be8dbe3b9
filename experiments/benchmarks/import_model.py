"""Seconds and memory of `prmoe import --kind=hf` for a model of 1 GB in shards.

    python experiments/benchmarks/import_model.py

Makes random models of OLMoE's class in float32, with small layers and with layers of twice the
size, and imports each on one device and on eight devices of the CPU. Prints the bytes of the model
and of a layer, and the most memory of the process that imports it: before it reads, until the
model is read, and in all.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from prmoe_jax.config import DataConfig
from prmoe_jax.data.corpora import Corpus
from prmoe_jax.data.tokenizer import load_tokenizer

WIDTH, HIDDEN, VOCABULARY = 512, 416, 512
SHAPES = (24, 16), (12, 32)  # layers, and experts in each
CONFIG = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "vocab_size": VOCABULARY,
}
# Imports, and prints the most memory of its own that the process has had: before, once the model
# is read, and in all. Pages of the mapped files are not counted: the system takes them back where
# it needs them.
IMPORT = """
import re, sys, threading, time

import jax.numpy
from pathlib import Path
from unittest import mock
from prmoe_jax.interop import run

highest = [0, 0, 0]

def watch():
    while True:
        status = Path("/proc/self/status").read_text()
        highest[-1] = max(highest[-1], 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.005)

def write(*arguments):
    highest[1] = highest[-1]
    return write_run(*arguments)

threading.Thread(target=watch, daemon=True).start()
jax.numpy.zeros(1).block_until_ready()
time.sleep(0.1)
highest[0] = highest[-1]
write_run = run.write_run
with mock.patch.object(run, "write_run", write):
    run.import_run("hf", Path(sys.argv[1]), Path(sys.argv[2]))
print(*highest)
"""


def tensors(layer: int, experts: int) -> dict[str, np.ndarray]:
    """A layer's, by OLMoE's names."""
    rng = np.random.default_rng(layer)
    path = f"model.layers.{layer}."
    shapes = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    norms = "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"
    shapes |= {f"{name}.weight": (WIDTH,) for name in norms}
    shapes["mlp.gate.weight"] = experts, WIDTH
    for expert in range(experts):
        for name, shape in (
            ("gate", (HIDDEN, WIDTH)),
            ("up", (HIDDEN, WIDTH)),
            ("down", (WIDTH, HIDDEN)),
        ):
            shapes[f"mlp.experts.{expert}.{name}_proj.weight"] = shape
    return {path + name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(folder: Path, layers: int, experts: int) -> tuple[int, int]:
    """Writes a model, a file for each layer; returns the bytes of all and of a layer."""
    folder.mkdir()
    outside = {
        "model.embed_tokens.weight": np.ones((VOCABULARY, WIDTH), np.float32),
        "lm_head.weight": np.ones((VOCABULARY, WIDTH), np.float32),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    files, total, layer = {}, 0, 0
    parts = (tensors(layer, experts) for layer in range(layers))
    for number, part in enumerate(itertools.chain([outside], parts)):
        name = f"model-{number:05}-of-{layers:05}.safetensors"
        save_file(part, folder / name)
        layer = sum(tensor.nbytes for tensor in part.values())
        total += layer
        files |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"num_hidden_layers": layers, "num_experts": experts})
    )
    bytes_only = load_tokenizer(DataConfig(tokenizer="bytes"), 257, Corpus("none", dict))
    bytes_only.save(folder / "tokenizer.json")
    return total, layer


def imported(source: Path, devices: int) -> tuple[float, int, int, int]:
    """Seconds of an import in its own process; its memory before, once it has read, at most."""
    command = [sys.executable, "-c", IMPORT, str(source), f"{source}-on-{devices}"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    out = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - begun, *map(int, out.stdout.split())


def main():
    for layers, experts in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            total, layer = write(Path(folder, "olmoe"), layers, experts)
            for devices in (1, 8):
                seconds, before, read, peak = imported(Path(folder, "olmoe"), devices)
                record = {
                    "devices": devices,
                    "layers": layers,
                    "experts": experts,
                    "model_bytes": total,
                    "layer_bytes": layer,
                    "before_bytes": before,
                    "read_bytes": read,
                    "peak_bytes": peak,
                    "seconds": round(seconds, 1),
                    "jax": jax.__version__,
                }
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
