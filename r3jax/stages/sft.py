"""Stage 1, supervised: cross-entropy of the answer format, KL to the frozen start, InfoNCE and triplet margin.

Each query is read twice, without reasoning (the fixed answer) and with a supervised thought; both vectors are
drawn to the query's document. Source: Search-R3 (arXiv 2510.07048) names the four terms; weights, temperature
and margin are ours.

Axes: B queries, H hard negatives per query, L length, D width, M = B (1 + H) documents, P relevant documents.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from r3jax.data.beir import Dataset
from r3jax.data.stream import stream
from r3jax.losses import info_nce, triplet_margin
from r3jax.model.lora import join
from r3jax.model.packing import last_vectors, pack, pack_length, packed_states, pick
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import BATCH, batch_parts, batch_share, out, place, put_batch
from r3jax.processes import gather
from r3jax.stages.state import TrainState, apply, value_and_grad
from r3jax.stages.tokens import answer_terms, answer_window, fill
from r3jax.text.prompts import ChatFormat


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weight of each loss term; a term of weight 0 is not computed."""

    ce: float
    kl: float
    infonce: float
    triplet: float


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Longest texts, in tokens of the text alone."""

    query: int
    document: int
    thought: int


class PairTransform:
    """A training record as rows of ids: direct query, query with thought, document, hard negatives."""

    def __init__(
        self,
        source,
        dataset: Dataset,
        chat: ChatFormat,
        lengths: Lengths,
        corrupt_thoughts: float,
        pseudo_queries: float = 0.0,
        think: Callable[[str, str], str] | None = None,
        negatives: np.ndarray | None = None,
        most_positives: int = 1,
    ):
        self.source, self.chat, self.lengths = source, chat, lengths
        self.most_positives = most_positives  # of any query: all are masked out of the negatives
        self.documents = dataset.doc_texts
        self.corrupt = corrupt_thoughts
        self.pseudo, self.think = pseudo_queries, think
        self.negatives = negatives  # rows [N, H'], -1 where there are fewer: documents like document i

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        n, chat, query_row = self.lengths, self.chat, record["query_row"]
        if rng.random() < self.pseudo:
            record = self._pseudo(rng)
        positives = record["positives"]
        positive = positives[rng.integers(len(positives))]
        thought, gold = record["thought"], bool(record["thought"])
        if gold and rng.random() < self.corrupt:
            # Thoughts the model will write itself are often wrong: let the vector see such ones too.
            thought = self.source[int(rng.integers(len(self.source)))]["thought"]
            gold = False
        direct = chat.direct_query(record["query"], n.query)
        prompt = chat.reasoning_prompt(record["query"], n.query)
        reasoned = chat.reasoning(record["query"], thought, n.query, n.thought)
        docs = [positive, *self._hard(positive, positives, rng)]
        rows = [chat.document(self.documents[d], n.document) for d in docs]
        doc_length = chat.direct_extra + n.document
        known = fill(positives, self.most_positives, -1)
        return {
            "query_row": np.array(query_row, np.int32),
            "direct": fill(direct, chat.direct_extra + n.query),
            "direct_length": np.array(len(direct), np.int32),
            "reasoned": fill(reasoned, chat.reasoning_extra + n.query + n.thought + 1),
            "reasoned_start": np.array(len(prompt), np.int32),
            "reasoned_length": np.array(len(reasoned), np.int32),
            "gold": np.array(gold),
            "docs": np.stack([fill(r, doc_length) for r in rows]),
            "doc_lengths": np.array([len(r) for r in rows], np.int32),
            "doc_rows": np.array(docs, np.int32),
            "known": known,
        }

    def _pseudo(self, rng: np.random.Generator) -> dict:
        """Some words of a random document as its query (inverse cloze task, Lee et al. 2019).

        It teaches which words matter in documents that no training query asks for.
        """
        row = int(rng.integers(len(self.documents)))
        words = np.array(self.documents[row].split())
        kept = rng.random(len(words)) < rng.uniform(0.3, 0.8)
        kept[rng.integers(len(words))] = True
        query = " ".join(words[kept])
        thought = self.think(query, self.documents[row]) if self.think else ""
        return {"query": query, "positives": [row], "thought": thought}

    def _hard(self, positive: int, positives: list[int], rng: np.random.Generator) -> list[int]:
        if self.negatives is None:
            return []
        near = [int(d) for d in self.negatives[positive] if d >= 0 and d not in positives]
        return [near[rng.integers(len(near))] if near else int(rng.integers(len(self.documents)))]


class SFT:
    """The supervised stage: see `r3jax.stages.state.Stage`."""

    name = "sft"

    def __init__(
        self,
        *,
        source,
        transform: PairTransform,
        chat: ChatFormat,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        tx: optax.GradientTransformation,
        steps: int,
        batch_size: int,
        chunks: int,
        seed: int,
        workers: int,
        weights: Weights,
        temperature: float,
        margin: float,
    ):
        self.steps, self.mesh = steps, mesh
        self._share = batch_share(mesh)
        self._consumed = np.zeros(0, np.int32)
        self._stream = stream(
            source,
            transform=transform,
            batch_size=batch_size,
            seed=seed,
            process_index=self._share[0],
            process_count=self._share[1],
            workers=workers,
        )
        lengths = transform.lengths
        answer = len(chat.tokenizer.encode("assistant\n" + chat.prompts.direct_assistant)) - len(
            chat.tokenizer.encode("assistant\n")
        )
        direct = chat.direct_extra + max(lengths.query, lengths.document)
        self._chunks = chunks
        # Instructions that all rows have in common are computed once; splash cannot.
        shared = model.attention != "splash"
        self._heads = chat.heads if shared else ((), ())
        reasoned = chat.reasoning_extra + lengths.query + lengths.thought + 1
        direct, reasoned = (n - len(head) for n, head in zip((direct, reasoned), self._heads, strict=True))
        self._doc_pack, self._query_pack = pack_length(direct), pack_length(max(direct, reasoned))
        self.update = jax.jit(
            partial(
                update,
                model=model,
                tx=tx,
                chunks=chunks,
                weights=weights,
                temperature=temperature,
                margin=margin,
                direct_window=answer + 1,
                thought_window=lengths.thought + 1,
                seed=seed,
            ),
            donate_argnums=0,
        )

    def next_batch(self, state: TrainState, step: int):
        batch = next(self._stream)
        self._consumed = batch.pop("query_row")
        tokens = sum(int(batch[name].sum()) for name in ("direct_length", "reasoned_length", "doc_lengths"))
        return put_batch(self.mesh, self.packed(batch)), {"tokens": tokens * self._share[1]}

    def packed(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """A host batch, with its rows in packs too."""
        shards = batch_parts(self.mesh) // self._share[1]
        to_packs = partial(pack, shards=shards, chunks=self._chunks)
        names = ("direct", "reasoned")
        kinds = [(batch[name], batch[f"{name}_length"]) for name in names]
        queries, begins = to_packs(kinds, length=self._query_pack, heads=self._heads)
        batch = batch | {f"{name}_begin": begin for name, begin in zip(names, begins, strict=True)}
        kinds = [(batch["docs"][:, i], batch["doc_lengths"][:, i]) for i in range(batch["docs"].shape[1])]
        docs, begins = to_packs(kinds, length=self._doc_pack, heads=self._heads[:1] * len(kinds))
        return batch | {"doc_begins": np.stack(begins, 1), "query_packs": queries, "doc_packs": docs}

    def consumed(self) -> list[int]:
        index, count = self._share
        whole = np.empty(len(self._consumed) * count, np.int32)
        for share, *rows in gather(np.append(np.int32(index), self._consumed)):
            whole[share::count] = rows  # as the stream deals them out
        return whole.tolist()

    def samples(self) -> list[dict]:
        return []

    def host_state(self) -> dict:
        return {}

    def stream_state(self):
        return self._stream.get_state()

    def resume(self, host_state: dict, stream_state) -> None:
        self._stream.set_state(stream_state)

    def close(self) -> None:
        self._stream.close()


def encode(
    params, part, *, model: ModelConfig, reference, weights: Weights, direct_window, thought_window, dropout=None
):
    """Everything the loss needs of some queries, row by row: unit vectors and sums over answer tokens.

    `dropout` is the random key of an adapter's dropout; None for none.
    """
    count, per_query = part["doc_lengths"].shape

    def read(weights, packs, i: int | None):
        key = None if dropout is None or i is None else jax.random.fold_in(dropout, i)
        return packed_states(weights, model, packs, key)

    begins, lengths = (
        jnp.reshape(part[name], (count * per_query,), out_sharding=out(P(BATCH)))
        for name in ("doc_begins", "doc_lengths")
    )
    docs = last_vectors(read(params, part["doc_packs"], 0), begins, lengths)
    rows = {"docs": jnp.reshape(docs, (count, per_query, -1), out_sharding=out(P(BATCH, None, None)))}
    rows |= {name: place(jnp.zeros(count), P(BATCH)) for name in ("ce", "kl", "answer_tokens")}
    states = read(params, part["query_packs"], 1)
    ref_states = read(reference, part["query_packs"], None) if weights.kl else None
    direct_start = part["direct_length"] - direct_window
    for name, start, window, counts in (
        ("direct", direct_start, direct_window, None),
        ("reasoned", part["reasoned_start"], thought_window, part["gold"]),
    ):
        begin, ends = part[f"{name}_begin"], part[f"{name}_length"]
        rows[name] = last_vectors(states, begin, ends)
        if not (weights.ce or weights.kl):
            continue
        positions, targets, mask = answer_window(part[name], start, ends, window)
        if counts is not None:
            mask = mask & counts[:, None]
        places = place(jnp.where(mask, begin[:, None] + positions, 0), P(BATCH, None))
        ref = (reference, pick(ref_states, places)) if weights.kl else None
        terms = answer_terms(params, model, pick(states, places), targets, mask, ref=ref)
        rows["ce"] += jnp.where(mask, -terms.logp, 0.0).sum(1)
        rows["kl"] += jnp.where(mask, terms.kl, 0.0).sum(1)
        rows["answer_tokens"] += mask.sum(1).astype(jnp.float32)
    return rows


def loss(rows, batch, *, weights: Weights, temperature: float, margin: float):
    """The weighted sum of the four terms over the global batch, and each term by itself."""
    count, per_query, width = rows["docs"].shape
    total_docs = count * per_query
    docs = jnp.reshape(rows["docs"], (total_docs, width), out_sharding=out(P(BATCH, None)))
    doc_rows = jnp.reshape(batch["doc_rows"], (total_docs,), out_sharding=out(P(BATCH)))
    doc_rows = place(doc_rows, P(None))
    known = (batch["known"][:, :, None] == doc_rows[None, None, :]).any(1)
    positive = place(jnp.arange(count) * per_query, P(BATCH))
    terms: dict[str, Any] = {}
    if weights.infonce:
        pull = partial(info_nce, docs=docs, positive=positive, false_negatives=known, temperature=temperature)
        terms["infonce_direct"] = pull(rows["direct"])
        terms["infonce_reasoned"] = pull(rows["reasoned"])
        terms["infonce"] = 0.5 * (terms["infonce_direct"] + terms["infonce_reasoned"])
    if weights.triplet:
        terms["triplet"] = 0.5 * sum(
            triplet_margin(rows[name], rows["docs"][:, 0], hardest(rows[name], docs, known, positive), margin)
            for name in ("direct", "reasoned")
        )
    tokens = jnp.maximum(rows["answer_tokens"].sum(), 1)
    if weights.ce:
        terms["ce"] = rows["ce"].sum() / tokens
    if weights.kl:
        terms["kl"] = rows["kl"].sum() / tokens
    total = sum(w * terms[name] for name, w in dataclasses.asdict(weights).items() if w)
    return total, {"loss": total} | {f"loss/{name}": value for name, value in terms.items()}


def hardest(query, docs, known, positive):
    """The nearest document of the batch that is not known to be relevant, for each query [B, D]."""
    everything = place(docs, P(None, None))
    scores = jnp.einsum("bd,md->bm", jax.lax.stop_gradient(query), jax.lax.stop_gradient(everything))
    own = jnp.arange(docs.shape[0])[None, :] == positive[:, None]
    nearest = jnp.where(known | own, -jnp.inf, scores).argmax(1)
    return everything.at[nearest].get(out_sharding=out(P(BATCH, None)))


def update(
    state: TrainState,
    batch,
    *,
    model: ModelConfig,
    tx,
    chunks: int,
    weights: Weights,
    temperature: float,
    margin: float,
    direct_window: int,
    thought_window: int,
    seed: int,
):
    """One optimiser step on one batch: pure, jitted by `SFT`. `seed` is of an adapter's dropout."""
    drops = model.lora is not None and model.lora.dropout > 0
    if drops:
        batch = batch | {"row": place(jnp.arange(batch["gold"].shape[0]), P(BATCH))}

    def encode_rows(trained, part):
        key = None
        if drops:
            # Its first row tells a chunk of the batch from the others; both passes of gradient caching drop the same.
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), part["row"].min())
        return encode(
            join(state.reference, trained),
            part,
            model=model,
            reference=state.reference,
            weights=weights,
            direct_window=direct_window,
            thought_window=thought_window,
            dropout=key,
        )

    global_loss = partial(loss, batch=batch, weights=weights, temperature=temperature, margin=margin)
    (_, metrics), gradient = value_and_grad(encode_rows, global_loss, state.params, batch, chunks)
    state, norms = apply(tx, state, gradient, metrics["loss"])
    return state, metrics | norms
