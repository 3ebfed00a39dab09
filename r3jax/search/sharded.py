"""One index over several processes: each keeps a run of the rows, in a VersionedIndex of its own.

Every process asks the same at the same time and gets the same answer, which is that of one index over all rows: each
searches its own rows, the lists of the best are gathered and merged, ties go to the lower row. (A score's last bit may
be another, for that of a matrix product depends on how many documents it has.) Versions, 4 bytes a document, are on all
processes, so that all choose alike whom to re-encode.

Axis legend: N documents, n of them here, Q queries, D width, k results, P processes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from r3jax import processes
from r3jax.processes import Processes
from r3jax.search import checks
from r3jax.search.index import TREE_ABOVE, VersionedIndex


def build(
    vectors, size: int, step: int, kind: str = "scann", *, tree_above: int = TREE_ABOVE
) -> "VersionedIndex | ShardedIndex":
    """An index of `size` documents from this process's own share [n, D] of their vectors: all of them, if it is alone.

    `tree_above` is held against what one process keeps. The rest as `VersionedIndex.build`.
    """
    local = VersionedIndex.build(vectors, step, kind, tree_above=tree_above)
    job = processes.here()
    return local if job.count == 1 else ShardedIndex(local, np.full(size, step, np.int32), job)


def restore(state: Mapping[str, Any]) -> "VersionedIndex | ShardedIndex":
    """The index whose `state` was taken, by however many processes, on the processes there are now.

    Of several, the vectors are as `processes.spread` has them.
    A tree goes on as it was from one process to one; else it is trained anew.
    """
    state, job = dict(state), processes.here()
    if job.count == 1:
        return VersionedIndex.from_state(state | {"vectors": state["vectors"][: len(state["versions"])]})
    return ShardedIndex.from_parts(processes.own(state["vectors"]), state["versions"], state["settings"], job)


class ShardedIndex:
    """Use `build` or `restore`; the methods are those of VersionedIndex, and their arguments alike on all processes.

    Args:
      local: this process's rows.
      versions: int32 [N], of all rows.
      job: who shares them.
    """

    def __init__(self, local: VersionedIndex, versions: np.ndarray, job: Processes):
        share = job.share(len(versions))
        if len(local) != share.stop - share.start:
            raise ValueError(f"local holds {len(local)} rows, this process's share is {share.stop - share.start}")
        self._local, self._versions, self._job, self._first = local, versions, job, share.start

    @classmethod
    def from_parts(cls, block: np.ndarray, versions, settings: np.ndarray, job: Processes) -> "ShardedIndex":
        """From this process's block of vectors (what is beyond its share is padding), and what all share of a state."""
        versions = checks.integers("state['versions']", versions, len(versions)).astype(np.int32)
        share = job.share(len(versions))
        state = {
            "vectors": block[: share.stop - share.start],
            "versions": versions[share],
            "settings": np.array([*settings[:2], 0], np.int64),
            "tree": np.zeros(1, np.uint8),
        }
        return cls(VersionedIndex.from_state(state), versions, job)

    @property
    def versions(self) -> np.ndarray:
        """The step at which each document was encoded, int32 [N]; a read-only view."""
        view = self._versions.view()
        view.flags.writeable = False
        return view

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """See `VersionedIndex.rows`: each process fills in what it keeps."""
        here = rows - self._first
        mine = (here >= 0) & (here < len(self._local))
        return self._job.gather(np.where(mine[:, None], self._local.rows(np.where(mine, here, 0)), 0)).sum(0)

    def __len__(self) -> int:
        """N."""
        return len(self._versions)

    def search(self, queries, k: int, exactly: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The k best of all documents; see `VersionedIndex.search`."""
        k = checks.whole("k", k, 1, len(self))
        depth = min(k, len(self._local))
        rows = np.zeros((len(queries), k), np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found, scores[:, :depth] = self._local.search(queries, depth, exactly)
        rows[:, :depth] = found + self._first
        # [P, Q, k] -> [Q, P k]: lower rows first, and the sort is stable.
        width = self._job.count * k
        rows, scores = (
            np.moveaxis(self._job.gather(x), 0, 1).reshape(len(queries), width).copy() for x in (rows, scores)
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)

    def scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `VersionedIndex.scores`: each process fills in what it keeps."""
        here = np.where(rows < 0, len(self) - 1, rows) - self._first
        mine = (here >= 0) & (here < len(self._local))
        # Each query's own rows to the left, so that no more columns are computed than are needed.
        order = np.argsort(~mine, axis=1, kind="stable")[:, : int(mine.sum(1).max(initial=0))]
        known = np.take_along_axis(mine, order, 1)
        some = self._local.scores(queries, np.where(known, np.take_along_axis(here, order, 1), 0))
        result = np.zeros(rows.shape, some.dtype)
        np.put_along_axis(result, order, np.where(known, some, 0), 1)
        return self._job.gather(result).sum(0)

    def above(self, queries: np.ndarray, least: np.ndarray, without: np.ndarray, never=None) -> np.ndarray:
        """See `VersionedIndex.above`."""
        share = slice(self._first, self._first + len(self._local))
        here = without - self._first
        here = np.where((here >= 0) & (here < len(self._local)), here, -1)
        counts = self._local.above(queries, least, here, None if never is None else never[share])
        return self._job.gather(counts).sum(0)

    def like(self, vectors: np.ndarray) -> "ShardedIndex":
        """See `VersionedIndex.like`: of this process's rows [n, D]."""
        return ShardedIndex(self._local.like(vectors), np.zeros(len(self), np.int32), self._job)

    def upsert(self, rows, vectors, step: int) -> None:
        """See `VersionedIndex.upsert`: each process takes what it keeps."""
        rows = checks.row_ids("rows", rows, len(self))
        here = rows - self._first
        mine = (here >= 0) & (here < len(self._local))
        self._local.upsert(here[mine], np.asarray(vectors)[mine], step)
        self._versions[rows] = step

    def carry(self, matrix, offset, step: int) -> None:
        """See `VersionedIndex.carry`: each process moves what it keeps."""
        self._local.carry(matrix, offset, step)

    def rebuild(self) -> None:
        """See `VersionedIndex.rebuild`."""
        self._local.rebuild()

    def recall_probe(self, queries, k: int) -> float:
        """See `VersionedIndex.recall_probe`."""
        largest = -(-len(self) // self._job.count)  # of all shares, so that all processes go the same way
        if self._local.kind == "exact" or largest <= self._local.settings[1]:
            return 1.0  # nobody has a tree
        _, scores = self.search(queries, k)
        _, truth = self.search(queries, k, exactly=True)
        return float((scores >= truth[:, -1:] - 1e-6).mean())

    def state(self) -> dict:
        """As `VersionedIndex.state`, the vectors spread over the processes; without trees."""
        return {
            "vectors": processes.spread(self._local.vectors.copy(), len(self)),
            "versions": self._versions.copy(),
            "settings": np.array([*self._local.settings[:2], 0], np.int64),
            "tree": np.zeros(1, np.uint8),
        }


Index = VersionedIndex | ShardedIndex
