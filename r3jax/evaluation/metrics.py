"""Ranking metrics in plain numpy, equal to trec_eval (pytrec_eval) to the last digits.

A *run* is ``{query_id: {doc_id: score}}``, *qrels* are ``{query_id: {doc_id: grade}}``; a grade >= 1 is
relevant, and a grade below 0 gains nothing. Ties as in trec_eval: scores are compared as float32, and equal
scores are ordered by descending document id.
Definitions: nDCG with linear gains, Järvelin & Kekäläinen 2002, as in trec_eval's ``ndcg_cut``; recall and
the reciprocal rank of the first relevant document as in its ``recall`` and ``recip_rank``.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

DEFAULT_METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


def as_run(query_ids: Sequence[str], doc_ids: Sequence[str], rows: np.ndarray, scores: np.ndarray) -> Run:
    """Turns what a search returns into a run.

    Args:
      query_ids: Q ids.
      doc_ids: N ids; ``rows`` points into them.
      rows: int [Q, k]; a negative row means "nothing returned here".
      scores: float [Q, k].

    Raises:
      ValueError: if the shapes do not fit together, or a query id occurs twice.
    """
    if rows.shape != scores.shape or len(rows) != len(query_ids):
        raise ValueError(f"rows {rows.shape}, scores {scores.shape} and {len(query_ids)} query_ids do not fit")
    if len(set(query_ids)) != len(query_ids):
        raise ValueError("query_ids holds an id twice")
    return {
        query_id: {doc_ids[r]: s for r, s in zip(row, score, strict=True) if r >= 0}
        for query_id, row, score in zip(query_ids, rows.tolist(), scores.tolist(), strict=True)
    }


def rank(scored: Mapping[str, float], k: int | None = None) -> list[str]:
    """Document ids of one query, best first, at most ``k`` of them, ties as in trec_eval.

    Raises:
      ValueError: if a score is not a number; there is no rank for it.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinite there too
        scores = np.fromiter(scored.values(), np.float64, len(scored)).astype(np.float32)
    if np.isnan(scores).any():
        raise ValueError(f"run: the score of document {list(scored)[int(np.isnan(scores).argmax())]!r} is NaN")
    ordered = sorted(zip(scores.tolist(), scored, strict=True), reverse=True)
    return [doc_id for _, doc_id in ordered[:k]]


def per_query(run: Run, qrels: Qrels, metrics: Sequence[str] = DEFAULT_METRICS) -> dict[str, dict[str, float]]:
    """Scores every query of ``qrels``; a query without returned documents gets 0.

    Args:
      run: what was returned; queries that ``qrels`` does not name are left out.
      qrels: the right answers.
      metrics: names ``ndcg@k``, ``recall@k`` or ``mrr@k``.

    Returns:
      ``{metric: {query_id: value in [0, 1]}}``, queries in the order of ``qrels``.

    Raises:
      ValueError: on an unknown metric or a score that is NaN.
    """
    parsed = {name: _parse(name) for name in metrics}
    deepest = max((k for _, k in parsed.values()), default=0)
    result: dict[str, dict[str, float]] = {name: {} for name in metrics}
    for query_id, judged in qrels.items():
        grades = [judged.get(doc_id, 0) for doc_id in rank(run.get(query_id, {}), deepest)]
        for name, (function, k) in parsed.items():
            result[name][query_id] = function(grades[:k], judged, k)
    return result


def mean(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over queries of what ``per_query`` returns; NaN where there is no query."""
    return {name: math.fsum(values.values()) / len(values) if values else math.nan for name, values in scores.items()}


def unanswered(run: Run, qrels: Qrels) -> int:
    """How many queries of ``qrels`` got no document at all (they score 0 in every metric)."""
    return sum(1 for query_id in qrels if not run.get(query_id))


def _ndcg(grades: Sequence[int], judged: Mapping[str, int], k: int) -> float:
    ideal = _dcg(sorted(judged.values(), reverse=True)[:k])
    return _dcg(grades) / ideal if ideal > 0 else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(i + 2) for i, grade in enumerate(grades) if grade > 0)


def _recall(grades: Sequence[int], judged: Mapping[str, int], k: int) -> float:
    relevant = sum(1 for grade in judged.values() if grade > 0)
    return sum(1 for grade in grades if grade > 0) / relevant if relevant else 0.0


def _reciprocal_rank(grades: Sequence[int], judged: Mapping[str, int], k: int) -> float:
    return next((1 / (i + 1) for i, grade in enumerate(grades) if grade > 0), 0.0)


_METRICS: dict[str, Callable[[Sequence[int], Mapping[str, int], int], float]] = {
    "ndcg": _ndcg,
    "recall": _recall,
    "mrr": _reciprocal_rank,
}


def _parse(name: str) -> tuple[Callable[[Sequence[int], Mapping[str, int], int], float], int]:
    """``"ndcg@10"`` → the function and 10."""
    kind, _, depth = name.partition("@")
    if kind not in _METRICS or not depth.isdecimal() or int(depth) < 1:
        raise ValueError(f"metrics: {name!r} is none of {', '.join(f'{m}@k' for m in _METRICS)} with k >= 1")
    return _METRICS[kind], int(depth)
