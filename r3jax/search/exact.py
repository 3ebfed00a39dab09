"""Exact search: a jitted matrix product and a running top k over chunks of documents; the oracle.

Axis legend: Q queries, N documents, D width, C documents per chunk, k results.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 8192  # documents scored at once: bounds the scores held to QUERIES * CHUNK floats
QUERIES = 128  # queries per call of the compiled function, so that any number of them shares one compilation


@partial(jax.jit, static_argnames=("k", "size"))
def _top_k(queries, chunks, *, k: int, size: int):
    """Rows and scores of the k best of the first `size` documents in `chunks` [n, C, D] for `queries`."""
    width = chunks.shape[1]

    def step(best, chunk_and_offset):
        chunk, offset = chunk_and_offset
        scores = jnp.einsum("qd,cd->qc", queries, chunk, precision=jax.lax.Precision.HIGHEST)
        rows = offset + jnp.arange(width, dtype=jnp.int32)
        scores = jnp.where(rows[None, :] < size, scores, -jnp.inf)
        # The best so far come first: top_k keeps the earlier of equals, so ties go to the lower row.
        all_scores = jnp.concatenate([best[0], scores], axis=1)
        all_rows = jnp.concatenate([best[1], jnp.broadcast_to(rows, scores.shape)], axis=1)
        top, place = jax.lax.top_k(all_scores, k)
        return (top, jnp.take_along_axis(all_rows, place, axis=1)), None

    start = (jnp.full((queries.shape[0], k), -jnp.inf), jnp.zeros((queries.shape[0], k), jnp.int32))
    offsets = jnp.arange(chunks.shape[0], dtype=jnp.int32) * width
    (scores, rows), _ = jax.lax.scan(step, start, (chunks, offsets))
    return rows, scores


class ExactBackend:
    """Holds a device copy of the index's vectors [N, D], refreshed at the first search after a change."""

    def __init__(self, vectors: np.ndarray):
        self._vectors = vectors
        self._chunks: jax.Array | None = None
        # One device of this process: a caller's mesh would repeat the search on each of its devices.
        self._mesh = jax.make_mesh((1,), ("search",), devices=jax.local_devices()[:1])

    def upsert(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """The index has written `vectors` to `rows` of the array given at construction."""
        self._chunks = None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows [Q, k] int32 and scores [Q, k] float32, descending, ties to the lower row."""
        with jax.set_mesh(self._mesh):
            parts = [
                self._search_block(queries[start : start + QUERIES], k) for start in range(0, len(queries), QUERIES)
            ]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for at most QUERIES queries."""
        size, width = self._vectors.shape
        if self._chunks is None:
            chunk = min(CHUNK, size)
            padded = np.zeros((-(-size // chunk) * chunk, width), np.float32)
            padded[:size] = self._vectors  # a copy: device arrays on CPU may alias the host's memory
            self._chunks = self._put(padded.reshape(-1, chunk, width))
        block = np.zeros((QUERIES, width), np.float32)
        block[: len(queries)] = queries
        rows, scores = jax.device_get(_top_k(self._put(block), self._chunks, k=k, size=size))
        return rows[: len(queries)], scores[: len(queries)]

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, jax.NamedSharding(self._mesh, jax.P()))
