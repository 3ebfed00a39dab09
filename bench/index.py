"""Our index beside faiss IVF and exact numpy, as a markdown table: python -m bench.index [DOCUMENTS] [WIDTH]

Clustered random unit vectors (default 100,000 of width 256), each index in a fresh process, on all cores that the
process may use. Needs requirements-bench.txt; without faiss its row is left out.

- build: from vectors in memory. search: 512 queries, the best 100 of each, one batch, the median of five calls.
  recall@10 against exact numpy; IVF looks into as few lists as find what our tree finds.
- upsert: 1 % of the vectors by drifted ones. replace all: every vector, in batches of a tenth, and the recall@10 that
  is left. refresh: the index's side of one RL step, without the encoder: search for 512 rollouts, `boundary`'s choice
  of 3 % of the documents, their upsert.
- memory: what the process holds more than before the build, and at its peak; the vectors given are not counted.
- share of the peak: of the measured matrix product, that 2 * 512 * documents * width operations in the time of a search
  are; above what an approximate index does not look at it has no meaning, so exact ones have it alone.
"""

import ctypes
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from bench import peaks
from bench.turns import memory

QUERIES, DEPTH, CANDIDATES, REPEATS = 512, 10, 100, 5
GIB = 2**30
LABELS = {
    "tree": "r3jax, scann tree",
    "exact": "r3jax, exact",
    "ivf": "faiss IVF flat",
    "numpy": "numpy, exact",
}
LIBRARY = {"tree": "r3jax.search.index", "exact": "r3jax.search.index", "ivf": "faiss", "numpy": "numpy"}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def data(documents: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, the same drifted to a cosine of about .97, and queries near some of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, documents // 100), width)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), documents)]
    vectors = unit(vectors + rng.normal(size=vectors.shape).astype(np.float32))
    noise = rng.normal(size=vectors.shape).astype(np.float32) / math.sqrt(width)
    queries = vectors[rng.integers(0, documents, QUERIES)]
    queries = unit(queries + rng.normal(size=queries.shape).astype(np.float32) / math.sqrt(width))
    return vectors, unit(vectors + 0.25 * noise), queries


class Ours:
    """`VersionedIndex`, of either kind."""

    def __init__(self, vectors, kind: str):
        from r3jax.search.index import VersionedIndex

        tree = kind == "tree"
        self.index = VersionedIndex.build(vectors, 0, "scann" if tree else "exact", tree_above=256)

    def search(self, queries, k):
        return self.index.search(queries, k)

    def upsert(self, rows, vectors):
        self.index.upsert(rows, vectors, 1)


class IVF:
    """faiss' inverted file of whole vectors, with as many lists as our tree; `settle` says how many it looks into."""

    def __init__(self, vectors, kind: str):
        import faiss

        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        lists = math.isqrt(len(vectors))
        width = vectors.shape[1]
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.train(vectors)
        self.index.add_with_ids(vectors, np.arange(len(vectors)))

    def settle(self, queries, truth, wanted: float) -> None:
        """Looks into as few lists, of the powers of two, as find so much of the truth."""
        self.index.nprobe = 1
        while self.index.nprobe < self.index.nlist and recall(self.search(queries, CANDIDATES)[0], truth) < wanted:
            self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)

    def search(self, queries, k):
        scores, rows = self.index.search(queries, k)
        return rows, scores

    def upsert(self, rows, vectors):
        self.index.remove_ids(rows)
        self.index.add_with_ids(vectors, rows)


class Numpy:
    """A matrix product and a partial sort, 8,192 documents at a time."""

    def __init__(self, vectors, kind: str):
        self.vectors = vectors.copy()

    def search(self, queries, k):
        rows, scores = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
        for start in range(0, len(self.vectors), 8192):
            part = queries @ self.vectors[start : start + 8192].T
            best = np.argpartition(-part, min(k, part.shape[1]) - 1, axis=1)[:, :k]
            rows = np.concatenate([rows, start + best], axis=1)
            scores = np.concatenate([scores, np.take_along_axis(part, best, 1)], axis=1)
            order = np.argsort(-scores, axis=1)[:, :k]
            rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return rows, scores

    def upsert(self, rows, vectors):
        self.vectors[rows] = vectors


def measure(kind: str, documents: int, width: int, wanted: float) -> dict:
    """One index's figures; run in a process of its own. IVF is made to find `wanted` of the best ten at least."""
    vectors, drifted, queries = data(documents, width)
    importlib.import_module(LIBRARY[kind])  # no part of what the index holds
    ctypes.CDLL(None).malloc_trim(0)  # else the index is put where the data's temporaries were
    before = memory("VmRSS")
    index, seconds = timed(lambda: {"tree": Ours, "exact": Ours, "ivf": IVF, "numpy": Numpy}[kind](vectors, kind))
    found = {"build": seconds}
    index.search(queries, CANDIDATES)
    found["held"], found["peak"] = memory("VmRSS") - before, memory("VmHWM") - before
    truth = Numpy(vectors, "").search(queries, DEPTH)[0]
    if kind == "ivf":
        index.settle(queries, truth, wanted)
    searches = [timed(lambda: index.search(queries, CANDIDATES)) for _ in range(REPEATS)]
    found["search"] = statistics.median(seconds for _, seconds in searches)
    found["recall"] = recall(searches[0][0][0], truth)
    some = np.random.default_rng(1).choice(documents, documents // 100, replace=False)
    _, found["upsert"] = timed(lambda: index.upsert(some, drifted[some]))
    found["refresh"] = refresh(index, documents, drifted, queries)
    parts = np.array_split(np.arange(documents), 10)
    _, found["replace"] = timed(lambda: [index.upsert(part, drifted[part]) for part in parts])
    truth = Numpy(drifted, "").search(queries, DEPTH)[0]
    found["recall_after"] = recall(index.search(queries, CANDIDATES)[0], truth)
    return found


def refresh(index, documents: int, drifted: np.ndarray, queries: np.ndarray) -> float:
    """Seconds of one step: as the RL environment does it, the positive of each rollout its first candidate."""
    from r3jax.search.refresh import choose

    def step():
        candidates, scores = index.search(queries, CANDIDATES)
        rows = choose(
            "boundary",
            versions=np.zeros(documents, np.int64),
            step=1,
            budget=3 * documents // 100,
            positives=candidates[:, 0],
            candidates=candidates,
            scores=scores,
            theta=scores[:, DEPTH - 1],
            ranks=np.ones(len(queries)),
            sigma=0.01,
        )
        index.upsert(rows, drifted[rows])

    step()
    return timed(step)[1]


def recall(rows: np.ndarray, truth: np.ndarray) -> float:
    """Mean recall@10 of what exact numpy finds."""
    return float(np.mean([len(set(a[:DEPTH]) & set(b)) / DEPTH for a, b in zip(rows.tolist(), truth, strict=True)]))


def timed(work) -> tuple:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def in_a_process(*args) -> dict:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bench.index", *map(str, args)]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}bench.index {' '.join(map(str, args))} ended with {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def main(documents: int, width: int) -> None:
    peak = peaks.measure()
    print(f"{peaks.sentence(peak)}\n\n{documents:,} vectors of width {width}, {documents * width * 4 / GIB:.2f} GiB.\n")
    head = ["build, s", "search, ms a query", "of the tree's", "recall@10", "share of the peak", "upsert 1 %, s"]
    head += ["refresh step, s", "replace all, s", "recall@10 then", "memory held, GiB", "peak, GiB"]
    print("| | " + " | ".join(head) + " |\n|---" + "|---:" * len(head) + "|")
    tree: dict = {}
    for kind, label in LABELS.items():
        if kind == "ivf" and not importlib.util.find_spec("faiss"):
            print("| faiss IVF flat | not installed: requirements-bench.txt |" + " |" * (len(head) - 1), flush=True)
            continue
        x = in_a_process(kind, documents, width, tree["recall"] if kind != "tree" else 0.0)
        tree = x if kind == "tree" else tree
        share = 2 * QUERIES * documents * width / x["search"] / peak["product"]
        cells = [
            f"{x['build']:.1f}",
            f"{1000 * x['search'] / QUERIES:.2f}",
            f"{x['search'] / tree['search']:.1f}",
            f"{x['recall']:.3f}",
            f"{100 * share:.0f} %" if kind in ("exact", "numpy") else "",
            *(f"{x[name]:.2f}" for name in ("upsert", "refresh", "replace")),
            f"{x['recall_after']:.3f}",
            *(f"{x[name] / GIB:.2f}" for name in ("held", "peak")),
        ]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] in LABELS:
        print(json.dumps(measure(words[0], int(words[1]), int(words[2]), float(words[3]))))
    elif not all(word.isdecimal() and int(word) >= least for word, least in zip(words, (1000, 8), strict=False)):
        print(f"error: {' '.join(words)!r} is not DOCUMENTS (1000 or more) and WIDTH (8 or more).", file=sys.stderr)
        sys.exit(2)
    else:
        main(*map(int, words or ["100000"]), *([] if len(words) > 1 else [256]))
