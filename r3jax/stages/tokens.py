"""Fixed-shape token rows, and the log-probabilities of their last part.

Axes: B rows, L length, W window (the longest answer), D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from r3jax.losses import CHUNK, TokenTerms, token_terms
from r3jax.model.qwen2 import ModelConfig, head
from r3jax.model.sharding import BATCH, out, place, platform

ON_CPU = 256  # for `losses.CHUNK`: among few, few do not count; elsewhere each chunk costs a reduction over devices


def fill(ids: list[int], length: int, value: int = 0) -> np.ndarray:
    """ids right-padded with `value` to `length`."""
    row = np.full(length, value, np.int32)
    row[: len(ids)] = ids
    return row


def answer_window(
    tokens: jax.Array, starts: jax.Array, lengths: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the answers are predicted: (positions [B, W], targets [B, W], mask [B, W]).

    Position p predicts token p + 1; an answer is tokens[starts : lengths], its terminal token included.
    """
    positions = starts[:, None] - 1 + jnp.arange(width)[None, :]
    mask = positions < lengths[:, None] - 1
    positions = place(jnp.where(mask, positions, 0), P(BATCH, None))
    targets = jnp.take_along_axis(tokens, positions + 1, axis=1)
    return positions, targets, mask


def answer_terms(
    params, config: ModelConfig, hidden, targets, mask, *, ref=None, temperature: float = 1.0
) -> TokenTerms:
    """Log-probability, entropy and KL to the reference of answer tokens, each [B, W].

    hidden [B, W, D] are the states that predict `targets`, and mask [B, W] says which targets there are: logits are
    computed where they count; elsewhere the terms mean nothing. `ref` is (reference params, reference hidden
    [B, W, D]). Log-probabilities are of softmax(logits / temperature).
    """
    batch, width = targets.shape

    def flat(h):
        return jnp.reshape(h, (batch * width, -1), out_sharding=out(P(BATCH, None)))

    def flat_rows(x):
        return jnp.reshape(x, (batch * width,), out_sharding=out(P(BATCH)))

    def unembed(p):
        logits = head(p, config)
        return lambda h: logits(h) / temperature

    ref_params, ref_hidden = ref if ref is not None else (None, None)
    terms = token_terms(
        flat(hidden),
        unembed(params),
        flat_rows(targets),
        ref_hidden=None if ref is None else flat(ref_hidden),
        ref_unembed=None if ref is None else unembed(ref_params),
        used=flat_rows(mask),
        chunk=ON_CPU if platform() == "cpu" else CHUNK,
    )
    return jax.tree.map(lambda x: jnp.reshape(x, (batch, width), out_sharding=out(P(BATCH, None))), terms)
