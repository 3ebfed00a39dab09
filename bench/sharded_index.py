"""A sharded index on this machine: memory and search time of each process, and whether it answers as one index does.

python -m bench.sharded_index --processes=4 --vectors=1000000 --width=256 --kind=exact
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time

import numpy as np

from r3jax import processes

QUERIES, K = 256, 100
CENTRES = 2000


def rows(first: int, last: int, width: int) -> np.ndarray:
    """Unit rows in clusters, each made from its own number, so that any process can make any of them."""
    centres = np.random.default_rng(0).normal(size=(CENTRES, width)).astype(np.float32)
    found = np.empty((last - first, width), np.float32)
    for start in range(first - first % 10_000, last, 10_000):
        rng = np.random.default_rng([1, start])
        block = centres[rng.integers(0, CENTRES, 10_000)] + 0.8 * rng.normal(size=(10_000, width)).astype(np.float32)
        low, high = max(start, first), min(start + 10_000, last)
        found[low - first : high - first] = block[low - start : high - start]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def memory() -> float:
    """Resident now, in GB; the peak counts what building took."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def work(size: int, width: int, kind: str) -> None:
    processes.connect()
    from r3jax.search.index import VersionedIndex
    from r3jax.search.sharded import build

    job, empty = processes.here(), memory()
    share = job.share(size)
    begin = time.perf_counter()
    index = build(rows(share.start, share.stop, width), size, 0, kind)
    built = time.perf_counter() - begin
    queries = rows(0, QUERIES, width) + 0.3 * rows(size - QUERIES, size, width)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = index.search(queries, K)  # compiles, and brings the vectors to the devices
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        index.search(queries, K)
        times.append(time.perf_counter() - begin)
    recall = index.recall_probe(queries, 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    mine = np.array([memory() - empty, peak, built, np.median(times)])
    every = job.gather(mine)
    if job.index:
        return
    if job.count > 1:  # held against one index over all of them
        del index
        alone = VersionedIndex.build(rows(0, size, width), 0, "exact").search(queries, K)
        same = float((alone[0] == found[0]).mean())
        reached = float((found[1] >= alone[1][:, -1:] - 1e-6).mean())
    else:
        same = reached = 1.0
    print(
        json.dumps(
            {
                "kind": kind,
                "processes": job.count,
                "vectors": size,
                "width": width,
                "held_gb_each": every[:, 0].round(2).tolist(),
                "peak_gb_each": every[:, 1].round(2).tolist(),
                "build_s": round(float(every[:, 2].max()), 1),
                f"search_{QUERIES}x{K}_s": round(float(every[:, 3].max()), 2),
                "recall@10": round(recall, 4),
                "same_rows_as_exact": round(same, 4),
                f"recall@{K}": round(reached, 4),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--kind", choices=("exact", "scann"), default="exact")
    given = parser.parse_args()
    if all(os.environ.get(name) for name in processes.VARIABLES) or given.processes == 1:
        return work(given.vectors, given.width, given.kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = [(address, str(given.processes), str(rank)) for rank in range(given.processes)]
    again = [sys.executable, "-m", "bench.sharded_index", *sys.argv[1:]]
    job = [subprocess.Popen(again, env=os.environ | dict(zip(processes.VARIABLES, t, strict=True))) for t in told]
    sys.exit(max(process.wait() for process in job))


if __name__ == "__main__":
    main()
