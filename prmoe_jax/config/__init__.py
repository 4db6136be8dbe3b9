"""The experiment's settings: from an ml-collections ConfigDict to checked, frozen dataclasses."""

from prmoe_jax.config.loading import (
    RESUMABLE,
    check_branch,
    check_resume,
    expand,
    load,
    resolve,
    save,
)
from prmoe_jax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    KdConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainConfig,
    changed,
    default_config,
    group_rows,
    leaves,
)
from prmoe_jax.config.teacher import adapt_teacher, teacher_of
from prmoe_jax.config.validation import check_runs_without_limit, check_same_routing
