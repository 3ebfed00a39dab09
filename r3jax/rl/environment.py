"""The RL environment: a search index that follows the moving embeddings, and the reward it gives.

Each step: search the stale index for more than needed, re-encode the positives and the documents whose
re-encoding could change a reward, write them back, carry all others along by what these have in common, rank the
candidates by what is now known of them. The rule is ours (the paper names selective refresh and does not publish it);
see `r3jax.search.refresh` and `r3jax.search.drift`.

With a maximum age, the batch's positives and then the candidates beyond it are re-encoded before all others, and what
the budget leaves beyond it is treated as though it were not in the corpus: it neither ranks nor counts as relevant.

The environment knows neither the model nor the text: `encode` turns document rows into unit vectors.
Axes: R rollouts, C candidates per rollout, P relevant documents, D width, N documents.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from r3jax.errors import UserError
from r3jax.rl import rewards
from r3jax.rl.mix import Retrieval
from r3jax.search.drift import common_drift
from r3jax.search.refresh import DriftEstimate, choose
from r3jax.search.sharded import Index, restore

Encode = Callable[[np.ndarray], np.ndarray]  # document rows [n] -> unit vectors [n, D], current weights


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What the reward looks at."""

    vectors: np.ndarray  # [R, D] unit query vectors
    relevant: np.ndarray  # [R, P] document rows, -1 where there are fewer
    emitted: np.ndarray  # [R] the embed token came by itself
    lengths: np.ndarray  # [R] tokens of the thought, the embed token not counted
    gains: np.ndarray | None = None  # [R, P] grades of `relevant`; None: 1 each


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Which reward, its depth, and the weights of its terms."""

    name: str  # see `r3jax.rl.mix`
    k: int
    weights: dict[str, float]  # retrieval, format, length; overlong, if overlong_window is not 0
    min_tokens: int
    max_tokens: int
    overlong_window: int = 0  # tokens before `limit` in which a thought is punished for its length
    limit: int = 0  # the most tokens that a thought can have


@dataclasses.dataclass(frozen=True)
class RefreshConfig:
    """How the index follows: see `r3jax.search.refresh.choose`."""

    policy: str
    budget: int  # documents per step, positives included
    over_retrieve: int
    max_age: int | None
    share: float
    rebuild_below: float
    fresh_negatives: int = 0  # of each rollout's best irrelevant candidates, re-encoded before the policy's own
    carry: bool = False  # move stale vectors by what re-encoded ones have moved in common


class Environment:
    """An index, its drift estimate and its probe set. All randomness is in `probes`, drawn from `seed`."""

    def __init__(self, index: Index, reward: RewardConfig, refresh: RefreshConfig, *, probes: int, seed: int):
        self.index, self.reward_config, self.refresh = index, reward, refresh
        self._retrieval = Retrieval(reward.name)
        self.terms: dict[str, np.ndarray] = {}  # of the last `score`, each [R]
        self.drift = DriftEstimate()
        rng = np.random.default_rng(seed)
        self.probes = np.sort(rng.choice(len(index), min(probes, len(index)), replace=False))
        self.rebuilds = 0
        # Of the last `score`: candidates (-1: beyond the maximum age) and fresh scores.
        self._ranked: tuple[np.ndarray, np.ndarray] | None = None
        # Of the last step's first round: the step, queries and their stale top k.
        self._stale_top: tuple[int, np.ndarray, np.ndarray] | None = None

    def score(
        self, rollouts: Rollouts, encode: Encode, step: int, rounds: int = 1
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Rewards [R] after a selective refresh at `step`, and what happened on the way.

        A step may have several rounds of rollouts: `rounds` says how many may still come, this one included. Each
        may spend an equal share of what the ones before have left of the step's budget. Where a user's reward gave
        no finite number, the rollout's is NaN.
        """
        clock = Clock()
        refresh, k = self.refresh, self.reward_config.k
        budget = max(0, refresh.budget - int((self.index.versions == step).sum())) // rounds
        before = self.index.versions.copy()
        depth = min(refresh.over_retrieve, len(self.index))
        candidates, _ = self.index.search(rollouts.vectors, depth)
        if self._stale_top is None or self._stale_top[0] != step:
            self._stale_top = step, rollouts.vectors, candidates[:, :k]
        clock.lap("search")
        if refresh.policy != "none":
            # Positives first: their fresh scores then set the threshold that the others are held against.
            positives = np.unique(rollouts.relevant[rollouts.relevant >= 0])
            rows = choose(
                "neighbourhood",
                versions=before,
                step=step,
                budget=budget,
                positives=positives,
                candidates=np.zeros((0, 1), np.int64),
            )
            self._write_back(rows, encode(rows), step)
        clock.lap("encode")
        between = self.index.versions.copy()
        own = self.index.scores(rollouts.vectors, rollouts.relevant)
        best = np.where(rollouts.relevant >= 0, own, -1.0).max(1)
        scores = self.index.scores(rollouts.vectors, candidates)
        ranks = 1 + (scores > best[:, None]).sum(1)
        theta = np.maximum(best, np.sort(scores, 1)[:, -min(k, depth)])
        spent = int((between != before).sum())
        rows = choose(
            refresh.policy,
            versions=between,
            step=step,
            budget=max(0, budget - spent),
            negatives=self._mistakes(rollouts, candidates, scores),
            candidates=candidates,
            scores=scores,
            theta=theta,
            ranks=ranks,
            sigma=self.drift.sigma,
            k=k,
            max_age=refresh.max_age,
            share=refresh.share,
        )
        clock.lap("search")
        vectors = encode(np.concatenate([rows, self.probes]))  # one call: a batch that is not full costs as much
        self._write_back(rows, vectors[: len(rows)], step)
        probe_drift = self._probe_drift(vectors[len(rows) :])
        clock.lap("encode")
        fresh = self.index.scores(rollouts.vectors, candidates)
        self._learn_drift(candidates, scores, fresh, between, step)
        if refresh.policy == "full":  # the reference, whatever the stale search did not return
            candidates, fresh = self.index.search(rollouts.vectors, depth)
        ages = step - self.index.versions
        overdue = None if refresh.max_age is None else ages > refresh.max_age
        if overdue is not None:
            out = overdue[candidates]
            candidates, fresh = np.where(out, -1, candidates), np.where(out, -1.0, fresh)  # the least cosine
            relevant = np.where((rollouts.relevant >= 0) & ~overdue[rollouts.relevant], rollouts.relevant, -1)
            rollouts = dataclasses.replace(rollouts, relevant=relevant)
        self._ranked = candidates, fresh
        total, self.terms = self._reward(rollouts, candidates, fresh, overdue=overdue)
        clock.lap("reward")
        recall = self.index.recall_probe(rollouts.vectors[:64], k)
        if recall < refresh.rebuild_below:
            self.index.rebuild()
            self.rebuilds += 1
        clock.lap("search")
        reencoded = int((self.index.versions == step).sum())
        stats = {f"reward/{name}": float(term.mean()) for name, term in self.terms.items()}
        stats |= {
            "index/reencoded": reencoded,
            "index/share": reencoded / len(self.index),
            "index/age_mean": float(ages.mean()),
            "index/age_max": int(ages.max()),
            "index/probe_recall": recall,
            "index/probe_drift": probe_drift,
            "index/sigma": self.drift.sigma,
            "index/rebuilds": self.rebuilds,
        }
        if overdue is not None:
            stats["index/overdue"] = float(out.mean())  # of the candidates: left out of the ranking
        return total, stats | {f"time/{name}": seconds for name, seconds in clock.seconds.items()}

    def hard_negatives(self, known: np.ndarray, group: int, count: int) -> np.ndarray:
        """Rows [B, count] of what each query's rollouts ranked best at the last `score` and should not have.

        The index follows the model, so these are its present mistakes (ANCE, Xiong et al. 2021).
        known: relevant rows [B, P], -1 where there are fewer. Where too few candidates are irrelevant, the
        query's first relevant document stands in, which the loss leaves out of the negatives.
        """
        assert self._ranked is not None
        candidates, scores = (x.reshape(len(known), -1) for x in self._ranked)
        assert candidates.shape[1] % group == 0
        result = np.repeat(known[:, :1], count, axis=1)
        for i, (rows, values) in enumerate(zip(candidates, scores, strict=True)):
            order = np.lexsort((rows, -values))
            best = [row for row in dict.fromkeys(rows[order].tolist()) if row not in {-1, *known[i].tolist()}]
            result[i, : len(best[:count])] = best[:count]
        return result

    def exact_rewards(self, rollouts: Rollouts, vectors: np.ndarray) -> np.ndarray:
        """Rewards [R] against a corpus re-encoded in full: what refresh is measured against.

        vectors: [N, D]; of several processes, each one's own rows.
        """
        fresh = self.index.like(vectors)
        found = fresh.search(rollouts.vectors, min(self.refresh.over_retrieve, len(fresh)))
        return self._reward(rollouts, *found, fresh)[0]

    def probe(self, rollouts: Rollouts, rewards: np.ndarray, vectors: np.ndarray) -> dict[str, float]:
        """How far this step's `rewards` [R] (NaN: left out) are from a corpus re-encoded in full: see `exact_rewards`.

        `stale_recall` is that of the index before this step's first refresh, for the rollouts of its first round: of
        its top k, the share whose fresh score reaches the fresh k-th.
        """
        assert self._stale_top is not None
        error = np.abs(self.exact_rewards(rollouts, vectors) - rewards)
        error = error[np.isfinite(error)]
        _, queries, rows = self._stale_top
        fresh = self.index.like(vectors)
        top = fresh.scores(queries, rows)
        _, best = fresh.search(queries, rows.shape[1])
        return {
            "probe/reward_error": float(error.mean()) if error.size else float("nan"),
            "probe/stale_recall": float((top >= best[:, -1:] - 1e-6).mean()),
        }

    def state(self) -> dict[str, Any]:
        """All of it as arrays, for a checkpoint."""
        drift = dataclasses.asdict(self.drift)
        return {
            "index": self.index.state(),
            "drift": np.array([drift["mean_square"], drift["updates"], drift["decay"]], np.float64),
            "rebuilds": np.array(self.rebuilds, np.int64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` returned; UserError if that was for another corpus."""
        size, self.index = len(self.index), restore(state["index"])
        if len(self.index) != size:
            raise UserError(
                f"this run's index holds {len(self.index):,} documents and the data set {size:,}; put the old files "
                "back or name another --workdir."
            )
        mean_square, updates, decay = (float(x) for x in state["drift"])
        self.drift = DriftEstimate(mean_square, int(updates), decay)
        self.rebuilds = int(state["rebuilds"])

    def _mistakes(self, rollouts: Rollouts, candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Rows [n] of each rollout's best `fresh_negatives` irrelevant candidates, every rollout's best first."""
        if not self.refresh.fresh_negatives:
            return np.zeros(0, np.int64)
        wrong = ~(candidates[:, :, None] == rollouts.relevant[:, None]).any(2)
        order = np.lexsort((candidates, -np.where(wrong, scores, -np.inf)), axis=1)[:, : self.refresh.fresh_negatives]
        rows = np.where(np.take_along_axis(wrong, order, 1), np.take_along_axis(candidates, order, 1), -1)
        return rows.T.ravel()

    def _write_back(self, rows: np.ndarray, vectors: np.ndarray, step: int) -> None:
        """Stores fresh vectors [n, D]; what they have moved in common carries all that is stale along."""
        if not len(rows):
            return
        if self.refresh.carry and self.refresh.policy != "full":  # which leaves nothing stale
            self.index.carry(*common_drift(self.index.rows(rows), vectors), step)
        self.index.upsert(rows, vectors, step)

    def _reward(self, rollouts: Rollouts, candidates, scores, index: Index | None = None, overdue=None):
        """Total reward and its terms, from candidates of `index` (default: our own) and what is known of their scores.

        Neither candidates nor relevant documents hold one of the `overdue` [N].

        Relevant documents that the search did not return join the ranking: their vectors are at hand.
        """
        c, index = self.reward_config, index or self.index
        own = index.scores(rollouts.vectors, rollouts.relevant).astype(np.float64)
        missing = (rollouts.relevant >= 0) & ~(rollouts.relevant[:, :, None] == candidates[:, None]).any(2)
        rows = np.concatenate([candidates, np.where(missing, rollouts.relevant, -1)], 1)
        ranked = np.concatenate([scores, np.where(missing, own, -np.inf)], 1)
        # Ties go to the lower row, as in every search here.
        order = np.lexsort((rows, -ranked), axis=1)[:, : candidates.shape[1]]
        rows, ranked = np.take_along_axis(rows, order, 1), np.take_along_axis(ranked, order, 1)
        found = self._retrieval(
            rows,
            ranked,
            rollouts.relevant,
            own,
            k=c.k,
            size=len(self.index),
            ranks=self._ranks(rollouts, own, rows, ranked, index, overdue) if self._retrieval.needs_ranks else None,
            emitted=rollouts.emitted,
            gains=np.ones(rollouts.relevant.shape) if rollouts.gains is None else rollouts.gains,
        )
        known = np.isfinite(found["retrieval"])
        terms = {
            "retrieval": np.where(known, found["retrieval"], 0.0),
            "format": rewards.format_term(rollouts.emitted),
            "length": rewards.length_term(rollouts.lengths, c.min_tokens, c.max_tokens),
        }
        if c.overlong_window:
            terms["overlong"] = rewards.overlong_term(rollouts.lengths, c.limit, c.overlong_window)
        return np.where(known, rewards.combine(terms, c.weights), np.nan), terms | found

    def _ranks(self, rollouts: Rollouts, own, rows, ranked, index: Index, overdue) -> np.ndarray:
        """Rank [R] of each rollout's best relevant document: among the candidates, or, if below them, among all.

        The last, N, where there is no relevant document.
        """
        best = np.where(rollouts.relevant >= 0, own, -np.inf).max(1)
        wrong = ~(rows[:, :, None] == rollouts.relevant[:, None]).any(2)
        ranks = 1 + (wrong & (ranked > best[:, None])).sum(1)
        # Where every candidate that counts is above it, others may be too.
        below = ranks > (ranked.shape[1] if overdue is None else (wrong & (rows >= 0)).sum(1))
        more = index.above(rollouts.vectors[below], best[below], rollouts.relevant[below], overdue)
        ranks[below] = 1 + more
        return np.where(np.isfinite(best), ranks, len(self.index))

    def _learn_drift(self, candidates, stale, fresh, before, step: int) -> None:
        """Score changes of the candidates that the policy had re-encoded: the positives were fresh before."""
        ages = (step - before)[candidates]
        renewed = (self.index.versions[candidates] == step) & (ages > 0)
        self.drift = self.drift.update(stale[renewed], fresh[renewed], ages[renewed])

    def _probe_drift(self, vectors: np.ndarray) -> float:
        """1 - mean cosine between probes' stored and current vectors: how stale the index is on the whole."""
        return float(1 - self.index.scores(vectors, self.probes[:, None]).mean()) if len(vectors) else 0.0


class Clock:
    """Seconds by name, lap by lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
