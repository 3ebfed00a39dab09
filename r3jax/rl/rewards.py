"""Rewards of rollouts, as pure numpy functions: how well a rollout's embedding ranks the relevant documents.

Every retrieval reward has the same signature, takes what one fresh ranking offers and returns float64 [R]:

    reward(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None)

  rows             int [R, K]   candidate documents ranked by their fresh vectors, best first, K >= k; -1: no document
  scores           [R, K]       their cosines, descending; -1, the least, where there is no document
  relevant         int [R, P]   the query's relevant documents, -1 where there are fewer than P
  positive_scores  [R, P]       cosines of `relevant`, ignored at -1
  k                int          depth of the ranking that counts
  size             int          N, the number of documents in the corpus
  ranks            int [R]      exact rank (from 1) of the best relevant document; only `log_rank` needs it
  emitted          bool [R]     whether the rollout wrote the embed token; a rollout that did not gets 0
  gains            [R, P]       grades of `relevant`, above 0 and ignored at -1; 1 each where not given

The paper's own reward is not published in full; `dcg_scaled` is our reading of it (graded by rank and by
closeness), `log_rank` follows LREM and `margin` ELVA. A non-finite number in the input of an emitting
rollout, or in a result, raises ValueError that names the rollout. Axis legend: R rollouts, K candidates, P
relevant documents.
"""

import numpy as np


def dcg_scaled(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None):
    """(1/Z) sum over the relevant in the top k of gain * max(0, cosine) / log2(rank + 1), in [0, 1].

    Z is the same sum for the ideal order with cosines of 1, over as many relevant documents as fit into k.
    """
    ranking = _Ranking(rows, scores, relevant, positive_scores, k, size, emitted, gains)
    return ranking.finish(ranking.discounted_gain(np.maximum(ranking.scores, 0.0)))


def ndcg(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None):
    """nDCG@k with linear gains, in [0, 1] (Järvelin & Kekäläinen 2002)."""
    ranking = _Ranking(rows, scores, relevant, positive_scores, k, size, emitted, gains)
    return ranking.finish(ranking.discounted_gain(1.0))


def mrr(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None):
    """1 / rank of the first relevant document in the top k, 0 where there is none."""
    ranking = _Ranking(rows, scores, relevant, positive_scores, k, size, emitted)
    return ranking.finish((ranking.hits / np.arange(1, k + 1)).max(axis=1))


def log_rank(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None):
    """1 - log(rank) / log(N) with the exact rank of the best relevant document, in [0, 1] (LREM).

    `ranks` is needed: a ranking cut at K does not tell the rank of a document that is not in it.
    """
    ranking = _Ranking(rows, scores, relevant, positive_scores, k, size, emitted)
    if ranks is None:
        raise ValueError("ranks are needed by log_rank")
    if size < 2:
        raise ValueError(f"size must be at least 2 for log_rank, it is {size}")
    ranks = np.asarray(ranks, np.float64)
    if ranks.shape != ranking.emitted.shape:
        raise ValueError(f"ranks must have shape {ranking.emitted.shape}, not {ranks.shape}")
    ranks = np.where(ranking.emitted, ranks, 1.0)
    outside = ~((ranks >= 1) & (ranks <= size))  # catches NaN too
    if outside.any():
        raise ValueError(f"ranks must lie in 1..{size}, rollout {np.argmax(outside)} has {ranks[outside][0]:g}")
    return ranking.finish(1.0 - np.log(ranks) / np.log(size))


def margin(rows, scores, relevant, positive_scores, *, k, size, ranks=None, emitted=None, gains=None):
    """Cosine to the best relevant document minus the best irrelevant one's, in [-2, 2]; does not saturate.

    Source: ELVA. Every document among the K candidates that is not relevant is a negative; if none is, the margin
    is 0.
    """
    ranking = _Ranking(rows, scores, relevant, positive_scores, k, size, emitted)
    best_positive = np.where(ranking.known, ranking.positive_scores, -np.inf).max(axis=1)
    negative = ranking.documents & ~ranking.all_hits
    best_negative = np.where(negative, ranking.all_scores, -np.inf).max(axis=1)
    usable = ranking.known.any(axis=1) & negative.any(axis=1)
    with np.errstate(invalid="ignore"):  # -inf minus -inf where there is nothing to compare
        return ranking.finish(np.where(usable, best_positive - best_negative, 0.0))


REWARDS = {"dcg_scaled": dcg_scaled, "ndcg": ndcg, "mrr": mrr, "log_rank": log_rank, "margin": margin}


def format_term(embed_token_by_itself) -> np.ndarray:
    """1 where the rollout wrote the embed token of its own accord, 0 where it was cut off or forced; [R]."""
    return np.asarray(embed_token_by_itself, bool).astype(np.float64)


def length_term(lengths, minimum: int, maximum: int) -> np.ndarray:
    """1 for thoughts of `minimum` to `maximum` tokens, falling linearly to 0 at length 0 and 2 * maximum.

    `lengths` [R] counts the tokens of the thought, without the embed token.
    """
    if not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(f"minimum and maximum must satisfy 0 <= minimum <= maximum, not {minimum}, {maximum}")
    lengths = np.asarray(lengths, np.float64)
    if not (np.isfinite(lengths) & (lengths >= 0)).all():
        raise ValueError("lengths must be finite and not negative")
    short = lengths / minimum if minimum else np.ones_like(lengths)
    return np.clip(np.minimum(short, 2.0 - lengths / maximum), 0.0, 1.0)


def overlong_term(lengths, limit: int, window: int) -> np.ndarray:
    """0 up to `window` tokens before the limit, falling linearly to -1 at the limit; [R].

    `lengths` [R] counts the tokens of the thought, without the embed token. Source: DAPO's soft overlong
    punishment (arXiv 2503.14476), whose buffer is the window.
    """
    if not 1 <= window <= limit:
        raise ValueError(f"window must be between 1 and the limit of {limit} tokens, it is {window}")
    return -np.clip((np.asarray(lengths, np.float64) - (limit - window)) / window, 0.0, 1.0)


def combine(terms: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """The weighted sum [R] of named reward terms [R]; each term has a weight and each weight a term."""
    if not terms:
        raise ValueError("terms must not be empty")
    if set(terms) != set(weights):
        odd = ", ".join(sorted(set(terms) ^ set(weights)))
        raise ValueError(f"terms and weights must name the same things, only one of them names {odd}")
    total = np.zeros(np.shape(next(iter(terms.values()))))
    for name, term in terms.items():
        term = np.asarray(term, np.float64)
        _finite(f"terms[{name!r}]", term)
        total = total + float(weights[name]) * term
    _finite("weights", total)
    return total


class _Ranking:
    """Checked inputs of one call, with the relevant documents found among the candidates."""

    def __init__(self, rows, scores, relevant, positive_scores, k, size, emitted, gains=None):
        rows, relevant = np.asarray(rows), np.asarray(relevant)
        scores = np.asarray(scores, np.float64)
        positive_scores = np.asarray(positive_scores, np.float64)
        if rows.ndim != 2 or scores.shape != rows.shape:
            raise ValueError(f"rows and scores must both be [R, K], not {rows.shape} and {scores.shape}")
        if relevant.ndim != 2 or len(relevant) != len(rows) or positive_scores.shape != relevant.shape:
            raise ValueError(
                f"relevant and positive_scores must both be [{len(rows)}, P], "
                f"not {relevant.shape} and {positive_scores.shape}"
            )
        if not 1 <= k <= rows.shape[1]:
            raise ValueError(f"k must be between 1 and the {rows.shape[1]} candidates, it is {k}")
        count = len(rows)
        self.k = k
        self.emitted = np.ones(count, bool) if emitted is None else np.asarray(emitted, bool)
        if self.emitted.shape != (count,):
            raise ValueError(f"emitted must have shape ({count},), not {self.emitted.shape}")
        # A rollout without an embedding has no scores: whatever stands there is replaced before it can
        # spread.
        written = self.emitted[:, None]
        self.known = (relevant >= 0) & written
        self.all_scores = np.where(written, scores, 0.0)
        self.positive_scores = np.where(self.known, positive_scores, 0.0)
        _finite("scores", self.all_scores)
        _finite("positive_scores", self.positive_scores)
        # [R, K, P]: which candidate is which relevant document.
        self.documents = rows >= 0
        match = (rows[:, :, None] == relevant[:, None, :]) & self.known[:, None, :]
        self.all_hits = match.any(axis=2)
        self.hits = self.all_hits[:, :k]
        gains = np.ones(relevant.shape) if gains is None else np.asarray(gains, np.float64)
        if gains.shape != relevant.shape:
            raise ValueError(f"gains must have the shape of relevant, {relevant.shape}, not {gains.shape}")
        self.gains = np.where(self.known, gains, 0.0)
        _finite("gains", self.gains)
        if (self.gains[self.known] <= 0).any():
            raise ValueError("gains of relevant documents must be above 0")
        self.hit_gains = (match[:, :k] * self.gains[:, None, :]).max(axis=2, initial=0.0)
        self.scores = self.all_scores[:, :k]

    def discounted_gain(self, closeness) -> np.ndarray:
        """DCG@k of the hits times `closeness` [R, k], over the ideal DCG@k; 0 without relevant documents."""
        discount = 1.0 / np.log2(np.arange(2, self.k + 2))
        found = (self.hit_gains * closeness * discount).sum(axis=1)
        best = -np.sort(-self.gains, axis=1)[:, : self.k]
        ideal = (best * discount[: best.shape[1]]).sum(axis=1)
        return np.divide(found, ideal, out=np.zeros(len(found)), where=ideal > 0)

    def finish(self, reward) -> np.ndarray:
        """`reward` [R] with 0 for rollouts that wrote no embed token."""
        reward = np.where(self.emitted, reward, 0.0)
        _finite("the reward", reward)
        return reward


def _finite(name: str, array: np.ndarray) -> None:
    """ValueError naming the first rollout (axis 0) at which `array` is not finite."""
    good = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not good.all():
        raise ValueError(f"{name} is not finite for rollout {int(np.argmin(good))}")
