"""A model's input: a batch of windows of tokens, and a teacher's predictions for it."""

from typing import NamedTuple

import jax


class TopKLogProbs(NamedTuple):
    """A teacher's top K next tokens, the most probable first, with their log-probabilities (ln)."""

    tokens_BxLxK: jax.Array
    log_p_BxLxK: jax.Array


class Batch(NamedTuple):
    """Windows, as NumPy or JAX arrays; a single window has the same fields without the B axis.

    tokens_BxL and targets_BxL are int32. mask_BxL is bool, False where there is no target, or one
    that carries no loss, as in a chat outside the answers.
    segments_BxL is int32, 0 for padding and 1, 2, … for the documents of a window (all 1 with
    `data.cross_document_attention`). The target of a document's last token is EOS, in the same
    segment. The next input is the next document's BOS; many tokenizers use one id for both.
    `teacher_top_k` is set if a teacher's predictions were recorded (`distill/teacher.py`).
    """

    tokens_BxL: jax.Array
    targets_BxL: jax.Array
    mask_BxL: jax.Array
    segments_BxL: jax.Array
    teacher_top_k: TopKLogProbs | None = None
