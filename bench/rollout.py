"""Sampling a group of thoughts per prompt beside transformers and Tunix: python -m bench.rollout [SIZE ...]

8 prompts x 8 samples in float32 at temperature 1: 64 new tokens that hardly ever stop early, and up to 256 with natural
stops, one token in 96 (`models.stop_ids`). Tokens are counted up to and with the one that ends the text. transformers
and Tunix repeat the prompt for every sample, and run as their users get them: transformers without torch.compile.
TRL's rollout is transformers' `generate`; bench.rl_step times it there. Tunix samples by top_p, here 1, as its GRPO
does by default, which sorts the vocabulary for every token. It is left out where a round takes minutes: 25m with 256
tokens, and the 0.5B shape, of which only 64 tokens are timed.
"""

import time

from bench import models, peaks
from bench.turns import command, in_turns, table, times

PROMPTS, GROUP, MEAN = 8, 8, 96
WARM = 8  # rounds before those that count, of ours with natural stops
CASES = {"64 new": (64, False), "256 new, stops": (256, True)}
LABELS = {"ours": "r3jax", "transformers": "transformers generate", "tunix": "Tunix sampler"}


def ends(vocab: int, stops: bool, own: set[int]) -> list[int]:
    return models.stop_ids(vocab, MEAN, own) if stops else sorted(own)


def ours(folder: str, new: int, stops: bool, prompts: int = PROMPTS, **changes):
    import jax
    import numpy as np

    from r3jax.model.encoder import bucket_of, pad
    from r3jax.model.sampler import sample
    from r3jax.model.sharding import put_batch

    it = models.ours(folder, **changes)
    rows = models.prompts(folder, prompts)
    batch = (*pad(rows, bucket_of(max(map(len, rows)))), np.arange(prompts, dtype=np.int32))
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

    for _ in range(WARM if stops else 1):  # rows leave by halves, the cache doubles: each is a program to compile
        measure()
    return measure


def transformers(
    folder: str, new: int, stops: bool, prompts: int = PROMPTS, dtype: str = "float32", device: str = "cpu"
):
    import numpy as np
    import torch

    model = models.theirs(folder, dtype, device)
    rows = models.prompts(folder, prompts)
    own = set(model.generation_config.eos_token_id)
    eos = ends(model.config.vocab_size, stops, own)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)

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
        texts = texts[:, width:].cpu().numpy()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": written(texts, np.array(eos))}

    measure()
    return measure


def tunix(folder: str, new: int, stops: bool):
    import pathlib

    import jax
    import numpy as np
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    from r3jax.model.hugging_face_config import read_config
    from r3jax.text import tokenizer

    c, t = read_config(pathlib.Path(folder)), tokenizer.load(folder)
    config = ModelConfig(
        num_layers=c["layers"],
        vocab_size=c["vocab"],
        embed_dim=c["width"],
        hidden_dim=c["ffn"],
        num_heads=c["heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["kv_heads"],
        rope_theta=int(c["rope_theta"]),
        norm_eps=c["norm_eps"],
        use_tied_embedding=True,
    )
    rows = models.prompts(folder, PROMPTS)
    width = max(map(len, rows))

    class Rows:
        """Stands for Tunix's tokenizer: the text "3" is the fourth prompt."""

        def encode(self, text: str) -> list[int]:
            return rows[int(text)]

        def decode(self, ids) -> str:
            return ""

        def bos_id(self) -> int:
            return 0  # none is put in front

        def eos_id(self) -> int:
            return t.embed_id

        def pad_id(self) -> int:
            return t.pad_id

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    jax.set_mesh(mesh)
    sampler = Sampler(
        create_model_from_safe_tensors(folder, config, mesh, jax.numpy.float32),
        Rows(),
        CacheConfig(width + new, c["layers"], c["kv_heads"], c["head_dim"]),
    )
    eos = ends(c["vocab"], stops, {t.embed_id, t.im_end_id, t.pad_id})
    seeds = iter(range(1000))

    def measure() -> dict:
        begin = time.perf_counter()
        made = sampler(
            [str(i) for i in range(PROMPTS) for _ in range(GROUP)],
            max_generation_steps=new,
            max_prompt_length=width,
            eos_tokens=eos,
            temperature=1.0,
            top_p=1.0,
            seed=next(seeds),
        )
        seconds = time.perf_counter() - begin
        # Its rows end before the token that ends them.
        return {"seconds": seconds, "tokens": int(sum(min(len(np.asarray(x)) + 1, new) for x in made.tokens))}

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
                if size == "0.5b" and stops:
                    continue  # its warm rounds alone take a quarter of an hour
                options = {"folder": folder, "new": new, "stops": stops}
                many_minutes = size == "0.5b" or (size == "25m" and stops)  # of Tunix, a round
                names = [name for name in LABELS if not (many_minutes and name == "tunix")]
                found = in_turns("bench.rollout", names, options, rounds, size != "0.5b")
                report(size, case, found, peak)


def report(size: str, case: str, found: dict, peak: dict) -> None:
    rows = []
    for name, x in found.items():
        if "failure" in x:
            rows.append([LABELS[name], x["failure"], *[""] * 5])
            continue
        flops = sum(models.products(size, x["rate"], logits=x["rate"]).values())
        rows.append(
            [
                LABELS[name],
                f"{x['rate']:,.0f}",
                times(found, name),
                f"{x['tokens'] / PROMPTS / GROUP:.0f}",
                f"{100 * flops / peak['product']:.0f} %",
                f"{x['peak'] / 2**30:.2f}",
                f"{100 * x['spread']:.0f} %",
            ]
        )
    head = [f"{size}, {case}", "tokens/s", "ours is x times", "tokens a text", "of the matmul peak"]
    print(table([*head, "process peak, GiB", "spread"], rows), "\n", flush=True)


if __name__ == "__main__":
    command({"ours": ours, "transformers": transformers, "tunix": tunix}, main, ["tiny", "25m"])
