"""How time grows with batch, length, group and corpus: python -m bench.curves [SIZE ...]; writes bench/curves.svg

Ours alone, the median of five, each curve beside its exponent: the slope of log time over log size between its last two
points. What must grow linearly has 1 at most; attention lets length grow a little faster.
"""

import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from bench import models, peaks
from bench.turns import command, in_turns, table

REPEATS = 5
BATCHES, LENGTHS, GROUPS, CORPORA = (1, 4, 16, 64), (32, 64, 128, 256, 512), (1, 2, 4, 8, 16), (1000, 10_000, 100_000)
TARGET = pathlib.Path(__file__).parent / "curves.svg"


def seconds(work: Callable[[], object]) -> float:
    work()
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def curves(folder: str):
    """Seconds of every point: {"what size": seconds}."""
    import jax

    from r3jax.model.encoder import embed_jit, pad
    from r3jax.model.sampler import sample
    from r3jax.model.sharding import put_batch
    from r3jax.search.index import VersionedIndex

    it = models.ours(folder)
    jax.set_mesh(it.mesh)

    def encode(batch: int, length: int):
        tokens = put_batch(it.mesh, pad([[7] * length] * batch, length))
        return lambda: jax.block_until_ready(embed_jit(it.params, config=it.model, tokens=tokens[0], lengths=tokens[1]))

    def roll(group: int):
        prompts = put_batch(it.mesh, (*pad([[7] * 64] * 4, 64), np.arange(4, dtype=np.int32)))
        options = dict(config=it.model, group=group, max_new=32, temperature=1.0, embed_id=0, stop_ids=())
        return lambda: jax.block_until_ready(sample(it.params, *prompts, jax.random.key(0), **options))

    def search(documents: int):
        vectors = np.random.default_rng(0).normal(size=(documents, 256)).astype(np.float32)
        index = VersionedIndex.build(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 0, "exact")
        return lambda: index.search(vectors[:128], 100)

    def measure() -> dict:
        began = time.perf_counter()
        found = {f"batch {n}": seconds(encode(n, 64)) for n in BATCHES}
        found |= {f"length {n}": seconds(encode(8, n)) for n in LENGTHS}
        found |= {f"group {n}": seconds(roll(n)) for n in GROUPS}
        return found | {f"corpus {n}": seconds(search(n)) for n in CORPORA} | {"seconds": time.perf_counter() - began}

    return measure


def main(sizes: list[str], rounds: int) -> None:
    from r3jax.studies.plot import Panel, figure

    print(peaks.sentence(peaks.measure()), "\n")
    found = {}
    for size in sizes:
        with models.folder(size) as folder:
            found[size] = in_turns("bench.curves", ["curves"], {"folder": folder}, 1)["curves"]
        if "failure" in found[size]:
            sys.exit(f"{size}: {found[size]['failure']}")
    axes = {
        "batch": (BATCHES, "reading rows of 64 tokens: rows"),
        "length": (LENGTHS, "reading 8 rows: tokens of each"),
        "group": (GROUPS, "4 prompts, 32 new tokens: samples of each"),
        "corpus": (CORPORA, "exact search for 128: documents"),
    }
    panels, rows = [], []
    for what, (points, label) in axes.items():
        series = {size: [x[f"{what} {n}"] for n in points] for size, x in found.items()}
        panels.append(Panel(f"seconds by {what}", [f"{n:,}" for n in points], series, label, log=True))
        for size, values in series.items():
            slope = math.log(values[-1] / values[-2]) / math.log(points[-1] / points[-2])
            rows.append([f"{what}, {size}", f"{points[-2]:,} to {points[-1]:,}", f"{slope:.2f}"])
    TARGET.write_text(figure(panels), encoding="utf-8")
    print(table(["", "last two points", "exponent"], rows), f"\n\n{TARGET}", flush=True)


if __name__ == "__main__":
    command({"curves": curves}, main, ["tiny", "25m"])
