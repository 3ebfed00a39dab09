"""Texts to search vectors: the hidden state at each row's last token (the embed token), L2-normalised.

Axes: B batch, L length, D width, N texts.
"""

from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from r3jax.model.qwen2 import ModelConfig, last_states, shared_states
from r3jax.model.sharding import batch_parts, own_rows, put_batch, to_host

MANY = 8  # rows of a batch, for each of its parts, from which on what they begin with is computed once
FITTING = 2048  # tokens of a batch on CPU, for each of its parts: larger ones gain nothing and hold more padding


def normalise(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Unit length in fp32; a zero vector stays zero, and its gradient finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def embed(params, config: ModelConfig, tokens: Int[Array, "B L"], lengths: Int[Array, " B"], before=None):
    """Unit vectors [B, D] in fp32 of right-padded rows that end at the embed token; `before` as of `last_states`."""
    return normalise(last_states(params, config, tokens, lengths, before))


embed_jit = jax.jit(embed, static_argnames=("config",))
shared_jit = jax.jit(shared_states, static_argnames=("config",))


def pad(rows: Sequence[Sequence[int]], length: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as a right-padded array [count, length] and their lengths; missing rows have length 1."""
    count = count or len(rows)
    tokens = np.zeros((count, length), np.int32)
    lengths = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


def bucket_of(length: int, step: int = 8) -> int:
    """The padded length: the next multiple of `step`; past 64, of an eighth of the next power of two."""
    if length > 64:
        step = max(step, 1 << (length.bit_length() - 3))
    return -(-length // step) * step


def rows_at_once(batch_size: int, parts: int, width: int, platform: str) -> int:
    """How many rows of a width, at most `batch_size`: on CPU `FITTING` tokens for each part, or `MANY` rows."""
    return min(batch_size, parts * max(MANY, FITTING // width)) if platform == "cpu" else batch_size


def _head(rows: Sequence[Sequence[int]], heads: Sequence[Sequence[int]]) -> list[int]:
    """The one that all rows begin with and have something behind, [] where there is none."""
    for head in map(list, heads):
        if rows and all(len(row) > len(head) and list(row[: len(head)]) == head for row in rows):
            return head
    return []


def encode_rows(
    params,
    config: ModelConfig,
    mesh: Mesh,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    heads: Sequence[Sequence[int]] = (),
    keep: slice = slice(None),
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Unit vectors [N, D] of tokenised rows, in their order; with `keep`, those of a run of rows alone.

    Where all rows begin with one of the `heads`, that is computed once, unless batches are so small that another pass
    through the weights costs more than it saves (or the kernel is not xla).

    Rows are grouped by length, the longest first, into a few padded shapes, so each shape compiles once; a batch
    has at most `batch_size` of them. One batch is prepared while the device works on the last. Rows must not be
    empty. `on_rows` is called with each batch's number of rows.
    All processes are given the same rows, and encode them together, whatever each of them keeps.
    """
    parts = batch_parts(mesh)
    batch_size = -(-batch_size // parts) * parts
    order = np.argsort([-len(r) for r in rows], kind="stable")
    if len(order) and not len(rows[order[-1]]):
        raise ValueError(f"rows: row {order[-1]} is empty, so it has no last token")
    head = _head(rows, heads) if batch_size >= MANY * parts and config.attention == "xla" else []
    before = None
    if head:
        ids = put_batch(mesh, own_rows(mesh, np.tile(np.array(head, np.int32), (parts, 1))))
        with jax.set_mesh(mesh):
            before = shared_jit(params, config=config, head=ids)
        rows = [row[len(head) :] for row in rows]
    first, last, _ = keep.indices(len(rows))
    result = np.empty((last - first, config.width), np.float32)
    waiting: deque = deque()

    def fetch():
        chosen, vectors = waiting.popleft()
        kept = (chosen >= first) & (chosen < last)
        result[chosen[kept] - first] = to_host(vectors)[: len(chosen)][kept]
        on_rows(len(chosen))

    done = 0
    while done < len(order):
        width = bucket_of(len(rows[order[done]]))
        size = rows_at_once(batch_size, parts, width, mesh.devices.flat[0].platform)
        chosen = order[done : done + size]
        done += size
        padded = pad([rows[i] for i in chosen], width, size)
        tokens, lengths = put_batch(mesh, own_rows(mesh, padded))
        with jax.set_mesh(mesh):
            vectors = embed_jit(params, tokens=tokens, lengths=lengths, config=config, before=before)
        waiting.append((chosen, vectors))
        if len(waiting) > 1:
            fetch()
    while waiting:
        fetch()
    return result
