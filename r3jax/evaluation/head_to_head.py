"""Two runs over the same queries: means, wins, ties and losses, and whether the difference is chance."""

import dataclasses
from typing import Any

import numpy as np

from r3jax.evaluation.metrics import Qrels, Run, per_query
from r3jax.evaluation.significance import paired_randomisation

SAME = 1e-9  # a smaller difference of a metric is rounding


@dataclasses.dataclass(frozen=True)
class HeadToHead:
    """Run A against run B by one metric; queries in the order of the judgements."""

    metric: str
    a: dict[str, float]  # query id → value
    b: dict[str, float]
    p: float  # two-sided

    @property
    def differences(self) -> dict[str, float]:
        """Query id → A - B, 0 where that is rounding."""
        return {q: 0.0 if abs(self.a[q] - self.b[q]) < SAME else self.a[q] - self.b[q] for q in self.a}

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, the queries' own with them."""
        d = np.array(list(self.differences.values()))
        return {
            "metric": self.metric,
            "queries": len(d),
            "a": float(np.mean(list(self.a.values()))),
            "b": float(np.mean(list(self.b.values()))),
            "wins": int((d > 0).sum()),
            "ties": int((d == 0).sum()),
            "losses": int((d < 0).sum()),
            "p": self.p,
            "per_query": {q: {"a": self.a[q], "b": self.b[q]} for q in self.a},
        }

    def extremes(self, count: int) -> list[str]:
        """The queries with the `count` largest wins and losses of A, largest difference first."""
        ranked = sorted(self.differences.items(), key=lambda pair: -abs(pair[1]))
        wins = [q for q, d in ranked if d > 0][:count]
        losses = [q for q, d in ranked if d < 0][:count]
        return sorted([*wins, *losses], key=lambda q: -abs(self.differences[q]))


def head_to_head(a: Run, b: Run, qrels: Qrels, metric: str) -> HeadToHead:
    """Compares on every query of `qrels` that has a relevant document; one that a run leaves out scores 0 there.

    p is twice the smaller of the one-sided p-values of `significance.paired_randomisation`.

    Raises:
      ValueError: for an unknown metric.
    """
    judged = {query: grades for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    ours, theirs = (per_query(run, judged, [metric])[metric] for run in (a, b))
    pairs = np.array([(ours[q], theirs[q]) for q in judged])
    pairs[np.abs(pairs[:, 0] - pairs[:, 1]) < SAME] = 0
    sides = paired_randomisation(pairs[:, 0], pairs[:, 1]), paired_randomisation(pairs[:, 1], pairs[:, 0])
    return HeadToHead(metric, ours, theirs, min(1.0, 2 * min(sides)))
