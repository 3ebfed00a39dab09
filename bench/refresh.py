"""What following the embeddings costs: 3 % of the corpus per step beside all of it: python -m bench.refresh [SIZE ...]

`selective` is all that a step of stage 2 does for its rewards: search for 512 rollouts, the choice of documents, their
encoding and upsert, ranking, rewards, with the default's index, policy and probes. `full` encodes every document anew
and puts it into the index. Both in turns, on the bundled corpus; the larger model in one round, for it takes minutes.
"""

import statistics
import time

import numpy as np

from bench import models, peaks
from bench.turns import command, in_turns, table

ROUNDS = {"tiny": 3, "25m": 1}  # at most
ROLLOUTS, SHARE, REPEATS = 512, 0.03, 5
LAPS = ("search", "encode", "reward")
BATCH = {"tiny": 64, "25m": 32}


def both(folder: str, size: str):
    """Times a full re-encoding and REPEATS selective ones."""
    from r3jax.data import beir
    from r3jax.model.encoder import encode_rows
    from r3jax.rl.environment import Environment, RefreshConfig, RewardConfig, Rollouts
    from r3jax.search.index import VersionedIndex

    it, texts = models.ours(folder), beir.load(models.DATA).doc_texts
    rows, count = it.chat.documents(texts, 64), len(texts)

    def encode(chosen: np.ndarray) -> np.ndarray:
        chosen_rows = [rows[i] for i in chosen]
        return encode_rows(it.params, it.model, it.mesh, chosen_rows, batch_size=BATCH[size], heads=it.chat.heads)

    everything = np.arange(count)
    vectors = encode(everything)
    rng = np.random.default_rng(0)
    # Documents that have moved a little since: their own vectors would leave nothing to choose.
    moved = vectors + 0.3 * rng.normal(size=vectors.shape).astype(np.float32) / np.sqrt(vectors.shape[1])
    environment = Environment(
        VersionedIndex.build(moved / np.linalg.norm(moved, axis=1, keepdims=True), 0, "scann"),
        RewardConfig("dcg_scaled", 10, {"retrieval": 1.0, "format": 0.1, "length": 0.1}, 4, 64, limit=64),
        RefreshConfig("hybrid", int(SHARE * count), 100, None, 0.1, 0.9, carry=True),
        probes=64,
        seed=0,
    )
    step = 0

    def selective() -> dict:
        nonlocal step
        step += 1
        relevant = rng.integers(0, count, ROLLOUTS)
        near = vectors[relevant] + 0.3 * rng.normal(size=(ROLLOUTS, vectors.shape[1])) / np.sqrt(vectors.shape[1])
        near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
        lengths = np.full(ROLLOUTS, 20, np.int32)
        rollouts = Rollouts(near, relevant[:, None].astype(np.int32), np.ones(ROLLOUTS, bool), lengths)
        begin = time.perf_counter()
        _, stats = environment.score(rollouts, encode, step)
        laps = {name: stats[f"time/{name}"] for name in LAPS}
        return {"seconds": time.perf_counter() - begin, "encoded": stats["index/reencoded"], "documents": count} | laps

    def full() -> float:
        begin = time.perf_counter()
        environment.index.upsert(everything, encode(everything), step)
        return time.perf_counter() - begin

    def measure() -> dict:
        done = [selective() for _ in range(REPEATS)]
        return {key: statistics.median(x[key] for x in done) for key in done[0]} | {"full": full()}

    for _ in range(3):
        selective()
    return measure


def main(sizes: list[str], rounds: int) -> None:
    print(peaks.sentence(peaks.measure()), "\n")
    rows = []
    for size in sizes:
        with models.folder(size) as folder:
            x = in_turns("bench.refresh", ["both"], {"folder": folder, "size": size}, min(rounds, ROUNDS[size]))["both"]
        if "failure" in x:
            rows.append([size, x["failure"], *[""] * 7])
            continue
        share = 100 * x["encoded"] / x["documents"]
        figures = [f"{x['full']:.2f}", f"{x['seconds']:.3f}", f"{x['full'] / x['seconds']:.1f}", f"{share:.1f} %"]
        rows.append([size, f"{x['documents']:,.0f}", *figures, *(f"{x[name]:.3f}" for name in LAPS)])
    head = ["", "documents", "full, s", "selective, s", "full is x times", "re-encoded", *(f"{x}, s" for x in LAPS)]
    print(table(head, rows), "\n", flush=True)


if __name__ == "__main__":
    command({"both": both}, main, ["tiny", "25m"], ROUNDS)
