"""Exact search: a jitted matrix product and a running top k over chunks of documents; the oracle.

Documents are split over the devices of this process; each keeps the best of its own, and the bests are merged.
Axis legend: Q queries, N documents, D width, C documents per chunk, k results, S devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from r3jax.search import checks

CHUNK = 8192  # documents scored at once: bounds the scores held by a device to QUERIES * CHUNK floats
QUERIES = 128  # queries per call of the compiled function, so that any number of them shares one compilation
AXIS = "search"


@partial(jax.jit, static_argnames=("k", "mesh"))
def _top_k(queries, chunks, living, *, k: int, mesh: jax.sharding.Mesh):
    """Rows and scores of the k best of the `living` [n, C] documents in `chunks` [n, C, D] for `queries`.

    Rows count through the chunks, which `mesh` holds in consecutive runs.
    """
    width = chunks.shape[1]

    def local(queries, chunks, living):
        first = jax.lax.axis_index(AXIS).astype(jnp.int32) * (chunks.shape[0] * width)

        def step(best, part):
            chunk, alive, offset = part
            scores = jnp.einsum("qd,cd->qc", queries, chunk, precision=jax.lax.Precision.HIGHEST)
            scores = jnp.where(alive[None, :], scores, -jnp.inf)
            rows = offset + jnp.arange(width, dtype=jnp.int32)
            # The best so far come first: top_k keeps the earlier of equals, so ties go to the lower row.
            all_scores = jnp.concatenate([best[0], scores], axis=1)
            all_rows = jnp.concatenate([best[1], jnp.broadcast_to(rows, scores.shape)], axis=1)
            top, place = jax.lax.top_k(all_scores, k)
            return (top, jnp.take_along_axis(all_rows, place, axis=1)), None

        start = (jnp.full((queries.shape[0], k), -jnp.inf), jnp.zeros((queries.shape[0], k), jnp.int32))
        start = jax.lax.pcast(start, AXIS, to="varying")
        offsets = first + jnp.arange(chunks.shape[0], dtype=jnp.int32) * width
        return jax.lax.scan(step, start, (chunks, living, offsets))[0]

    split = P(AXIS)
    scores, rows = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), split, split), out_specs=(P(None, AXIS), P(None, AXIS))
    )(queries, chunks, living)
    # [Q, S k], lower rows first again: each device's documents come after those of the one before.
    scores, rows = (jax.reshard(x, jax.NamedSharding(mesh, P())) for x in (scores, rows))
    scores, place = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(rows, place, axis=1), scores


class ExactBackend:
    """Holds a device copy of the index's vectors [N, D], refreshed at the first search after a change.

    A row of zeros is a deleted document and never returned: the caller asks for no more than there are others.
    """

    def __init__(self, vectors: np.ndarray):
        self._vectors = vectors
        self._held: tuple[jax.Array, jax.Array] | None = None
        # Of this process alone: a caller's mesh over several processes would have all of them search alike.
        self._mesh = jax.make_mesh((jax.local_device_count(),), (AXIS,), devices=jax.local_devices())

    def changed(self) -> None:
        """The index has written to the array given at construction."""
        self._held = None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows [Q, k] int32 and scores [Q, k] float32, descending, ties to the lower row."""
        with jax.set_mesh(self._mesh):
            parts = [
                self._search_block(queries[start : start + QUERIES], k) for start in range(0, len(queries), QUERIES)
            ]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for at most QUERIES queries."""
        if self._held is None:
            self._held = self._split()
        block = np.zeros((QUERIES, self._vectors.shape[1]), np.float32)
        block[: len(queries)] = queries
        rows, scores = jax.device_get(_top_k(self._put(block, P()), *self._held, k=k, mesh=self._mesh))
        return rows[: len(queries)], scores[: len(queries)]

    def _split(self) -> tuple[jax.Array, jax.Array]:
        """The documents as chunks [n, C, D] over the devices, padded with zeros, and which of them live [n, C]."""
        size, width = self._vectors.shape
        devices = self._mesh.size
        chunk = min(CHUNK, -(-size // devices))
        count = devices * -(-size // (chunk * devices))
        padded = np.zeros((count * chunk, width), np.float32)
        padded[:size] = self._vectors  # a copy: device arrays on CPU may alias the host's memory
        chunks = padded.reshape(count, chunk, width)
        return self._put(chunks, P(AXIS)), self._put(checks.holds_document(chunks), P(AXIS))

    def _put(self, array: np.ndarray, spec: P) -> jax.Array:
        return jax.device_put(array, jax.NamedSharding(self._mesh, spec))
