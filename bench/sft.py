"""One step of stage 1 beside torch with the same losses: python -m bench.sft [SIZE ...] [--rounds=N]

Cross-entropy of the answers, InfoNCE and triplet margin over the same pairs, AdamW, float32. Ours packs rows and
recomputes all of a layer but its products; torch is transformers' decoder, its rows padded to the batch's longest, the
logits where they count, without recomputing, not compiled. Both say their first loss, which must be the same.
Tokens per second are those of the rows, whoever computes them once or more often. The share of the matmul peak counts
six operations per weight and token computed, the unembedding's where an answer counts: no padding, no attention scores,
nothing computed again, and ours has the rows' common beginning once a batch.
"""

import time

from bench import models, peaks
from bench.turns import command, in_turns, table, times

PAIRS = {"tiny": 64, "25m": 16, "0.5b": 4, "1.5b": 128}
BATCHES = 2  # different ones, in turns
TEMPERATURE, MARGIN, TRIPLET, RATE = 0.05, 0.2, 0.1, 1e-5
LABELS = {"ours": "r3jax", "torch": "transformers + torch"}


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


def window_of(chat) -> int:
    """Tokens of a direct query's answer."""
    encode = chat.tokenizer.encode
    return len(encode("assistant\n" + chat.prompts.direct_assistant)) - len(encode("assistant\n")) + 1


def answers(batch, chat) -> int:
    """Tokens whose logits count."""
    thoughts = (batch["reasoned_length"] - batch["reasoned_start"])[batch["gold"]].sum()
    return len(batch["gold"]) * window_of(chat) + int(thoughts)


def host_batches(transform, pairs: int) -> list[dict]:
    from r3jax.data.stream import stream

    made = stream(transform.source, transform=transform, batch_size=pairs, seed=0)
    return [next(made) for _ in range(BATCHES)]


class Step:
    """Our step on batches of so many pairs; each shape's compiled program is kept to be looked at. `changes` as of
    `models.ours`."""

    def __init__(self, folder: str, pairs: int, **changes):
        import jax

        from r3jax.stages import sft
        from r3jax.stages.state import new_state, optimiser

        it = models.ours(folder, remat="dots", **changes)
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
        self.chat, self.mesh, self.state = it.chat, it.mesh, new_state(it.params, tx, it.mesh, False)
        self.batches = host_batches(transform, pairs)
        self.programs: dict = {}

    def computed(self, batch) -> int:
        """Tokens that the step computes, without padding."""
        packed = self.stage.packed(batch)
        return sum(packed[name].computed() for name in ("query_packs", "doc_packs"))

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


def ours(folder: str, pairs: int, **changes):
    step = Step(folder, pairs, **changes)
    losses: list[float] = []
    computed = sum(map(step.computed, step.batches))
    predicted = sum(answers(batch, step.chat) for batch in step.batches)

    def measure() -> dict:
        begin = time.perf_counter()
        losses.extend(map(step, step.batches))
        seconds = time.perf_counter() - begin
        temp = max(program.memory_analysis().temp_size_in_bytes for program in step.programs.values())
        found = {"tokens": tokens(step.batches), "computed": computed, "answers": predicted}
        return {"seconds": seconds, "first": losses[0], "temp": temp} | found

    measure()
    return measure


def torch(folder: str, pairs: int, dtype: str = "float32", device: str = "cpu"):
    import torch

    torch.set_default_device(device)

    it = models.ours(folder)
    batches = host_batches(pairs_of(it), pairs)
    window = window_of(it.chat)
    model = models.theirs(folder, dtype, device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []

    def read(rows, lengths):
        ids, lengths = whole(rows[:, : lengths.max()]), whole(lengths)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        states = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return ids, lengths, states, unit(states[torch.arange(len(ids)), lengths - 1])

    def whole(x):
        return torch.from_numpy(x).long().to(device)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    def cross_entropy(ids, lengths, states, starts):
        """Sum of the cross-entropies of ids[starts : lengths], and their number."""
        at = torch.arange(ids.shape[1])[None]
        where = (at >= starts[:, None] - 1) & (at < lengths[:, None] - 1)
        targets = ids.roll(-1, 1)[where]  # a position predicts the next token
        return torch.nn.functional.cross_entropy(model.lm_head(states[where]), targets, reduction="sum"), len(targets)

    def step(batch):
        doc_rows = whole(batch["doc_rows"]).flatten()
        known = (whole(batch["known"])[:, :, None] == doc_rows).any(1)
        own = torch.eye(len(known), dtype=torch.bool)
        docs = read(batch["docs"][:, 0], batch["doc_lengths"][:, 0])[3]
        total, count, infonce, triplet = 0.0, 0, 0.0, 0.0
        for name in ("direct", "reasoned"):
            ids, lengths, states, vectors = read(batch[name], batch[f"{name}_length"])
            starts = lengths - window if name == "direct" else whole(batch["reasoned_start"])
            ce, number = cross_entropy(ids, lengths, states, starts)
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
        losses.append(float(loss.detach()))

    def measure() -> dict:
        begin = time.perf_counter()
        for batch in batches:
            step(batch)
        seconds, count = time.perf_counter() - begin, tokens(batches)
        predicted = sum(answers(batch, it.chat) for batch in batches)
        return {"seconds": seconds, "first": losses[0], "tokens": count, "computed": count, "answers": predicted}

    measure()
    return measure


def tokens(batches) -> int:
    """Of all rows, without padding."""
    return sum(int(b[name].sum()) for b in batches for name in ("direct_length", "reasoned_length", "doc_lengths"))


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
                rows.append([LABELS[name], x["failure"], *[""] * 7])
                continue
            flops = 3 * sum(models.products(size, x["computed"], logits=x["answers"]).values()) / x["seconds"]
            rows.append(
                [
                    LABELS[name],
                    f"{x['rate']:,.0f}",
                    times(found, name),
                    f"{100 * x['computed'] / x['tokens']:.0f} %",
                    f"{100 * flops / peak['product']:.0f} %",
                    f"{x['first']:.4f}",
                    f"{x['temp'] / 2**30:.2f}" if "temp" in x else "",
                    f"{x['peak'] / 2**30:.2f}",
                    f"{100 * x['spread']:.0f} %",
                ]
            )
        head = [f"{size}, {PAIRS[size]} pairs", "tokens/s", "ours is x times", "of them computed", "of the matmul peak"]
        print(table([*head, "first loss", "compiled temp, GiB", "process peak, GiB", "spread"], rows), "\n", flush=True)


if __name__ == "__main__":
    command({"ours": ours, "torch": torch}, main, ["tiny", "25m"])
