"""A model under conditions: how well it retrieves without reasoning, with its own, with none, with another's.

Conditions of one model: `direct` (fixed answer), `reasoning` (its own greedy thought), and the controls
`empty` (the reasoning prompt, no thought), `shuffled` (the thought it wrote for the next query) and `copied` (the
query itself as the thought). `averaged` spends more on thinking: the mean of the vectors of several sampled thoughts
(self-consistency, Wang et al. 2022, for vectors), so that no single wrong term decides. `budget_N` gives the greedy
thought N tokens at most; where it has not ended by then, the direct answer follows.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r3jax.data.beir import Dataset
from r3jax.evaluation import metrics
from r3jax.evaluation.bm25 import BM25
from r3jax.reader import Reader
from r3jax.search.sharded import Index

DEPTH = 100  # documents returned per query
MODEL_CONDITIONS = ("direct", "reasoning", "averaged", "empty", "shuffled", "copied")
BUDGET = "budget_"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One condition on one split."""

    run: Mapping[str, Mapping[str, float]]  # query id -> document id -> score
    per_query: dict[str, dict[str, float]]  # metric -> query id -> value
    summary: dict[str, Any]  # as results.json holds it
    thoughts: list[str] | None = None
    emitted: np.ndarray | None = None


def queries_of(dataset: Dataset, split: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a split's queries that have a relevant document."""
    ids = list(dataset.positives(split))
    return ids, [dataset.query_texts[dataset.query_row[q]] for q in ids]


def bm25(dataset: Dataset, split: str, searcher: BM25 | None = None) -> Measured:
    """The lexical baseline."""
    ids, texts = queries_of(dataset, split)
    searcher = searcher or BM25(dataset.doc_ids, dataset.doc_texts)
    start = time.perf_counter()
    rows, scores = searcher.search(texts, min(DEPTH, len(dataset.doc_ids)))
    return _measure(dataset, split, ids, rows, scores, time.perf_counter() - start)


def evaluate(
    reader: Reader,
    params,
    dataset: Dataset,
    split: str,
    index: Index,
    conditions: Sequence[str] = MODEL_CONDITIONS,
) -> dict[str, Measured]:
    """The model's conditions on one split, searched exactly in `index` (this model's document vectors)."""
    ids, texts = queries_of(dataset, split)
    found, reasoned, averaged, thinking = {}, None, None, 0.0
    if set(conditions) & {"reasoning", "shuffled"}:
        start = time.perf_counter()
        reasoned = reader.reason(params, texts)
        thinking = time.perf_counter() - start
    for name in conditions:
        start = time.perf_counter()
        seconds, thoughts = 0.0, None
        if name == "direct":
            vectors = reader.direct(params, texts)
        elif name == "reasoning":
            vectors, thoughts, seconds = reasoned.vectors, reasoned.thoughts, thinking
        elif name == "averaged":
            averaged = reader.reason(params, texts, reader.thoughts)
            vectors = averaged.vectors
        elif name.startswith(BUDGET):
            short = dataclasses.replace(reader, max_new=int(name.removeprefix(BUDGET)) + 1)
            limited = short.reason(params, texts)
            vectors = limited.vectors
        elif name == "empty":
            vectors = reader.with_thoughts(params, texts, [[]] * len(texts))
        elif name == "shuffled":
            others = reasoned.thoughts[1:] + reasoned.thoughts[:1]
            vectors = reader.with_thoughts(params, texts, others)
        elif name == "copied":
            copies = [row[: reader.max_new - 1] for row in reader.chat.tokenizer.encode_batch(texts)]
            vectors = reader.with_thoughts(params, texts, copies)
        else:
            raise ValueError(f"conditions must be among {', '.join(MODEL_CONDITIONS)}, not {name!r}")
        rows, scores = index.search(vectors, min(DEPTH, len(index)))
        seconds += time.perf_counter() - start
        measured = _measure(dataset, split, ids, rows, scores, seconds)
        if name in ("reasoning", "averaged") or name.startswith(BUDGET):
            own = {"reasoning": reasoned, "averaged": averaged}.get(name) or limited
            measured.summary["thought_tokens"] = float(own.tokens.mean())
            measured.summary["token_rate"] = float(own.emitted.mean())
        if thoughts is not None:
            decoded = [reader.chat.tokenizer.decode(t) for t in thoughts]
            measured = dataclasses.replace(measured, thoughts=decoded, emitted=reasoned.emitted)
        found[name] = measured
    return found


def examples(dataset: Dataset, split: str, found: dict[str, Measured], count: int, hits: int = 5) -> list[dict]:
    """The first `count` queries with their thought, and the top hits with and without it: for the page."""
    reasoned, direct = found["reasoning"], found["direct"]
    cards = []
    for i, query in enumerate(list(reasoned.run)[:count]):
        relevant = {d for d, grade in dataset.qrels[split][query].items() if grade > 0}

        def top(measured, query=query, relevant=relevant):
            return [
                {
                    "doc_id": d,
                    "text": dataset.doc_texts[dataset.doc_row[d]],
                    "score": float(measured.run[query][d]),
                    "relevant": d in relevant,
                }
                for d in metrics.rank(measured.run[query], hits)
            ]

        cards.append(
            {
                "split": split,
                "query_id": query,
                "query": dataset.query_texts[dataset.query_row[query]],
                "thought": reasoned.thoughts[i],
                "emitted": bool(reasoned.emitted[i] == 1),
                "relevant": [{"doc_id": d, "text": dataset.doc_texts[dataset.doc_row[d]]} for d in sorted(relevant)],
                "hits_with": top(reasoned),
                "hits_without": top(direct),
                "ndcg_with": reasoned.per_query["ndcg@10"][query],
                "ndcg_without": direct.per_query["ndcg@10"][query],
            }
        )
    return cards


def _measure(dataset: Dataset, split: str, ids, rows, scores, seconds: float) -> Measured:
    run = metrics.as_run(ids, dataset.doc_ids, rows, scores)
    judged = {q: dataset.qrels[split][q] for q in ids}
    per_query = metrics.per_query(run, judged)
    summary = metrics.mean(per_query) | {
        "queries": len(ids),
        "unanswered": metrics.unanswered(run, judged),
        "ms_per_query": 1000 * seconds / len(ids),
        "thought_tokens": None,
        "token_rate": None,
    }
    return Measured(run, per_query, summary)
