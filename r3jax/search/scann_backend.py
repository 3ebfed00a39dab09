"""ScaNN 1.4 behind the index: brute force for small collections, a quantised tree for large ones.

The caller (`VersionedIndex`) has checked every argument; nothing here validates, and ScaNN itself may end the
process on bad input. Documents are rows, so ScaNN's own numbering is used and its pickled document ids never
exist. Its `delete` would renumber, so a deleted document's vector becomes zeros in its place.

Facts, all measured, that shape this file:
- ScaNN's float scores differ in the last bit between a living and a reloaded tree and between small and large
  batches. So ScaNN only chooses candidates, and `rescore` computes and orders their scores in one fixed way.
- Training a tree twice on the same vectors gives different trees, even with one thread. So a tree is never
  rebuilt to restore it: its trained parts are saved (`assets`) and loaded.
- It ends the process on: NaN or infinity in a tree, a batch size or a number of threads of 0, repeated upserts into
  SOAR's spilled partitions (not used here). It answers wrongly, and says nothing, on: NaN in a batch of queries, more
  neighbours than it can return, an unknown id in a list to delete, a new id twice in an upsert.

Source: Guo et al., "Accelerating Large-Scale Inference with Anisotropic Vector Quantization" (ICML 2020).
"""

import io
import os
import tempfile

import numpy as np
from scann.scann_ops.py import scann_ops_pybind

from r3jax.search import checks

DATASET = "dataset.npy"  # ScaNN's copy of the vectors: the index stores them already
SHAPE = "r3jax_shape"  # of the vectors that the saved tree belongs to
SLACK = 8  # candidates asked for beyond k, so that a last-bit difference near rank k cannot change the answer
BLOCK = 64  # queries rescored at once: bounds the gathered vectors to BLOCK * k rows


def rescore(vectors, queries, rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the candidates `rows` [Q, c], with scores computed from `vectors` [N, D] alone.

    A score depends on the query and the document only, never on the batch or on the backend's history.
    Descending; ties go to the lower row. Returns rows int32 [Q, k] and scores float32 [Q, k].
    """
    top_rows = np.empty((len(queries), k), np.int32)
    top_scores = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), BLOCK):
        part = slice(start, start + BLOCK)
        scores = np.einsum("qd,qcd->qc", queries[part], vectors[rows[part]])
        order = np.lexsort((rows[part], -scores), axis=-1)[:, :k]
        top_rows[part] = np.take_along_axis(rows[part], order, axis=1)
        top_scores[part] = np.take_along_axis(scores, order, axis=1)
    return top_rows, top_scores


class ScannBackend:
    """A ScaNN searcher over the index's vectors [N, D]; `leaves` = 0 is brute force, otherwise partitions."""

    def __init__(self, vectors: np.ndarray, leaves: int, assets: np.ndarray | None = None):
        """Trains a searcher on `vectors`, or loads the one that `assets()` saved with the same vectors."""
        self._vectors = vectors
        self._leaves = leaves
        self._deleted = ~checks.holds_document(vectors)
        self._moved = False
        self._searcher = self._train() if assets is None else self._load(assets)

    def _train(self):
        builder = scann_ops_pybind.builder(self._vectors, 10, "dot_product")
        if self._leaves:
            # An eighth of the partitions keeps recall@10 near .97; two dimensions to a code and the
            # threshold .2 are the authors' own defaults for cosine.
            builder = builder.tree(self._leaves, max(1, self._leaves // 8), min_partition_size=1)
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(200)
        else:
            builder = builder.score_brute_force()
        return builder.build()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [Q, k], scores [Q, k], descending, and a mask [Q] of the queries that were answered in full.

        A tree may hold fewer than k documents in the partitions it looks at, and a deleted document, of score 0, may
        stand before others; such a query's row is meaningless.
        """
        if self._moved:  # quicker than an upsert of everything
            self._searcher, self._moved = self._train(), False
        wanted = min(k + SLACK, len(self._vectors))
        rows, scores = self._searcher.search_batched_parallel(
            queries, wanted, max(200, 2 * wanted), batch_size=max(1, min(64, len(queries)))
        )
        rows = np.asarray(rows).astype(np.int32)
        full = np.isfinite(scores).all(axis=1)
        if self._deleted.any():
            full &= ~self._deleted[np.where(full[:, None], rows, 0)].any(axis=1)
        rows, scores = rescore(self._vectors, queries, np.where(full[:, None], rows, 0), k)
        return rows, scores, full

    def upsert(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Replaces the vectors of `rows` [n] (n >= 1, unique, known) by `vectors` [n, D]; zeros delete."""
        self._deleted[rows] = ~checks.holds_document(vectors)
        if not self._moved:
            self._searcher.searcher.upsert(rows.tolist(), vectors, len(rows))

    def moved(self) -> None:
        """All vectors have changed in their array: brute force takes them in before it searches, a tree never does."""
        self._moved = not self._leaves

    def rebuild(self) -> None:
        """Trains partitions and quantiser anew on the current vectors."""
        self._searcher = self._train()

    def assets(self) -> np.ndarray:
        """The trained tree as bytes uint8 [n] (an npz of its files, no pickle); empty for brute force.

        The searcher goes on from its own saved copy, so a run that continues and one that is restored from
        here search the very same object.
        """
        if not self._leaves:
            return np.zeros(0, np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            self._searcher.serialize(folder, relative_path=True)
            files = {SHAPE: np.array(self._vectors.shape, np.int64)}
            for name in sorted(os.listdir(folder)):
                if name != DATASET:
                    with open(os.path.join(folder, name), "rb") as file:
                        files[name] = np.frombuffer(file.read(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **files)  # type: ignore[arg-type] # numpy's stub takes **files for allow_pickle
        saved = np.frombuffer(buffer.getvalue(), np.uint8)
        self._searcher = self._load(saved)
        return saved

    @staticmethod
    def check(assets: np.ndarray, shape: tuple[int, int]) -> None:
        """ValueError for bytes that are not a whole `assets` of a tree over vectors of this shape.

        ScaNN may end the process on parts that are damaged or of another size; the npz carries checksums.
        """
        try:
            with np.load(io.BytesIO(assets.tobytes()), allow_pickle=False) as files:
                found = {name: files[name] for name in files.files}
        except Exception as e:  # what zipfile, zlib and numpy raise on damaged bytes has no common ancestor
            raise ValueError(f"it is damaged ({type(e).__name__})") from None
        if SHAPE not in found or tuple(found[SHAPE]) != shape or any(os.path.basename(x) != x for x in found):
            raise ValueError(f"it does not belong to vectors of shape {shape}")

    def _load(self, assets: np.ndarray):
        if not self._leaves:
            return self._train()
        with tempfile.TemporaryDirectory() as folder:
            with np.load(io.BytesIO(assets.tobytes()), allow_pickle=False) as files:
                for name in set(files.files) - {SHAPE}:
                    with open(os.path.join(folder, name), "wb") as file:
                        file.write(files[name].tobytes())
            np.save(os.path.join(folder, DATASET), self._vectors)
            return scann_ops_pybind.load_searcher(folder, assets_backcompat_shim=False)
