"""One step of stage 1 beside torch with the same losses: python -m bench.sft [SIZE ...] [--rounds=N]

Cross-entropy of the answers, InfoNCE and triplet margin over the same pairs, AdamW, float32. Ours packs rows and
recomputes all of a layer but its products; torch is transformers' decoder, its rows padded to the batch's longest, the
logits where they count, without recomputing. Both say their first loss, which must be the same. The share of the
matmul peak counts six operations per weight and token that is no padding.

Then the memory of one step of the 0.5B shape at 8 x 512 tokens, cross-entropy at every token, besides the weights: ours
as compiled, torch's from small ones (1 and 3 layers, 1 and 2 rows), for it grows with layers times rows.
"""

import pathlib
import subprocess
import sys
import time

from bench import models, peaks
from bench.turns import command, in_turns, memory, table, times

PAIRS = {"tiny": 64, "25m": 16, "0.5b": 2}
BATCHES = 2  # different ones, in turns
TEMPERATURE, MARGIN, TRIPLET, RATE = 0.05, 0.2, 0.1, 1e-5
LABELS = {"ours": "r3jax", "torch": "transformers + torch"}
ROWS, LENGTH = 8, 512


def pairs_of(it: models.Ours):
    """What makes a training row of a record of the bundled commands, whose thought is some documents' words."""
    from r3jax.data import beir
    from r3jax.stages.sft import Lengths, PairTransform

    data = beir.load(models.DATA)
    records = [
        {
            "query_row": data.query_row[query],
            "query": data.query_texts[data.query_row[query]],
            "positives": rows,
            "thought": " ".join(data.doc_texts[rows[0] : rows[0] + 4]),
        }
        for query, rows in list(data.positives("train").items())[:2000]
    ]
    return PairTransform(records, data, it.chat, Lengths(64, 64, 64), corrupt_thoughts=0.0, most_positives=8)


def host_batches(transform, pairs: int) -> list[dict]:
    from r3jax.data.stream import stream

    made = stream(transform.source, transform=transform, batch_size=pairs, seed=0)
    return [next(made) for _ in range(BATCHES)]


class Step:
    """Our step on batches of so many pairs; each shape's compiled program is kept to be looked at."""

    def __init__(self, folder: str, pairs: int):
        import jax

        from r3jax.stages import sft
        from r3jax.stages.state import new_state, optimiser

        it = models.ours(folder, remat="dots")
        jax.set_mesh(it.mesh)
        transform = pairs_of(it)
        tx = optimiser(learning_rate=RATE, warmup=0, steps=1000, weight_decay=0.01, clip_norm=1.0)
        self.stage = sft.SFT(
            source=transform.source,
            transform=transform,
            chat=it.chat,
            model=it.model,
            mesh=it.mesh,
            tx=tx,
            steps=1000,
            batch_size=pairs,
            chunks=1,
            seed=0,
            workers=0,
            weights=sft.Weights(ce=1.0, kl=0.0, infonce=1.0, triplet=TRIPLET),
            temperature=TEMPERATURE,
            margin=MARGIN,
        )
        self.mesh, self.state = it.mesh, new_state(it.params, tx, it.mesh, False)
        self.batches = host_batches(transform, pairs)
        self.programs: dict = {}

    def __call__(self, batch) -> float:
        """The loss."""
        import jax

        from r3jax.model.sharding import put_batch

        packed = put_batch(self.mesh, self.stage.packed(batch))
        shapes = str(jax.tree.map(lambda x: x.shape, packed))
        if shapes not in self.programs:
            self.programs[shapes] = self.stage.update.lower(self.state, packed).compile()
        self.state, metrics = self.programs[shapes](self.state, packed)
        return float(metrics["loss"])


def ours(folder: str, pairs: int):
    step = Step(folder, pairs)
    losses: list[float] = []

    def measure() -> dict:
        begin = time.perf_counter()
        losses.extend(map(step, step.batches))
        seconds = time.perf_counter() - begin
        temp = max(program.memory_analysis().temp_size_in_bytes for program in step.programs.values())
        return {"seconds": seconds, "tokens": tokens(step.batches), "first": losses[0], "temp": temp}

    measure()
    return measure


def torch(folder: str, pairs: int):
    import torch

    it = models.ours(folder)
    batches = host_batches(pairs_of(it), pairs)
    encode = it.chat.tokenizer.encode
    window = len(encode("assistant\n" + it.chat.prompts.direct_assistant)) - len(encode("assistant\n")) + 1
    model = models.theirs(folder).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []

    def read(rows, lengths):
        ids, lengths = torch.from_numpy(rows[:, : lengths.max()]).long(), torch.from_numpy(lengths).long()
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        states = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return ids, lengths, states, unit(states[torch.arange(len(ids)), lengths - 1])

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    def answers(ids, lengths, states, starts):
        """Sum of the cross-entropies of ids[starts : lengths], and their number."""
        at = torch.arange(ids.shape[1])[None]
        where = (at >= starts[:, None] - 1) & (at < lengths[:, None] - 1)
        targets = ids.roll(-1, 1)[where]  # a position predicts the next token
        return torch.nn.functional.cross_entropy(model.lm_head(states[where]), targets, reduction="sum"), len(targets)

    def step(batch):
        doc_rows = torch.from_numpy(batch["doc_rows"]).long().flatten()
        known = (torch.from_numpy(batch["known"]).long()[:, :, None] == doc_rows).any(1)
        own = torch.eye(len(known), dtype=torch.bool)
        docs = read(batch["docs"][:, 0], batch["doc_lengths"][:, 0])[3]
        total, count, infonce, triplet = 0.0, 0, 0.0, 0.0
        for name in ("direct", "reasoned"):
            ids, lengths, states, vectors = read(batch[name], batch[f"{name}_length"])
            starts = lengths - window if name == "direct" else torch.from_numpy(batch["reasoned_start"]).long()
            ce, number = answers(ids, lengths, states, starts)
            total, count = total + ce, count + number
            scores = vectors @ docs.T
            masked = (scores / TEMPERATURE).masked_fill(known & ~own, -torch.inf)
            infonce += 0.5 * torch.nn.functional.cross_entropy(masked, torch.arange(len(known)))
            nearest = docs[scores.detach().masked_fill(known | own, -torch.inf).argmax(1)]
            far, near = (vectors * nearest).sum(1), (vectors * docs).sum(1)
            triplet += 0.5 * torch.relu(far - near + MARGIN).mean()
        loss = total / count + infonce + TRIPLET * triplet
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss))

    def measure() -> dict:
        begin = time.perf_counter()
        for batch in batches:
            step(batch)
        return {"seconds": time.perf_counter() - begin, "tokens": tokens(batches), "first": losses[0]}

    measure()
    return measure


def tokens(batches) -> int:
    """Of all rows, without padding."""
    return sum(int(b[name].sum()) for b in batches for name in ("direct_length", "reasoned_length", "doc_lengths"))


def compiled() -> int:
    """Bytes that our step of the 0.5B shape holds besides weights and arguments, as XLA planned them."""
    import jax
    import jax.numpy as jnp

    from r3jax.losses import token_terms
    from r3jax.model import params
    from r3jax.model.qwen2 import hidden_states, unembedding
    from r3jax.model.sharding import make_mesh

    config, mesh = models.config("0.5b", remat="full"), make_mesh()

    def loss(weights, ids, lengths, targets):
        hidden = hidden_states(weights, config, ids, lengths)
        hidden, used = hidden.reshape(-1, config.width), targets >= 0
        return -token_terms(hidden, unembedding(weights, config), targets, used=used).logp.mean()

    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params.abstract(config, mesh))
    shapes = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((ROWS, LENGTH), (ROWS,), (ROWS * LENGTH,)))
    program = jax.jit(jax.value_and_grad(loss)).lower(weights, *shapes).compile()
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def touched(layers: int, rows: int) -> int:
    """Bytes that torch's step of the 0.5B shape, of so many layers and rows, held at most, besides its weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _, width, heads, kv_heads, _, ffn, vocab = models.SIZES["0.5b"]
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).train()
    ids = torch.zeros((rows, LENGTH), dtype=torch.long)
    model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.item()  # libraries are loaded now
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model(input_ids=ids, labels=ids).loss.backward()
    return memory("VmHWM") - before


def of_the_step() -> str:
    """Our memory and torch's, as a table."""

    def alone(*words) -> int:
        command = [sys.executable, "-m", "bench.sft", *map(str, words)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

    few, more = (1, 3), (1, 2)
    x = {(layers, rows): alone("touched", layers, rows) for layers in few for rows in more}
    per_row_layer = (x[3, 2] - x[3, 1] - x[1, 2] + x[1, 1]) / 2
    per_layer = (x[3, 1] - x[1, 1]) / 2 - per_row_layer  # their gradients
    per_row = x[1, 2] - x[1, 1] - per_row_layer  # logits
    rest = x[1, 1] - per_layer - per_row - per_row_layer
    theirs = rest + 24 * per_layer + ROWS * (per_row + 24 * per_row_layer)
    rows = [
        ["r3jax, compiled", f"{alone('compiled') / 2**30:.1f}"],
        ["torch, from small ones", f"{theirs / 2**30:.1f}"],
    ]
    return table(["0.5B shape, 8 x 512 tokens", "gradients and temporaries, GiB"], rows)


def main(sizes: list[str], rounds: int) -> None:
    peak = peaks.measure()
    print(peaks.sentence(peak), "\n")
    for size in sizes:
        with models.folder(size) as folder:
            found = in_turns(
                "bench.sft", list(LABELS), {"folder": folder, "pairs": PAIRS[size]}, rounds, size != "0.5b"
            )
        rows = []
        for name, x in found.items():
            if "failure" in x:
                rows.append([LABELS[name], x["failure"], *[""] * 6])
                continue
            rate = x["tokens"] / x["seconds"]
            rows.append(
                [
                    LABELS[name],
                    f"{rate:,.0f}",
                    times(found, name, "tokens"),
                    f"{100 * 6 * models.multiplied(size) * rate / peak['product']:.0f} %",
                    f"{x['first']:.4f}",
                    f"{x['temp'] / 2**30:.2f}" if "temp" in x else "",
                    f"{x['peak'] / 2**30:.2f}",
                    f"{100 * x['spread']:.0f} %",
                ]
            )
        head = [f"{size}, {PAIRS[size]} pairs", "tokens/s", "ours is x times", "of the matmul peak", "first loss"]
        print(table([*head, "compiled temp, GiB", "process peak, GiB", "spread"], rows), "\n", flush=True)
    print(of_the_step())


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["compiled"]:
        print(compiled())
    elif words[:1] == ["touched"]:
        print(touched(*map(int, words[1:])))
    else:
        command({"ours": ours, "torch": torch}, main, ["tiny", "25m"])
