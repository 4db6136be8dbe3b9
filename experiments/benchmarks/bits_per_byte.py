"""A run's bits per byte beside xz -9e and gzip -9 of the same held-out text.

python experiments/benchmarks/bits_per_byte.py --workdir=runs/demo
"""

import argparse
import gzip
import json
import lzma
from pathlib import Path

from prmoe_jax.config.loading import load
from prmoe_jax.data.corpora import open_corpus
from prmoe_jax.run.directory import CONFIG
from prmoe_jax.training.evaluate import evaluate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    workdir = parser.parse_args().workdir
    corpus = open_corpus(load(workdir / CONFIG).data)
    text = "".join(corpus.validation).encode()
    sizes = {
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "gzip -9": len(gzip.compress(text, 9)),
    }
    record = {"bytes": len(text), "model": evaluate(workdir)["bits_per_byte"]}
    record |= {name: 8 * size / len(text) for name, size in sizes.items()}
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
