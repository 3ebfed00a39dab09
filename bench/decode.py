"""One stream of tokens at the 0.5B shape, by the share of memory bandwidth: python -m bench.decode [SIZE] [--rounds=N]

A single row must read every weight for each token. The bytes of all weights over the time of a token, the prompt's
reading taken off, beside what all cores read at most on this machine; transformers in turns.
"""

import statistics
import time

from bench import models, peaks
from bench.turns import command, in_turns, table

SHORT, LONG = 4, 36  # new tokens; their difference is timed
REPEATS = 3
LABELS = {
    "ours float32": "r3jax, float32",
    "ours bfloat16": "r3jax, bfloat16",
    "theirs float32": "transformers, float32",
    "theirs bfloat16": "transformers, bfloat16",
}


def difference(run) -> dict:
    """Seconds of a token, from the medians of two lengths."""
    found: dict[int, list[float]] = {SHORT: [], LONG: []}
    for new in (SHORT, LONG) * REPEATS:
        begin = time.perf_counter()
        run(new)
        found[new].append(time.perf_counter() - begin)
    return {"seconds": (statistics.median(found[LONG]) - statistics.median(found[SHORT])) / (LONG - SHORT)}


def ours(folder: str, dtype: str):
    import jax
    import numpy as np

    from r3jax.model.encoder import pad
    from r3jax.model.sampler import sample
    from r3jax.model.sharding import put_batch

    it = models.ours(folder, param_dtype=dtype, compute_dtype=dtype)
    rows = models.prompts(folder, 1)
    ends = dict(embed_id=it.chat.tokenizer.embed_id, stop_ids=())

    def run(new: int) -> None:
        with jax.set_mesh(it.mesh):
            batch = put_batch(it.mesh, (*pad(rows, len(rows[0])), np.zeros(1, np.int32)))
            key = jax.random.key(0)
            options = dict(config=it.model, group=1, max_new=LONG, temperature=0.0)
            jax.block_until_ready(sample(it.params, *batch, key, **(options | {"max_new": new}), **ends))

    run(SHORT), run(LONG)
    return lambda: difference(run)


def theirs(folder: str, dtype: str):
    import torch

    model = models.theirs(folder, dtype)
    ids = torch.tensor(models.prompts(folder, 1))

    def run(new: int) -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

    run(SHORT)
    return lambda: difference(run)


def main(sizes: list[str], rounds: int) -> None:
    peak = peaks.measure()
    print(peaks.sentence(peak), "\n")
    for size in sizes:
        weights = sum(models.products(size, 1, logits=1).values()) / 2  # two operations a weight
        with models.folder(size) as folder:
            found = in_turns("bench.decode", list(LABELS), {"folder": folder}, rounds, together=False)
        rows = []
        for name, x in found.items():
            if "failure" in x:
                rows.append([LABELS[name], x["failure"], *[""] * 4])
                continue
            rate = weights * (4 if "float32" in name else 2) / x["seconds"]
            rows.append(
                [
                    LABELS[name],
                    f"{1 / x['seconds']:.1f}",
                    f"{rate / 1e9:.1f}",
                    f"{100 * rate / peak['read']:.0f} %",
                    f"{x['peak'] / 2**30:.2f}",
                    f"{100 * x['spread']:.0f} %",
                ]
            )
        head = [f"{size}, one row", "tokens/s", "weights read, GB/s", "of reading alone", "process peak, GiB", "spread"]
        print(table(head, rows), "\n", flush=True)


if __name__ == "__main__":
    makers = {f"{who.__name__} {dtype}": (who, dtype) for who in (ours, theirs) for dtype in ("float32", "bfloat16")}
    command(
        {name: lambda folder, who=who, dtype=dtype: who(folder, dtype) for name, (who, dtype) in makers.items()},
        main,
        ["0.5b"],
    )
