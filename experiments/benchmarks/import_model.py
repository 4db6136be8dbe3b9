"""Seconds and memory of `prmoe import --kind=hf` for a model of 1 GB in shards.

    python experiments/benchmarks/import_model.py

Makes random models of OLMoE's class in float32, with small layers and with layers of twice the
size, and imports each on one device and on eight devices of the CPU. Prints the bytes of the model,
of a layer and of what the devices hold, and the memory of the process that imports it: before (it
has imported a tiny model of as many layers and experts, so that what any import needs is there),
at most until the model is read, and at most in all.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from prmoe_jax.config.schema import DataConfig
from prmoe_jax.data.tokenizer import load_given

WIDTH, HIDDEN, VOCABULARY = 512, 416, 512
TINY = 16  # both widths of the tiny model
SHAPES = (24, 16), (12, 32)  # layers, and experts in each
CONFIG = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "vocab_size": VOCABULARY,
}
# Imports a tiny model and another. Prints the seconds of the second, what the devices hold of it,
# copies included, and the memory of its own that the process has before it, at most until it is
# read, and at most in all. Pages of the mapped files are not counted: the system takes them back
# where it needs them.
IMPORT = """
import gc, re, sys, threading, time
from pathlib import Path
from unittest import mock

import jax
from prmoe_jax.interop import run

def memory():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])

def watch():
    global highest
    while True:
        highest = max(highest, memory())
        time.sleep(0.005)

def write(*arguments):
    global held, read
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards)
    read = max(highest, memory())
    return write_run(*arguments)

tiny, source, target = map(Path, sys.argv[1:])
run.import_run("hf", tiny, target.with_name(f"tiny-{target.name}"))
gc.collect()
highest = before = memory()
threading.Thread(target=watch, daemon=True).start()
write_run = run.write_run
begun = time.perf_counter()
with mock.patch.object(run, "write_run", write):
    run.import_run("hf", source, target)
print(time.perf_counter() - begun, held, before, read, highest)
"""


def tensors(layer: int, experts: int, width: int, hidden: int) -> dict[str, np.ndarray]:
    """A layer's, by OLMoE's names."""
    rng = np.random.default_rng(layer)
    path = f"model.layers.{layer}."
    shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    norms = "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"
    shapes |= {f"{name}.weight": (width,) for name in norms}
    shapes["mlp.gate.weight"] = experts, width
    for expert in range(experts):
        for name, shape in (
            ("gate", (hidden, width)),
            ("up", (hidden, width)),
            ("down", (width, hidden)),
        ):
            shapes[f"mlp.experts.{expert}.{name}_proj.weight"] = shape
    return {path + name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(folder: Path, layers: int, experts: int, width: int, hidden: int) -> tuple[int, int]:
    """Writes a model, a file for each layer; returns the bytes of all and of a layer."""
    folder.mkdir()
    outside = {
        "model.embed_tokens.weight": np.ones((VOCABULARY, width), np.float32),
        "lm_head.weight": np.ones((VOCABULARY, width), np.float32),
        "model.norm.weight": np.ones(width, np.float32),
    }
    files, total, layer = {}, 0, 0
    parts = (tensors(layer, experts, width, hidden) for layer in range(layers))
    for number, part in enumerate(itertools.chain([outside], parts)):
        name = f"model-{number:05}-of-{layers:05}.safetensors"
        save_file(part, folder / name)
        layer = sum(tensor.nbytes for tensor in part.values())
        total += layer
        files |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {"num_hidden_layers": layers, "num_experts": experts}
    sizes |= {"hidden_size": width, "intermediate_size": hidden}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes))
    bytes_only = load_given(DataConfig(tokenizer="bytes"))
    bytes_only.save(folder / "tokenizer.json")
    return total, layer


def imported(tiny: Path, source: Path, devices: int) -> list[float]:
    """Seconds, bytes on the devices, and of the process: before, until it is read, in all."""
    command = [sys.executable, "-c", IMPORT, str(tiny), str(source), f"{source}-on-{devices}"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(float, out.stdout.split()))


def main():
    for layers, experts in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            tiny, source = Path(folder, "tiny"), Path(folder, "olmoe")
            write(tiny, layers, experts, TINY, TINY)
            total, layer = write(source, layers, experts, WIDTH, HIDDEN)
            for devices in (1, 8):
                seconds, *memory = imported(tiny, source, devices)
                held, before, read, peak = map(int, memory)
                record = {
                    "devices": devices,
                    "layers": layers,
                    "experts": experts,
                    "model_bytes": total,
                    "layer_bytes": layer,
                    "held_bytes": held,
                    "before_bytes": before,
                    "read_bytes": read,
                    "peak_bytes": peak,
                    "seconds": round(seconds, 1),
                    "jax": jax.__version__,
                }
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
