"""Sampling a group of thoughts per prompt: ours, transformers' generate, TRL's and Tunix's: python -m bench.rollout [SIZE ...]

8 prompts x 8 samples in float32 at temperature 1: 64 new tokens that hardly ever stop early, and up to 256 with natural
stops, one token in 96 (`models.stop_ids`). Tokens are counted up to and with the one that ends the text. transformers,
and TRL with it, repeat the prompt for every sample.
"""

import functools
import json
import sys
import time

from bench import models, peaks
from bench.turns import in_turns, serve, table

PROMPTS, GROUP, MEAN = 8, 8, 96
CASES = {"64 new": (64, False), "256 new, stops": (256, True)}
LABELS = {"ours": "r3jax", "transformers": "transformers generate", "tunix": "Tunix sampler"}


def ends(vocab: int, stops: bool, own: set[int]) -> list[int]:
    return models.stop_ids(vocab, MEAN, own) if stops else sorted(own)


def ours(folder: str, new: int, stops: bool):
    import jax
    import numpy as np

    from r3jax.model.encoder import bucket_of, pad
    from r3jax.model.sampler import sample
    from r3jax.model.sharding import put_batch

    it = models.ours(folder)
    rows = models.prompts(folder, PROMPTS)
    batch = (*pad(rows, bucket_of(max(map(len, rows)))), np.arange(PROMPTS, dtype=np.int32))
    t = it.chat.tokenizer
    stop_ids = tuple(ends(it.model.vocab, stops, {t.im_end_id, t.pad_id}))
    seeds = iter(range(1000))

    def measure() -> dict:
        with jax.set_mesh(it.mesh):
            begin = time.perf_counter()
            done = jax.device_get(
                sample(
                    it.params,
                    *put_batch(it.mesh, batch),
                    jax.random.key(next(seeds)),
                    config=it.model,
                    group=GROUP,
                    max_new=new,
                    temperature=1.0,
                    embed_id=t.embed_id,
                    stop_ids=stop_ids,
                )
            )
        return {"seconds": time.perf_counter() - begin, "tokens": int(done.mask.sum())}

    measure()
    return measure


def transformers(folder: str, new: int, stops: bool):
    import numpy as np
    import torch

    model = models.theirs(folder)
    rows = models.prompts(folder, PROMPTS)
    own = set(model.generation_config.eos_token_id)
    eos = ends(model.config.vocab_size, stops, own)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def measure() -> dict:
        begin = time.perf_counter()
        with torch.inference_mode():
            texts = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=GROUP,
                eos_token_id=eos,
                pad_token_id=model.generation_config.pad_token_id,
            )
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": written(texts[:, width:].numpy(), np.array(eos))}

    measure()
    return measure


def written(texts, eos) -> int:
    """Tokens of rows up to and with the first that ends them."""
    import numpy as np

    stop = np.isin(texts, eos)
    return int(np.where(stop.any(1), stop.argmax(1) + 1, texts.shape[1]).sum())


def main(sizes: list[str], rounds: int) -> None:
    peak = peaks.measure()
    print(peaks.sentence(peak), "\n")
    for size in sizes:
        with models.folder(size) as folder:
            for case, (new, stops) in CASES.items():
                found = in_turns(
                    "bench.rollout", list(LABELS), {"folder": folder, "new": new, "stops": stops}, rounds, size != "0.5b"
                )
                report(size, case, found, peak)


def report(size: str, case: str, found: dict, peak: dict) -> None:
    base = found["ours"]
    rows = []
    for name, x in found.items():
        if "failure" in x:
            rows.append([LABELS[name], x["failure"], *[""] * 5])
            continue
        rate = x["tokens"] / x["seconds"]
        flops = 2 * (models.multiplied(size) + models.unembedding(size)) * rate
        rows.append(
            [
                LABELS[name],
                f"{rate:,.0f}",
                f"{base['tokens'] / base['seconds'] / rate:.2f}" if name != "ours" else "",
                f"{x['tokens'] / PROMPTS / GROUP:.0f}",
                f"{100 * flops / peak['product']:.0f} %",
                f"{x['peak'] / 2**30:.2f}",
                f"{100 * x['spread']:.0f} %",
            ]
        )
    head = [f"{size}, {case}", "tokens/s", "ours is x times", "tokens a text", "of the matmul peak", "peak, GiB", "spread"]
    print(table(head, rows), "\n", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["worker"]:
        makers = {"ours": ours, "transformers": transformers}
        serve(functools.partial(makers[words[1]], **json.loads(words[2])))
    else:
        rounds = next((int(w.split("=")[1]) for w in words if w.startswith("--rounds=")), 5)
        main([w for w in words if not w.startswith("--")] or ["tiny", "25m"], rounds)
