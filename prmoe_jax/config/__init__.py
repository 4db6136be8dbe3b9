"""The experiment's settings: from an ml-collections ConfigDict to checked, frozen dataclasses.

Users' files import these names from here. The package imports them from their modules, so that a
model loads the declarations alone.
"""

import importlib

from prmoe_jax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ExecutionConfig,
    InitConfig,
    KdConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainConfig,
    default_config,
)


def __getattr__(name: str):
    if name not in ("load", "resolve", "save"):
        raise AttributeError(f"module 'prmoe_jax.config' has no attribute '{name}'")
    return getattr(importlib.import_module("prmoe_jax.config.loading"), name)
