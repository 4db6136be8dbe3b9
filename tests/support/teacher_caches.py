"""Recorded teachers: a small corpus, and random predictions for it."""

import numpy as np

from prmoe_jax.config.schema import Config, DataConfig, KdConfig, ModelConfig, TeacherConfig
from prmoe_jax.data import pipeline
from prmoe_jax.distill import teacher as teachers
from prmoe_jax.model.batch import TopKLogProbs

TOP_K = 3


def data_of(folder, words=40):
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for i in range(5):
        (folder / "corpus" / f"{i}.txt").write_text(f"document {i}: {'na ' * words}")
    config = DataConfig(
        corpus=str(folder / "corpus"), tokenizer="bytes", cache_dir=str(folder / "cache")
    )
    return pipeline.load_data(config, 384, 13)


def config_of(folder):
    return Config(
        model=ModelConfig(vocab_size=384, length=13),
        teacher=TeacherConfig(cache=str(folder)),
        kd=KdConfig(kind="top_k", top_k=TOP_K),
    )


def predictions_of(data, batch_size=7):
    """Of every window in its order; the last batch has rows past the last window."""
    rng = np.random.default_rng(0)
    for _ in range(0, len(data.train), batch_size):
        shape = batch_size, 13, TOP_K
        yield TopKLogProbs(rng.integers(0, 384, shape), -rng.random(shape, np.float32))


def write(folder, data, predictions=None):
    predictions = predictions_of(data) if predictions is None else predictions
    described = {"workdir": "runs/a", "step": 5}
    return teachers.write_predictions(folder, data, config_of(folder), described, predictions)
