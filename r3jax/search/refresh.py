"""Which documents to re-encode at a step: one pure numpy function per policy.

Every optimiser step makes all stored vectors a little stale, and only a few can be re-encoded. The policies:

- `none`: nothing. `full`: everything that is not fresh, whatever the budget (the reference).
- `round_robin`: oldest first.
- `neighbourhood`: what the rollouts' searches returned; first what is old and often returned (age x
  hits, a hit counting less the lower its place: plain hits favour documents that are near everything, and in simulation
  leave twice the error at 10 % a step).
- `boundary`: the same documents, those first whose re-encoding is likeliest to change a reward: a stale
  document matters only if its fresh score may lie on the other side of the score that decides the reward
  (theta).
- `hybrid`: boundary with a share of the budget for round robin, so that no document grows old unseen.

The Search-R3 paper (arXiv 2510.07048) names selective refresh and not its rule; the rules here are this
project's. Axis legend: N documents, R rollouts, L candidates per rollout, P positives.
"""

import dataclasses

import numpy as np
from scipy.special import erfc

POLICIES = ("none", "round_robin", "neighbourhood", "boundary", "hybrid", "full")


@dataclasses.dataclass(frozen=True)
class DriftEstimate:
    """How far a document's score moves per step: sigma of a random walk, learnt from documents re-encoded.

    Two floats and a decay, so `dataclasses.asdict` stores it and `DriftEstimate(**stored)` restores it.
    """

    mean_square: float = 1e-4  # of (old score - new score) / sqrt(age); starts at a drift of .01 a step
    updates: int = 0  # how many batches it has seen; the first replaces the start
    decay: float = 0.9  # share of the past kept per batch

    @property
    def sigma(self) -> float:
        """Standard deviation of a score's change over one step, in cosine."""
        return float(np.sqrt(self.mean_square))

    def update(self, old_scores, new_scores, ages) -> "DriftEstimate":
        """The estimate after one batch: stale and fresh scores [n] of re-encoded documents, ages [n] >= 1."""
        old, new, ages = (np.asarray(x, np.float64).ravel() for x in (old_scores, new_scores, ages))
        if not old.size == new.size == ages.size:
            raise ValueError(f"old_scores, new_scores, ages differ in length: {old.size}, {new.size}, {ages.size}")
        if old.size == 0:
            return self
        if not (np.isfinite(old).all() and np.isfinite(new).all()):
            raise ValueError("old_scores and new_scores must be finite")
        if not (ages >= 1).all():
            raise ValueError("ages must be at least 1: a fresh document has not drifted")
        seen = float(np.mean((old - new) ** 2 / ages))
        kept = self.decay if self.updates else 0.0
        return dataclasses.replace(
            self, mean_square=kept * self.mean_square + (1 - kept) * seen, updates=self.updates + 1
        )


def reward_steps(ranks, k: int) -> np.ndarray:
    """The largest change of the discount 1/log2(rank + 1), cut at k, when a rank (from 1) moves by one.

    Beyond rank k + 1 one move changes nothing; the slope of the uncut discount stands in, so that rollouts
    whose positive is far off still count for a little.
    """
    ranks = np.asarray(ranks, np.float64)

    def discount(rank):
        return np.where((rank >= 1) & (rank <= k), 1 / np.log2(np.maximum(rank, 1) + 1), 0.0)

    up = np.where(ranks > 1, discount(ranks - 1) - discount(ranks), 0.0)
    down = discount(ranks) - discount(ranks + 1)
    slope = 1 / np.log2(ranks + 1) - 1 / np.log2(ranks + 2)
    return np.maximum(np.maximum(up, down), slope)


def boundary_priority(versions, step, candidates, scores, theta, ranks, sigma, k) -> np.ndarray:
    """The expected reward change [N] from re-encoding each document; zero for those that no search returned.

    Sum over rollouts of `reward_steps` times the probability that the fresh score is on the other side of
    theta: the normal tail of |score - theta| / (sigma * sqrt(age)). Arguments as in `choose`.
    """
    size = len(versions)
    rows = np.where(candidates >= 0, candidates, size)  # padding is counted in a bin of its own and dropped
    spread = np.sqrt(2.0) * sigma * np.sqrt(np.append(step - versions, 1))
    distance = np.abs(scores - theta[:, None]) / np.maximum(spread, 1e-12)[rows]
    change = 0.5 * reward_steps(ranks, k)[:, None] * erfc(distance)
    return np.bincount(rows.ravel(), weights=change.ravel(), minlength=size + 1)[:size]


def choose(
    policy: str,
    *,
    versions,
    step: int,
    budget: int,
    positives=(),
    negatives=(),
    candidates=None,
    scores=None,
    theta=None,
    ranks=None,
    sigma: float = 0.0,
    k: int = 10,
    max_age: int | None = None,
    share: float = 0.25,
) -> np.ndarray:
    """The rows to re-encode now, int64 [n], unique, most urgent first, n <= budget (`full` ignores it).

    Order: candidates older than `max_age`, then other documents older than that (oldest first), then, where there is
    a `max_age`, the N / max_age oldest documents, so that none grows older; then the batch's positives, its hard
    negatives, then the policy's own. `none` returns nothing and `full` everything stale; `round_robin` looks at
    nothing but ages. A document encoded at `step` is never chosen. Ties go to the lower row, so equal inputs give
    equal outputs.

    Args:
      policy: one of POLICIES.
      versions: int [N], the step at which each document was encoded.
      step: the current step; no version may be later.
      budget: how many documents may be re-encoded.
      positives: rows of the batch's relevant documents [P]; repeats are fine, those already re-encoded are
        skipped.
      negatives: rows of documents mined for the batch that must be fresh too; as `positives`.
      candidates: rows that each rollout's search returned [R, L], best first; -1 where there is none.
      scores: their stale scores [R, L].
      theta: the score that decides each rollout's reward [R]: the larger of its positive's score and the
        k-th score.
      ranks: the rank of each rollout's positive [R], from 1; beyond k where it was not found.
      sigma: drift of a score per square root of a step, from `DriftEstimate`.
      k: the depth of the reward's ranking.
      max_age: oldest age in steps that is left alone; None for no bound.
      share: of the budget of `hybrid`, what goes to round robin.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    versions = np.asarray(versions, np.int64)
    if versions.ndim != 1:
        raise ValueError(f"versions must be [documents], not of shape {versions.shape}")
    if versions.size and versions.max() > step:
        raise ValueError(f"versions holds {versions.max()}, later than step {step}")
    if budget < 0:
        raise ValueError(f"budget must not be negative, it is {budget}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, it is {share}")
    ages = step - versions
    oldest = np.argsort(-ages, kind="stable")
    oldest = oldest[ages[oldest] > 0]
    if policy == "none":
        return np.zeros(0, np.int64)
    if policy == "full":
        return oldest
    if policy == "round_robin":
        return oldest[:budget]  # what is older than max_age is its first anyway
    if candidates is None:
        raise ValueError(f"candidates are needed by policy {policy!r}")
    candidates = _known_rows("candidates", candidates, len(versions))
    hits = np.bincount(candidates.ravel() + 1, minlength=len(versions) + 1)[1:]
    overdue = oldest[ages[oldest] > max_age] if max_age is not None else oldest[:0]
    # Documents of one age fall due together, and more of them than a step's budget: each step takes its part of the
    # oldest before they are.
    due = oldest[: -(-len(versions) // max_age)] if max_age else oldest[:0]
    must = [overdue[hits[overdue] > 0], overdue, due]
    for name, rows in (("positives", positives), ("negatives", negatives)):
        must.append(_known_rows(name, rows, len(versions)).ravel())
    first = _unique(np.concatenate(must), ages)[:budget]
    left = budget - len(first)
    found = np.flatnonzero(hits)
    if policy == "neighbourhood":
        likely = found[np.argsort(-(ages * _discounted(candidates, len(versions)))[found], kind="stable")]
        return _unique(np.concatenate([first, likely]), ages)[:budget]
    scores, theta, ranks = _rollout_arrays(candidates, scores, theta, ranks)
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and not negative, it is {sigma}")
    priority = boundary_priority(versions, step, candidates, scores, theta, ranks, sigma, k)
    likely = found[np.argsort(-priority[found], kind="stable")]
    if policy == "boundary":
        return _unique(np.concatenate([first, likely]), ages)[:budget]
    chosen = _unique(np.concatenate([first, likely]), ages)[: budget - round(share * left)]
    return _unique(np.concatenate([chosen, oldest]), ages)[:budget]


def _discounted(candidates: np.ndarray, size: int) -> np.ndarray:
    """How often each document [N] was returned, a hit at place i (from 1) counting 1 / log2(i + 1)."""
    weights = np.broadcast_to(1 / np.log2(np.arange(candidates.shape[-1]) + 2), candidates.shape)
    return np.bincount(candidates.ravel() + 1, weights=weights.ravel(), minlength=size + 1)[1:]


def _unique(rows: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """`rows` without repeats, paddings (-1) and fresh documents, in order of first appearance."""
    # Written back to front, so that what stays is each row's first place; sorting 800,000 candidates is
    # slower.
    place = np.full(len(ages) + 1, -1, np.int64)
    place[rows[::-1]] = np.arange(len(rows))[::-1]  # padding, -1, falls on the last entry
    stale = np.flatnonzero((place[:-1] >= 0) & (ages > 0))
    return stale[np.argsort(place[stale])]


def _known_rows(name: str, rows, size: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.size and rows.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold row numbers, not {rows.dtype}")
    rows = rows.astype(np.int64)
    if rows.size and (rows.min() < -1 or rows.max() >= size):
        raise ValueError(f"{name} names a row outside 0..{size - 1}")
    return rows


def _rollout_arrays(candidates, scores, theta, ranks):
    """`scores`, `theta`, `ranks` as float64 arrays that fit `candidates` [R, L]."""
    if candidates.ndim != 2:
        raise ValueError(f"candidates must be [rollouts, candidates], not of shape {candidates.shape}")
    shapes = {"scores": candidates.shape, "theta": candidates.shape[:1], "ranks": candidates.shape[:1]}
    arrays = []
    for (name, shape), value in zip(shapes.items(), (scores, theta, ranks), strict=True):
        if value is None:
            raise ValueError(f"{name} are needed by the boundary policies")
        value = np.asarray(value, np.float64)
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {value.shape}")
        used = value[candidates >= 0] if name == "scores" else value
        if not np.isfinite(used).all():
            raise ValueError(f"{name} must be finite")
        arrays.append(value)
    scores, theta, ranks = arrays
    if (ranks < 1).any():
        raise ValueError("ranks count from 1")
    return np.where(candidates >= 0, scores, 0.0), theta, ranks
