"""The refreshable index: one vector per document, and the training step at which it was encoded.

Documents are rows 0..N-1 and keep their row: a deleted one leaves a row of zeros, which no search returns. The
index knows neither the model nor the text: whoever re-encodes a document hands its new vector to `upsert`. Axis
legend: N documents, Q queries, D width, k results.
"""

import math

import numpy as np

from r3jax.search import checks
from r3jax.search.exact import ExactBackend
from r3jax.search.scann_backend import ScannBackend

KINDS = ("exact", "scann")

# A tree searches faster than brute force from some 10,000 documents on, yet takes upserts 18 times more
# slowly, misses a few per cent of the neighbours, and is not reproducible when rebuilt. Up to here exactness
# is cheap: brute force over 40,000 documents of width 384 answers 400 queries in 0.4 s of one CPU core,
# little beside an RL step.
TREE_ABOVE = 40_000
LEAST_TREE = 256  # sixteen centres per code and a few documents per partition have to be trained on something
MAX_STEP = np.iinfo(np.int32).max
BLOCK = 4096  # rows moved at once, so that they stay in the cache


class VersionedIndex:
    """Vectors float32 [N, D] of length 1, their versions int32 [N], and a search backend over them.

    Use `build` or `from_state`. Every argument is checked before the backend sees it: ValueError names the
    argument, and the index is then as it was.
    """

    def __init__(self, vectors, versions, kind: str, tree_above: int, leaves: int, assets=None):
        self._vectors = vectors
        self._versions = versions
        self._kind = kind
        self._tree_above = tree_above
        self._leaves = leaves
        self._living = _count(vectors)
        self._exact = ExactBackend(vectors)
        self._scann = ScannBackend(vectors, leaves, assets) if kind == "scann" else None

    @classmethod
    def build(
        cls,
        vectors,
        step: int,
        kind: str = "scann",
        *,
        tree_above: int = TREE_ABOVE,
        leaves: int | None = None,
    ) -> "VersionedIndex":
        """An index over `vectors` [N, D], all of version `step`.

        Args:
          kind: "exact" = jitted matrix product over chunks (the oracle); "scann" = ScaNN, brute force up to
            `tree_above` documents, above it partitions with anisotropic quantisation and exact re-ordering.
          leaves: the number of partitions of a tree; the square root of N where not given.
        """
        vectors = np.array(checks.unit_rows("vectors", checks.matrix("vectors", vectors)))  # the index's own copy
        size = len(vectors)
        if size == 0:
            raise ValueError("vectors must hold at least one document")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        step = checks.whole("step", step, 0, MAX_STEP)
        tree_above = checks.whole("tree_above", tree_above, LEAST_TREE, MAX_STEP)
        tree = kind == "scann" and size > tree_above
        leaves = checks.whole("leaves", math.isqrt(size) if leaves is None else leaves, 1, size)
        versions = np.full(size, step, np.int32)
        return cls(vectors, versions, kind, tree_above, leaves if tree else 0)

    @property
    def vectors(self) -> np.ndarray:
        """The stored vectors float32 [N, D], zeros where deleted; a read-only view."""
        return _read_only(self._vectors)

    @property
    def versions(self) -> np.ndarray:
        """The step at which each document was encoded, int32 [N]; a read-only view."""
        return _read_only(self._versions)

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self._kind

    @property
    def settings(self) -> np.ndarray:
        """As in `state`: the kind's number, `tree_above`, and the leaves of the tree, if there is one."""
        return np.array([KINDS.index(self._kind), self._tree_above, self._leaves], np.int64)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The stored vectors [n, D] of `rows` [n]."""
        return self._vectors[rows]

    def __len__(self) -> int:
        """N: rows, those of deleted documents included."""
        return len(self._vectors)

    @property
    def living(self) -> int:
        """How many documents are not deleted."""
        return self._living

    def search(self, queries, k: int, exactly: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query [Q, D]: rows int32 [Q, k] and scores float32 [Q, k], descending.

        k is at most `living`. Scores are dot products with the stored vectors; ties go to the lower row.
        Deterministic, and independent of how queries are batched. `exactly`: by brute force, whatever the kind.
        """
        queries = checks.bounded_rows("queries", checks.matrix("queries", queries, self._vectors.shape[1]))
        k = checks.whole("k", k, 1, self._living)
        if len(queries) == 0:
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        if self._scann is None or exactly:
            return self._exact.search(queries, k)
        rows, scores, full = self._scann.search(queries, k)
        if not full.all():  # the partitions looked at hold fewer than k documents
            rows[~full], scores[~full] = self._exact.search(queries[~full], k)
        return rows, scores

    def scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Dot products [Q, c] of each query [Q, D] with the stored vectors of its rows [Q, c]; -1 is the last row."""
        return np.einsum("qd,qcd->qc", queries, self._vectors[rows])

    def above(self, queries: np.ndarray, least: np.ndarray, without: np.ndarray, never=None) -> np.ndarray:
        """How many documents score more than `least` [Q] for each query [Q, D].

        Those in the query's `without` [Q, c] (-1: none) and those of the mask `never` [N] are not counted.
        """
        counts = np.zeros(len(queries), np.int64)
        for i, query in enumerate(queries):
            over = self._vectors @ query > least[i]
            over[without[i][without[i] >= 0]] = False
            counts[i] = (over if never is None else over & ~never).sum()
        return counts

    def like(self, vectors: np.ndarray) -> "VersionedIndex":
        """An exact index over other vectors [N, D] of the same documents."""
        return VersionedIndex.build(vectors, 0, "exact")

    def upsert(self, rows, vectors, step: int) -> None:
        """Replaces the vectors of known, unique `rows` [n] by `vectors` [n, D], encoded at `step`.

        A deleted document is back with its new vector.
        """
        rows = checks.row_ids("rows", rows, len(self))
        vectors = checks.unit_rows("vectors", checks.matrix("vectors", vectors, self._vectors.shape[1]))
        step = checks.whole("step", step, 0, MAX_STEP)
        if len(rows) != len(vectors):
            raise ValueError(f"vectors has {len(vectors)} rows for {len(rows)} rows to replace")
        self._write(rows, vectors)
        self._versions[rows] = step

    def carry(self, matrix, offset, step: int) -> None:
        """Moves every vector v of a version before `step` to v @ matrix [D, D] + offset [D], at unit length again.

        Versions stay: nothing was encoded. A tree is not told: it goes on proposing by where vectors were, and what it
        proposes is scored by where it is; `recall_probe` sees what it misses, `rebuild` mends it.
        """
        width = self._vectors.shape[1]
        matrix = checks.matrix("matrix", matrix, width)
        offset = checks.matrix("offset", np.asarray(offset)[None], width)[0]
        step = checks.whole("step", step, 0, MAX_STEP)
        if len(matrix) != width:
            raise ValueError(f"matrix must be [{width}, {width}], not of shape {matrix.shape}")
        for start in range(0, len(self), BLOCK):
            part = slice(start, start + BLOCK)
            vectors = self._vectors[part]
            moved = vectors @ matrix
            moved += offset
            lengths = np.sqrt(np.einsum("nd,nd->n", moved, moved))
            stale = (self._versions[part] < step) & checks.holds_document(vectors)
            stale &= np.isfinite(lengths) & (lengths > 1e-6)  # what would vanish or overflow stays where it is
            moved /= np.where(stale, lengths, 1)[:, None]
            np.copyto(vectors, moved, where=stale[:, None])
        self._exact.changed()
        if self._scann is not None:
            self._scann.moved()

    def delete(self, rows) -> None:
        """Takes the documents in unique `rows` [n] out of every later search; at least one must stay.

        All other rows keep their number, and deleted ones their version. ValueError for a row that is not there.
        """
        rows = checks.row_ids("rows", rows, len(self))
        gone = ~checks.holds_document(self._vectors[rows])
        if gone.any():
            raise ValueError(f"rows names row {int(rows[np.argmax(gone)])}, which is deleted already")
        if len(rows) == self._living:
            raise ValueError("rows must leave at least one document")
        self._write(rows, np.zeros((len(rows), self._vectors.shape[1]), np.float32))

    def _write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        if len(rows) == 0:
            return
        self._living += _count(vectors) - _count(self._vectors[rows])
        self._vectors[rows] = vectors
        self._exact.changed()
        if self._scann is not None:
            self._scann.upsert(rows, vectors)

    def rebuild(self) -> None:
        """Trains a tree's partitions and quantiser anew on the current vectors; else nothing to do.

        ScaNN's training is not reproducible: a run killed after a rebuild and before the next `state`
        repeats the rebuild and may get a slightly different tree. To keep resumption exact, take `state`
        right after it.
        """
        if self._scann is not None and self._leaves:
            self._scann.rebuild()

    def recall_probe(self, queries, k: int) -> float:
        """Mean recall@k in [0, 1] over queries [Q, D] of `search` against exact search over the same vectors.

        A returned document counts when it scores at least what the k-th exact one does, so that documents
        with equal vectors may stand for one another.
        """
        if not self._leaves:  # exact by design: it would be a search for nothing, at every step
            checks.whole("k", k, 1, self._living)
            if len(checks.matrix("queries", queries, self._vectors.shape[1])):
                return 1.0
        rows, scores = self.search(queries, k)
        if len(rows) == 0:
            raise ValueError("queries must hold at least one query")
        _, truth = self.search(queries, k, exactly=True)
        return float((scores >= truth[:, -1:] - 1e-6).mean())

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on, as numpy arrays without pickle: vectors, versions, settings, tree.

        `tree` (uint8) is one 0 for brute force and exact search (checkpoints cannot hold empty arrays); for a
        tree it is a 1 and the trained parts, because a tree that lived through upserts differs from one
        trained on the same vectors; a state of a large index without one has it trained anew. Taking the state
        makes the index itself go on from the saved copy, so that it and its restored twin answer alike, bit for bit.
        """
        assets = np.zeros(0, np.uint8) if self._scann is None else self._scann.assets()
        return {
            "vectors": self._vectors.copy(),
            "versions": self._versions.copy(),
            "settings": self.settings,
            "tree": np.concatenate([np.array([len(assets) > 0], np.uint8), assets]),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "VersionedIndex":
        """The index that `state` was taken from. ValueError where a part is missing or malformed."""
        missing = {"vectors", "versions", "settings", "tree"} - set(state if isinstance(state, dict) else ())
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        vectors = np.array(checks.matrix("state['vectors']", state["vectors"]))
        living = checks.holds_document(vectors)
        if not living.any():
            raise ValueError("state['vectors'] must hold at least one document")
        checks.unit_rows("state['vectors']", np.where(living[:, None], vectors, vectors[np.argmax(living)]))
        versions = checks.integers("state['versions']", state["versions"], len(vectors)).astype(np.int32)
        kind, tree_above, leaves = (int(x) for x in checks.integers("state['settings']", state["settings"], 3))
        tree = np.asarray(state["tree"])
        if tree.dtype != np.uint8 or tree.ndim != 1 or not len(tree):
            raise ValueError(f"state['tree'] must hold bytes, not {tree.dtype} of shape {tree.shape}")
        if kind >= len(KINDS) or tree_above < LEAST_TREE or leaves > (len(vectors) if KINDS[kind] == "scann" else 0):
            raise ValueError(f"state['settings'] are not an index's: {kind}, {tree_above}, {leaves}")
        if leaves:
            try:
                ScannBackend.check(tree[1:], vectors.shape)
            except ValueError as e:
                raise ValueError(f"state['tree'] cannot be restored: {e}") from None
        elif KINDS[kind] == "scann" and len(vectors) > tree_above:  # a state without its tree: it is trained anew
            return cls(vectors, versions, KINDS[kind], tree_above, math.isqrt(len(vectors)))
        return cls(vectors, versions, KINDS[kind], tree_above, leaves, tree[1:])


def _count(vectors: np.ndarray) -> int:
    return int(checks.holds_document(vectors).sum())


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
