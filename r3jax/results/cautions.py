"""What a reader of figures should know of the data and the rankings they come from."""

from collections.abc import Mapping

import numpy as np

from r3jax.data.beir import Dataset
from r3jax.evaluation.metrics import Run, rank

CUT = 10  # of nDCG@10, the main metric


def of_data(dataset: Dataset, split: str) -> list[str]:
    """Duplicate documents; queries that nobody judged; queries without a relevant document."""
    found = []
    copies = len(dataset.doc_texts) - len(set(dataset.doc_texts))
    if copies:
        found.append(f"{copies:,} documents have the same text as another: a copy of a right answer counts as wrong")
    judged = {query for grades in dataset.qrels.values() for query in grades}
    missing = len(dataset.query_ids) - len(judged)
    if missing:
        found.append(f"{missing:,} of {len(dataset.query_ids):,} queries have no judgement in any split")
    unanswerable = len(dataset.qrels[split]) - len(dataset.positives(split))
    if unanswerable:
        found.append(f"{unanswerable:,} judged queries have no relevant document and are left out of the means")
    return found


def of_runs(runs: Mapping[str, Run]) -> list[str]:
    """{condition: run}: equal scores on both sides of the cut, and queries that found themselves."""
    tied, selves = {}, {}
    for name, run in runs.items():
        tied[name] = sum(_tied(scored) for scored in run.values())
        selves[name] = sum(query in rank(scored, CUT) for query, scored in run.items() if query in scored)
    lines = (
        (tied, f"queries with equal scores at ranks {CUT} and {CUT + 1}, of which the id decides"),
        (selves, f"queries whose own id is a document within the first {CUT}"),
    )
    return [
        f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        for counts, what in lines
        if any(counts.values())
    ]


def _tied(scored: Mapping[str, float]) -> bool:
    if len(scored) <= CUT:
        return False
    scores = np.sort(np.fromiter(scored.values(), np.float64, len(scored)).astype(np.float32))[::-1]
    return bool(scores[CUT - 1] == scores[CUT])
