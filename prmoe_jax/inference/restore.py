"""Restores a run for generation or scoring."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from prmoe_jax.config.schema import ExecutionConfig, MeshConfig, ModelConfig
from prmoe_jax.config.validation import check_runs_without_limit
from prmoe_jax.model.transformer import Transformer
from prmoe_jax.run.restore import restore_run


def restore_for_inference(
    workdir: Path, devices: Sequence[jax.Device] | None, layout: MeshConfig | None = None
) -> tuple[Transformer, Mesh, ExecutionConfig]:
    """Returns a run's newest model, its mesh and execution; arguments as in `restore_run`."""
    config, _, model, mesh = restore_run(workdir, devices, layout)
    check_runs_without_limit(config)
    model.config = for_inference(model.config)
    return model, mesh, config.execution


def for_inference(config: ModelConfig) -> ModelConfig:
    """The config, in float32 on CPUs, where bfloat16 is many times slower."""
    return (
        dataclasses.replace(config, dtype="float32") if jax.default_backend() == "cpu" else config
    )
