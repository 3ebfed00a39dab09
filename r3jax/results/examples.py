"""What the pages show of a query: its thought, the hits with and without it, and where the right answers stand.

Made while a run is measured, or afterwards from what an evaluation has left: TREC runs and judgements in ``trec/``, and
``thoughts/SPLIT.CONDITION.jsonl``, {"query_id", "text", "emitted"}, one query a line.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from r3jax.data.beir import Dataset
from r3jax.evaluation import metrics
from r3jax.evaluation.metrics import Run
from r3jax.results.conditions import Measured

Thoughts = Mapping[str, tuple[str, bool]]  # query id -> text, whether it ended in time


def thoughts_of(measured: Measured) -> dict[str, tuple[str, bool]]:
    """The thoughts of a condition that has its own."""
    pairs = zip(measured.thoughts, measured.emitted.tolist(), strict=True)
    return dict(zip(measured.run, pairs, strict=True))


def write_thoughts(path: pathlib.Path, thoughts: Thoughts) -> None:
    """Writes them, and makes the folder."""
    path.parent.mkdir(exist_ok=True)
    lines = ({"query_id": query, "text": text, "emitted": ended} for query, (text, ended) in thoughts.items())
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_thoughts(path: pathlib.Path) -> dict[str, tuple[str, bool]]:
    """What `write_thoughts` wrote; ValueError, LookupError or TypeError where something else lies there."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["query_id"]: (line["text"], line["emitted"]) for line in lines}


def examples(
    dataset: Dataset,
    split: str,
    thoughts: Thoughts,
    reasoned: Run,
    direct: Run,
    count: int | None = None,
    hits: int = 5,
) -> list[dict[str, Any]]:
    """The first `count` queries (or all) that were thought about, and the top hits of two runs: for the pages.

    A hit has its grade (None: nobody judged it) and its `other_place` in the other run, from 1, None if not there.
    """
    cards = []
    for query in list(thoughts)[:count]:
        judged = dataset.qrels[split][query]
        ranks = [metrics.rank(run.get(query, {})) for run in (reasoned, direct)]
        places = [{doc: place for place, doc in enumerate(ranked, 1)} for ranked in ranks]
        relevant = sorted((doc for doc, grade in judged.items() if grade > 0), key=lambda doc: (-judged[doc], doc))
        scores = [metrics.per_query(run, {query: judged}, ["ndcg@10"])["ndcg@10"][query] for run in (reasoned, direct)]

        def top(side: int, run: Run, query=query, judged=judged, ranks=ranks, places=places) -> list[dict[str, Any]]:
            return [
                {
                    "doc_id": doc,
                    "text": dataset.doc_texts[dataset.doc_row[doc]],
                    "score": float(run[query][doc]),
                    "grade": judged.get(doc),
                    "other_place": places[1 - side].get(doc),
                }
                for doc in ranks[side][:hits]
            ]

        cards.append(
            {
                "split": split,
                "query_id": query,
                "query": dataset.query_texts[dataset.query_row[query]],
                "thought": thoughts[query][0],
                "emitted": thoughts[query][1],
                "relevant": [
                    {
                        "doc_id": doc,
                        "text": dataset.doc_texts[dataset.doc_row[doc]],
                        "place_with": places[0].get(doc),
                        "place_without": places[1].get(doc),
                    }
                    for doc in relevant
                ],
                "hits_with": top(0, reasoned),
                "hits_without": top(1, direct),
                "ndcg_with": scores[0],
                "ndcg_without": scores[1],
            }
        )
    return cards
