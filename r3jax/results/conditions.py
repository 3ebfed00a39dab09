"""A model under conditions: how well it retrieves without reasoning, with its own, with none, with another's.

Conditions of one model: `direct` (fixed answer), `reasoning` (its own greedy thought), and the controls
`empty` (the reasoning prompt, no thought), `shuffled` (the thought it wrote for the next query) and `copied` (the
query itself as the thought). `averaged` spends more on thinking: the mean of the vectors of several sampled thoughts
(self-consistency, Wang et al. 2022, for vectors), so that no single wrong term decides. `budget_N` gives the greedy
thought N tokens at most; where it has not ended by then, the direct answer follows.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from r3jax.data.beir import Dataset
from r3jax.evaluation import metrics
from r3jax.evaluation.bm25 import BM25
from r3jax.reader import Reader
from r3jax.run.progress import progress
from r3jax.search.sharded import Index

DEPTH = 100  # documents returned per query
MODEL_CONDITIONS = ("direct", "reasoning", "averaged", "empty", "shuffled", "copied")
BUDGET = "budget_"
COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One condition on one split."""

    run: Mapping[str, Mapping[str, float]]  # query id -> document id -> score
    per_query: dict[str, dict[str, float]]  # metric -> query id -> value
    summary: dict[str, Any]  # as results.json holds it
    thoughts: list[str] | None = None  # in the order of the run, where each query has one of its own
    emitted: np.ndarray | None = None  # [Q] bool; whether the thought ended in time


@dataclasses.dataclass
class Stopwatch:
    """Seconds of work: XLA's compilations, which only the first queries of a process wait for, are left out."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time spent inside."""
        compiled = 0.0

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            nonlocal compiled
            compiled += duration_secs if event == COMPILATION else 0.0

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = time.perf_counter()
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            self.seconds += time.perf_counter() - start - compiled


def queries_of(dataset: Dataset, split: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a split's queries that have a relevant document."""
    ids = list(dataset.positives(split))
    return ids, [dataset.query_texts[dataset.query_row[q]] for q in ids]


def bm25(dataset: Dataset, split: str, searcher: BM25 | None = None) -> Measured:
    """The lexical baseline."""
    ids, texts = queries_of(dataset, split)
    searcher = searcher or BM25(dataset.doc_ids, dataset.doc_texts)
    watch = Stopwatch()
    with watch.running():
        rows, scores = searcher.search(texts, min(DEPTH, len(dataset.doc_ids)))
    return _measure(dataset, split, ids, rows, scores, watch.seconds)


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
    found, reasoned, thought = {}, None, Stopwatch()
    if set(conditions) & {"reasoning", "shuffled"}:
        with progress(f"{split}: thinking", len(texts)) as on_rows, thought.running():
            reasoned = reader.reason(params, texts, on_rows=on_rows)
    for name in conditions:
        watch, own = Stopwatch(), None
        with progress(f"{split}: {name}", len(texts)) as on_rows, watch.running():
            if name == "direct":
                vectors = reader.direct(params, texts, on_rows)
            elif name == "reasoning":
                own = reasoned
                watch.seconds += thought.seconds
            elif name == "averaged":
                own = reader.reason(params, texts, reader.thoughts, on_rows)
            elif name.startswith(BUDGET):
                short = dataclasses.replace(reader, max_new=int(name.removeprefix(BUDGET)) + 1)
                own = short.reason(params, texts, on_rows=on_rows)
            elif name == "empty":
                vectors = reader.with_thoughts(params, texts, [[]] * len(texts), on_rows)
            elif name == "shuffled":
                half = len(texts) // 2  # neighbours in a file often ask for the same document
                others = reasoned.thoughts[half:] + reasoned.thoughts[:half]
                vectors = reader.with_thoughts(params, texts, others, on_rows)
            elif name == "copied":
                copies = [row[: reader.max_new - 1] for row in reader.chat.tokenizer.encode_batch(texts)]
                vectors = reader.with_thoughts(params, texts, copies, on_rows)
            else:
                raise ValueError(f"conditions must be among {', '.join(MODEL_CONDITIONS)}, not {name!r}")
            rows, scores = index.search(vectors if own is None else own.vectors, min(DEPTH, len(index)))
        measured = _measure(dataset, split, ids, rows, scores, watch.seconds)
        if own is not None:
            measured.summary["thought_tokens"] = float(own.tokens.mean())
            measured.summary["token_rate"] = float(own.emitted.mean())
            if name != "averaged":  # of several thoughts none is the one
                decoded = [reader.chat.tokenizer.decode(t) for t in own.thoughts]
                measured = dataclasses.replace(measured, thoughts=decoded, emitted=own.emitted == 1)
        found[name] = measured
    return found


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
