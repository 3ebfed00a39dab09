"""The rollouts of one optimiser step: prompts from the stream, a group of thoughts for each, their rewards.

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal has no policy gradient. Such groups are
replaced by groups of fresh prompts that have one, for so many rounds at most. A round is a whole batch of prompts, so
shapes never change; its surplus is dropped, for the next step's policy is another. Each round is rewarded by the index
as it then is, and they share the step's budget of documents to re-encode.

Of several processes all see all groups, which are small, so that all come to the same rewards and the same choices;
the sampling itself is split over the mesh.

Axes: B prompts, G samples per prompt, R = B G rollouts, P relevant documents, H hard negatives, W prompt width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.model.encoder import bucket_of, pad
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sampler import sample
from r3jax.model.sharding import everywhere, own_rows, put_batch, to_host
from r3jax.rl.environment import Clock, Environment, Rollouts
from r3jax.text.prompts import ChatFormat


@flax.struct.dataclass
class Groups:
    """Prompts with their completions, on the host; every leaf's first axis is B."""

    query: np.ndarray  # [B] query rows
    known: np.ndarray  # [B, P] relevant document rows, -1 where there are fewer
    gains: np.ndarray  # [B, P] their grades
    prompts: np.ndarray  # [B, W] right-padded token rows
    prompt_lengths: np.ndarray  # [B]
    done: Any  # Completions, as numpy arrays
    rewards: np.ndarray  # [B, G] float64; 0 in a group that was dropped
    terms: dict[str, np.ndarray]  # reward terms, each [B, G]
    negatives: np.ndarray  # [B, H] document rows
    dropped: np.ndarray  # [B] the group has a reward that is not finite, and so no advantages

    @property
    def flat(self) -> np.ndarray:
        """Which groups [B] have no policy gradient, for their rewards are all equal."""
        rewards = self.rewards.astype(np.float32)
        return rewards.max(1) == rewards.min(1)

    @property
    def rollouts(self) -> Rollouts:
        """All of them in one row, as the environment looks at them."""
        vectors = self.done.embedding.reshape(-1, self.done.embedding.shape[-1])
        return Rollouts(
            vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            relevant=np.repeat(self.known, self.done.tokens.shape[1], axis=0),
            emitted=self.done.emitted.reshape(-1),
            lengths=self.done.lengths.reshape(-1) - 1,
            gains=np.repeat(self.gains, self.done.tokens.shape[1], axis=0),
        )


class Collector:
    """Makes the `Groups` of a step; `rounds` is how often flat groups may be refilled."""

    def __init__(
        self,
        *,
        stream,
        queries: list[str],
        chat: ChatFormat,
        max_query: int,
        environment: Environment,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        group: int,
        temperature: float,
        max_new: int,
        hard_negatives: int,
        rounds: int,
        on_nan: str,
        seed: int,
    ):
        self.stream, self.queries, self.chat, self.environment = stream, queries, chat, environment
        self.model, self.mesh, self.group, self.rounds = model, mesh, group, rounds
        self.max_query, self.hard_negatives, self.on_nan = max_query, hard_negatives, on_nan
        self.temperature, self.max_new = temperature, max_new
        self.consumed: list[int] = []  # query rows that the last `collect` took from the stream
        self._key = jax.jit(jax.random.key, out_shardings=NamedSharding(mesh, P()))(seed)

    def collect(self, weights, encode: Callable[[np.ndarray], np.ndarray], step: int) -> tuple[Groups, dict[str, Any]]:
        """The groups of optimiser step `step` (from 1) under `weights`, and what their making measured."""
        self.consumed = []
        groups, stats = self._round(weights, encode, step, 0)
        size, used, replaced, drawn_flat = len(groups.query), 0, 0, 0
        while used < self.rounds and (slots := np.flatnonzero(groups.flat)).size:
            used += 1
            fresh, more = self._round(weights, encode, step, used)
            good = np.flatnonzero(~fresh.flat)[: slots.size]
            drawn_flat += int(fresh.flat.sum())
            replaced += good.size
            groups = jax.tree.map(partial(_replaced, slots=slots[: good.size], rows=good), groups, fresh)
            # Where time goes adds up; of the index the last round tells how the step leaves it.
            stats = stats | more | {k: stats[k] + more[k] for k in more if k.startswith("time/")}
        if self.rounds:
            stats |= {
                "refill/rounds": used,
                "refill/share": replaced / size,
                # The batch is not full, for so many of the groups that were drawn instead were flat too.
                "refill/missing": float(groups.flat.mean()),
                "refill/drawn_flat": drawn_flat / (used * size) if used else 0.0,
            }
        return groups, stats | self._measured(groups)

    def _round(self, weights, encode, step: int, number: int) -> tuple[Groups, dict[str, Any]]:
        """One batch of prompts, sampled and rewarded."""
        clock = Clock()
        batch = next(self.stream)
        self.consumed += batch["query"].tolist()
        rows = self.chat.reasoning_prompts([self.queries[row] for row in batch["query"]], self.max_query)
        prompts, lengths = pad(rows, bucket_of(self.chat.reasoning_extra + self.max_query))
        done = to_host(self._sample(weights, prompts, lengths, batch["query"], step, number))
        clock.lap("rollout")
        self._finite(np.isfinite(done.embedding).all(2) & done.embedding.any(2), batch["query"], step)
        count = len(batch["query"])
        groups = Groups(
            query=batch["query"],
            known=batch["known"],
            gains=batch["gains"],
            prompts=prompts,
            prompt_lengths=lengths,
            done=done,
            rewards=np.zeros(done.lengths.shape),
            terms={},
            negatives=np.zeros((count, 0), np.int32),
            dropped=np.zeros(count, bool),
        )
        rewards, stats = self.environment.score(groups.rollouts, encode, step, rounds=self.rounds + 1 - number)
        rewards = rewards.reshape(count, self.group)
        bad = ~np.isfinite(rewards)
        if bad.any() and self.on_nan == "stop":
            i, j = np.argwhere(bad)[0]
            raise UserError(
                f"the reward of query {self.queries[batch['query'][i]]!r} is not a finite number at step {step} "
                f"(completion {j} of {self.group}); mend config.rl.reward.name, or leave such groups out with "
                "config.rl.reward.on_nan=drop."
            )
        if self.hard_negatives:
            negatives = self.environment.hard_negatives(batch["known"], self.group, self.hard_negatives)
            groups = groups.replace(negatives=negatives)
        dropped = bad.any(1)
        groups = groups.replace(
            rewards=np.where(dropped[:, None], 0.0, rewards),
            terms={name: term.reshape(count, self.group) for name, term in self.environment.terms.items()},
            dropped=dropped,
        )
        return groups, stats | {"time/rollout": clock.seconds["rollout"]}

    def _finite(self, good: np.ndarray, query: np.ndarray, step: int) -> None:
        """UserError naming the query of the first rollout [B, G] without a usable embedding."""
        if not good.all():
            i = int(np.argmin(good.all(1)))
            raise UserError(
                f"the embedding of a thought about query {self.queries[query[i]]!r} is not finite at step {step}, the "
                "run has diverged; lower config.rl.learning_rate and name another --workdir."
            )

    def _sample(self, params, prompts, lengths, ids, step: int, number: int):
        """Completions of one round; the key is folded from seed, step and round, so a resume repeats it."""
        key = jax.random.fold_in(self._key, everywhere(self.mesh, np.int32(step)))
        if number:
            key = jax.random.fold_in(key, everywhere(self.mesh, np.int32(number)))
        prompts, lengths, ids = put_batch(self.mesh, own_rows(self.mesh, (prompts, lengths, ids)))
        return sample(params, prompts, lengths, ids, key, **self.sampling)

    @property
    def sampling(self) -> dict[str, Any]:
        """What `sample` is compiled for."""
        t = self.chat.tokenizer
        return {
            "config": self.model,
            "group": self.group,
            "max_new": self.max_new,
            "temperature": self.temperature,
            "embed_id": t.embed_id,
            "stop_ids": (t.im_end_id, t.pad_id),
        }

    def _measured(self, groups: Groups) -> dict[str, Any]:
        """Rewards, of the groups that were not dropped, and lengths."""
        kept, done = ~groups.dropped, groups.done
        terms = {name: term[kept] for name, term in groups.terms.items()}
        terms = {name: term if term.size else np.full(1, np.nan) for name, term in terms.items()}
        rewards = groups.rewards[kept] if kept.any() else np.full(1, np.nan)
        lengths = done.lengths - 1
        stats = {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "policy/flat_groups": float(groups.flat.mean()),
            "completion/length_mean": float(lengths.mean()),
            "completion/length_min": int(lengths.min()),
            "completion/length_max": int(lengths.max()),
            "completion/token_rate": float(done.emitted.mean()),
            "completion/cut": float(cut(done).mean()),
        }
        if self.on_nan == "drop":
            stats["reward/dropped"] = float(groups.dropped.mean())
        for name, term in terms.items():
            stats |= {f"reward/{name}": float(term.mean()), f"reward/{name}_std": float(term.std())}
        return stats


def cut(done: Any) -> np.ndarray:
    """Which of some `Completions` [B, G], on the host, reached the limit without the embed token."""
    return ~done.emitted & (done.lengths == done.tokens.shape[2])


def _replaced(old: np.ndarray, new: np.ndarray, *, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`old` with `new`'s rows in its slots."""
    result = np.array(old)
    result[slots] = new[rows]
    return result
