"""Our index beside faiss IVF and exact numpy, as a markdown table: python -m bench.index [DOCUMENTS] [WIDTH]

Clustered random unit vectors (default 100,000 of width 256), each index in a fresh process, on all cores that the
process may use. Needs requirements-bench.txt; without faiss its row is left out.

- build: from vectors in memory. search: 512 queries, the best 100 of each, one batch; the second call is timed, for
  the first compiles. recall@10 against exact numpy.
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
import pathlib
import subprocess
import sys
import time

import numpy as np

QUERIES, DEPTH, CANDIDATES = 512, 10, 100
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
    """faiss' inverted file of whole vectors, with as many lists, and as many looked into, as our tree."""

    def __init__(self, vectors, kind: str):
        import faiss

        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        lists = math.isqrt(len(vectors))
        width = vectors.shape[1]
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.nprobe = max(1, lists // 8)
        self.index.train(vectors)
        self.index.add_with_ids(vectors, np.arange(len(vectors)))

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


def measure(kind: str, documents: int, width: int) -> dict:
    """One index's figures; run in a process of its own."""
    vectors, drifted, queries = data(documents, width)
    importlib.import_module(LIBRARY[kind])  # no part of what the index holds
    ctypes.CDLL(None).malloc_trim(0)  # else the index is put where the data's temporaries were
    before = memory("VmRSS")
    index, seconds = timed(lambda: {"tree": Ours, "exact": Ours, "ivf": IVF, "numpy": Numpy}[kind](vectors, kind))
    found = {"build": seconds}
    index.search(queries, CANDIDATES)
    (rows, scores), found["search"] = timed(lambda: index.search(queries, CANDIDATES))
    found["held"], found["peak"] = memory("VmRSS") - before, memory("VmHWM") - before
    found["recall"] = recall(rows, vectors, queries)
    some = np.random.default_rng(1).choice(documents, documents // 100, replace=False)
    _, found["upsert"] = timed(lambda: index.upsert(some, drifted[some]))
    found["refresh"] = refresh(index, documents, drifted, queries)
    parts = np.array_split(np.arange(documents), 10)
    _, found["replace"] = timed(lambda: [index.upsert(part, drifted[part]) for part in parts])
    found["recall_after"] = recall(index.search(queries, CANDIDATES)[0], drifted, queries)
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


def recall(rows: np.ndarray, vectors: np.ndarray, queries: np.ndarray) -> float:
    """Mean recall@10 against exact numpy."""
    truth = Numpy(vectors, "").search(queries, DEPTH)[0]
    return float(np.mean([len(set(a[:DEPTH]) & set(b)) / DEPTH for a, b in zip(rows.tolist(), truth, strict=True)]))


def timed(work) -> tuple:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def peaks() -> dict:
    """Operations per second of a float32 matrix product, bytes read and written per second of a copy; best of 7."""
    a = np.random.default_rng(0).random((2048, 2048), np.float32)
    source = np.ones(2**26, np.float32)
    target = np.zeros_like(source)
    product = min(timed(lambda: a @ a)[1] for _ in range(7))
    copy = min(timed(lambda: np.copyto(target, source))[1] for _ in range(7))
    return {"product": 2 * 2048**3 / product, "copy": 2 * source.nbytes / copy}


def in_a_process(*args) -> dict:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bench.index", *map(str, args)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(documents: int, width: int) -> None:
    peak, cores = in_a_process("peaks"), len(os.sched_getaffinity(0))
    print(
        f"{documents:,} vectors of width {width}, {documents * width * 4 / GIB:.2f} GiB; {cores} cores, of which "
        f"numpy has {peak['product'] / 1e9:,.0f} GFLOP/s in a matrix product and "
        f"{peak['copy'] / 1e9:.1f} GB/s, read and written, in a copy.\n"
    )
    head = ["build, s", "search, ms a query", "recall@10", "share of the peak", "upsert 1 %, s", "refresh step, s"]
    head += ["replace all, s", "recall@10 then", "memory held, GiB", "peak, GiB"]
    print("| | " + " | ".join(head) + " |\n|---" + "|---:" * len(head) + "|")
    for kind, label in LABELS.items():
        if kind == "ivf" and not importlib.util.find_spec("faiss"):
            print("| faiss IVF flat | not installed: requirements-bench.txt |" + " |" * (len(head) - 1), flush=True)
            continue
        x = in_a_process(kind, documents, width)
        share = 2 * QUERIES * documents * width / x["search"] / peak["product"]
        cells = [
            f"{x['build']:.1f}",
            f"{1000 * x['search'] / QUERIES:.2f}",
            f"{x['recall']:.3f}",
            f"{100 * share:.0f} %" if kind in ("exact", "numpy") else "",
            *(f"{x[name]:.2f}" for name in ("upsert", "refresh", "replace")),
            f"{x['recall_after']:.3f}",
            *(f"{x[name] / GIB:.2f}" for name in ("held", "peak")),
        ]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["peaks"]:
        print(json.dumps(peaks()))
    elif words and words[0] in LABELS:
        print(json.dumps(measure(words[0], *map(int, words[1:]))))
    else:
        main(*map(int, words or ["100000"]), *([] if len(words) > 1 else [256]))
