"""prmoe_jax: parameter-efficient Mixture-of-Experts language models in JAX.

What most programs need is here, and imported when it is first used:

    train, evaluate, Generator, Sampling      runs
    default_config, resolve, architecture     settings
    Transformer                               the model
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Generator": "prmoe_jax.inference.generate",
    "Sampling": "prmoe_jax.inference.generate",
    "Transformer": "prmoe_jax.model.transformer",
    "architecture": "prmoe_jax.config",
    "default_config": "prmoe_jax.config.schema",
    "evaluate": "prmoe_jax.training.evaluate",
    "resolve": "prmoe_jax.config.loading",
    "train": "prmoe_jax.training.loop",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'prmoe_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
