"""Batches of random tokens."""

import numpy as np

from prmoe_jax.model.batch import Batch


def make_batch(seed=0, rows=8, length=8, vocabulary=384):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 3, (rows, length)), axis=1).astype(np.int32)
    mask = np.ones((rows, length), bool)
    # Microbatches of unequal weight: one row is half padding, one all padding.
    segments[2, length // 2 :], mask[2, length // 2 :] = 0, False
    segments[5], mask[5] = 0, False
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, segments)
