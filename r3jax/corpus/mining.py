"""Hard negatives for training queries: what the model or BM25 finds, less what is likely to be relevant after all.

A candidate, whoever found it, is scored by the model, and dropped as a false negative where it scores above a share
`margin` of the best positive (as TopK-PercPos of NV-Retriever, Moreira et al. 2024, arXiv 2407.15831) or above an
absolute cosine. Judged positives, their copies and the query's own text are never negatives.

Axes: Q queries, N documents, D width.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from r3jax.data.beir import Dataset


@dataclasses.dataclass(frozen=True)
class Mined:
    """One query's negatives, and why other candidates are none."""

    query: int  # its row
    positives: list[int]  # rows of documents, best grade first
    negatives: list[int]  # hardest of each source first, sources in turns
    sources: list[str]  # who found each negative
    scores: dict[int, float]  # row → cosine, of positives and negatives
    dropped: int  # candidates dropped as false negatives


def mine(
    dataset: Dataset,
    split: str,
    queries: np.ndarray,
    documents: np.ndarray,
    candidates: Mapping[str, np.ndarray],
    *,
    count: int,
    margin: float,
    above: float | None,
) -> list[Mined]:
    """Up to `count` negatives of each query of a split, in the order of `dataset.positives`.

    Args:
      queries, documents: unit vectors [Q, D] of those queries and [N, D] of the corpus.
      candidates: {source: rows [Q, any]}, hardest first; -1 stands for none.
      margin: a negative scores at most `best - (1 - margin) * |best|`, best being the best positive's cosine.
      above: a cosine that no negative exceeds; None for no such bound.
    """
    found = []
    for i, (query, positives) in enumerate(dataset.positives(split).items()):
        row = dataset.query_row[query]
        best = float((documents[positives] @ queries[i]).max())
        limit = min(best - (1 - margin) * abs(best), np.inf if above is None else above)
        taken = {dataset.query_texts[row], *(dataset.doc_texts[p] for p in positives)}
        false = set()
        lists: dict[str, list[int]] = {}
        for source, rows in candidates.items():
            lists[source] = []
            for c in map(int, rows[i]):
                if c < 0 or c in positives or dataset.doc_ids[c] == query or dataset.doc_texts[c] in taken:
                    continue
                if float(documents[c] @ queries[i]) > limit:
                    false.add(c)
                else:
                    lists[source].append(c)
        negatives, sources = _in_turns(lists, dataset.doc_texts, count)
        kept = {r: float(documents[r] @ queries[i]) for r in (*positives, *negatives)}
        found.append(Mined(row, positives, negatives, sources, kept, len(false)))
    return found


def to_line(dataset: Dataset, mined: Mined) -> str:
    """A line in FlagEmbedding's form for training: query, pos, neg and their scores; ids and sources beside them."""

    def of(rows):
        return [dataset.doc_texts[r] for r in rows]

    line = {
        "query": dataset.query_texts[mined.query],
        "pos": of(mined.positives),
        "neg": of(mined.negatives),
        "pos_scores": [round(mined.scores[r], 6) for r in mined.positives],
        "neg_scores": [round(mined.scores[r], 6) for r in mined.negatives],
        "query_id": dataset.query_ids[mined.query],
        "pos_id": [dataset.doc_ids[r] for r in mined.positives],
        "neg_id": [dataset.doc_ids[r] for r in mined.negatives],
        "neg_source": mined.sources,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def summary(mined: list[Mined]) -> dict[str, int | dict[str, int]]:
    """Counts over all of them."""
    sources = Counter(source for m in mined for source in m.sources)
    return {
        "queries": len(mined),
        "negatives": sum(sources.values()),
        "by_source": dict(sources),
        "false_negatives": sum(m.dropped for m in mined),
        "without": sum(not m.negatives for m in mined),
    }


def sentence(counts: Mapping[str, Any]) -> str:
    """A `summary` for people."""
    by = ", ".join(f"{n:,} by {source}" for source, n in counts["by_source"].items())
    return (
        f"{counts['queries']:,} queries, {counts['negatives']:,} negatives ({by or 'none'}), "
        f"{counts['false_negatives']:,} candidates dropped as false negatives, "
        f"{counts['without']:,} queries without a negative left out"
    )


def _in_turns(lists: Mapping[str, list[int]], texts: list[str], count: int) -> tuple[list[int], list[str]]:
    """Up to `count` rows, no text twice, one of each source in turn; and the source of each."""
    rows: list[int] = []
    sources: list[str] = []
    seen: set[str] = set()
    iterators = {source: iter(found) for source, found in lists.items()}
    while iterators and len(rows) < count:
        for source in list(iterators):
            row = next((r for r in iterators[source] if texts[r] not in seen), None)
            if row is None:
                del iterators[source]
            elif len(rows) < count:
                seen.add(texts[row])
                rows.append(row)
                sources.append(source)
    return rows, sources
