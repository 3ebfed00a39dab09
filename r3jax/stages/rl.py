"""Stage 2: GRPO with a retrieval reward.

Rollouts are sampled, embedded, searched and rewarded; the policy moves by the clipped gradient, held near the
reference by a KL term, and its vectors by an optional InfoNCE over the rollouts (a policy gradient alone
reaches the embedding only through shared weights).

This file makes the batches; `r3jax.stages.policy` is the update.

Axes: B prompts, G samples per prompt, R = B G rollouts, T new tokens, P prompt length, D width.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from r3jax.data.stream import stream
from r3jax.errors import UserError
from r3jax.model.encoder import bucket_of, encode_rows, pad
from r3jax.model.packing import pack, pack_after, pack_length
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import batch_parts, batch_share, own_rows, put_batch
from r3jax.processes import here
from r3jax.rl.environment import Environment
from r3jax.stages.policy import PolicyConfig, update
from r3jax.stages.rollouts import Collector, Groups, cut
from r3jax.stages.sft import Lengths
from r3jax.stages.state import TrainState
from r3jax.stages.tokens import fill
from r3jax.text.prompts import ChatFormat


class PromptTransform:
    """A training record as what a rollout needs: its row, its relevant documents, at most so many, and their grades."""

    def __init__(self, most_positives: int, grades: Mapping[int, list[int]]):
        self.most_positives, self.grades = most_positives, grades

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row, positives = record["query_row"], record["positives"]
        return {
            "query": np.array(row, np.int32),
            "known": fill(positives, self.most_positives, -1),
            "gains": fill(self.grades.get(row, [1] * len(positives)), self.most_positives),
        }


class RL:
    """The reinforcement-learning stage: see `r3jax.stages.state.Stage`.

    Args:
      documents: token rows of the whole corpus, by document row.
      queries: texts, by query row.
      lengths: at most so many tokens; of queries no more than the longest of `queries` has.
      grades: of each query's relevant documents, best first, by query row; 1 each where there are none.
      refill: rounds in which groups without a spread of rewards may be replaced; see `r3jax.stages.rollouts`.
      mask_overlong: whether completions that were cut at the limit are left out of the policy's loss and its KL
        (DAPO); their rewards stay in their group's mean.
      on_nan: what a reward that is not finite does, one of `mix.ON_NAN`: "stop" the run, or "drop" its group.
    """

    name = "rl"

    def __init__(
        self,
        *,
        source,
        queries: list[str],
        documents: list[list[int]],
        chat: ChatFormat,
        lengths: Lengths,
        environment: Environment,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        tx: optax.GradientTransformation,
        steps: int,
        prompts: int,
        group: int,
        chunks: int,
        encode_batch: int,
        probe_every: int,
        seed: int,
        most_positives: int,
        policy: PolicyConfig,
        grades: Mapping[int, list[int]] | None = None,
        refill: int = 0,
        mask_overlong: bool = False,
        on_nan: str = "stop",
    ):
        # What no query needs is not padded: prompts are read by the sampler and again by every update.
        longest = max(map(len, chat.tokens(queries)), default=1)
        lengths = dataclasses.replace(lengths, query=min(lengths.query, longest))
        self.steps, self.mesh, self.model = steps, mesh, model
        self.queries, self.documents, self.chat, self.lengths = queries, documents, chat, lengths
        self.mask_overlong = mask_overlong
        self.encode_batch, self.probe_every = encode_batch, probe_every
        transform = PromptTransform(most_positives, grades or {})
        self._stream = stream(source, transform=transform, batch_size=prompts, seed=seed)
        self.collector = Collector(
            stream=self._stream,
            queries=queries,
            chat=chat,
            max_query=lengths.query,
            environment=environment,
            model=model,
            mesh=mesh,
            group=group,
            temperature=policy.temperature,
            max_new=policy.max_new,
            hard_negatives=policy.hard_negatives,
            rounds=refill,
            on_nan=on_nan,
            seed=seed,
        )
        self._samples: list[dict] = []
        self._chunks = chunks
        self._processes = batch_share(mesh)[1]
        self.update = jax.jit(partial(update, model=model, tx=tx, policy=policy, chunks=chunks), donate_argnums=0)

    @property
    def environment(self) -> Environment:
        """What rewards the rollouts; a study puts one in its place that watches too."""
        return self.collector.environment

    @environment.setter
    def environment(self, environment: Environment) -> None:
        self.collector.environment = environment

    def next_batch(self, state: TrainState, step: int):
        weights = state.weights

        def encode(rows):
            return self._encode(weights, rows)

        groups, stats = self.collector.collect(weights, encode, step)
        if self.probe_every and step % self.probe_every == 0:
            everything = np.arange(len(self.documents))
            vectors = self._encode(weights, everything, here().share(len(everything)))
            rewards = np.where(groups.dropped[:, None], np.nan, groups.rewards).ravel()
            stats |= self.environment.probe(groups.rollouts, rewards, vectors)
        self._keep_samples(groups)
        stats["tokens"] = int((groups.prompt_lengths[:, None] + groups.done.lengths).sum())
        return put_batch(self.mesh, self.packed(self.arrays(own_rows(self.mesh, groups)))), stats

    def arrays(self, groups: Groups) -> dict[str, np.ndarray]:
        """The host batch that `groups` make; every leaf's first axis is B."""
        done = groups.done
        tokens, starts, lengths = _sequences(groups)
        docs = np.concatenate([groups.known[:, :1], groups.negatives], axis=1).astype(np.int32)
        width = bucket_of(self.chat.direct_extra + self.lengths.document)
        doc_tokens, doc_lengths = pad([self.documents[row] for row in docs.ravel()], width)
        kept = ~groups.dropped[:, None]
        mask = done.mask & kept[..., None]
        if self.mask_overlong:
            mask = mask & ~cut(done)[..., None]
        return {
            "tokens": tokens,
            "starts": starts,
            "lengths": lengths,
            "old_logp": done.logp,
            "mask": mask.astype(np.float32),
            "rewards": groups.rewards.astype(np.float32),
            "emitted": done.emitted & kept,
            "docs": doc_tokens.reshape(*docs.shape, -1),
            "doc_lengths": doc_lengths.reshape(docs.shape),
            "doc_rows": docs,
            "known": groups.known,
        }

    def packed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A host batch, with its rollouts and documents in packs too."""
        shards, new = batch_parts(self.mesh) // self._processes, batch["mask"].shape[2]
        to_packs = partial(pack, shards=shards, chunks=self._chunks)
        alone = self.model.attention == "splash"  # which reads whole rows only
        tokens, starts, lengths = (batch[name] for name in ("tokens", "starts", "lengths"))
        if alone:
            kinds = [(tokens[:, i], lengths[:, i]) for i in range(lengths.shape[1])]
            packs, rows = to_packs(kinds, length=pack_length(tokens.shape[2]))
            begins = np.stack(rows, 1)
            ends = (begins + starts - 1)[:, 0]
        else:
            packs, ends, begins = pack_after(
                (tokens[:, 0], starts[:, 0]),
                (np.take_along_axis(tokens, starts[..., None] + np.arange(new), axis=2), lengths - starts),
                room=pack_length(self.chat.reasoning_extra + self.lengths.query),
                length=bucket_of(new),
                shards=shards,
                chunks=self._chunks,
            )
        docs, doc_ends = batch["docs"], batch["doc_lengths"]
        kinds = [(docs[:, i], doc_ends[:, i]) for i in range(docs.shape[1])]
        head = () if alone else self.chat.direct_head
        length = pack_length(docs.shape[2] - len(head))
        doc_packs, doc_begins = to_packs(kinds, length=length, heads=[head] * len(kinds))
        return batch | {
            "packs": packs,
            "prompt_ends": ends,
            "begins": begins,
            "doc_packs": doc_packs,
            "doc_begins": np.stack(doc_begins, 1),
        }

    def consumed(self) -> list[int]:
        return self.collector.consumed

    def samples(self) -> list[dict]:
        return self._samples

    def host_state(self) -> dict:
        return self.environment.state()

    def stream_state(self) -> Any:
        return self._stream.get_state()

    def resume(self, host_state: dict, stream_state) -> None:
        self.environment.restore(host_state)
        self._stream.set_state(stream_state)

    def close(self) -> None:
        self._stream.close()

    def _encode(self, params, rows: np.ndarray, keep: slice = slice(None)) -> np.ndarray:
        documents = [self.documents[row] for row in rows]
        vectors = encode_rows(
            params,
            self.model,
            self.mesh,
            documents,
            batch_size=self.encode_batch,
            heads=self.chat.heads,
            keep=keep,
        )
        if not np.isfinite(vectors).all():
            raise UserError(
                "the vector of a document is not finite, the run has diverged; lower config.rl.learning_rate and name "
                "another --workdir."
            )
        return vectors

    def _keep_samples(self, groups: Groups) -> None:
        """The best and the worst completion of the first four queries."""
        self._samples, done = [], groups.done
        grouped = groups.rewards.astype(np.float32)
        for i, text in enumerate(self.queries[row] for row in groups.query[:4]):
            for j in (int(grouped[i].argmax()), int(grouped[i].argmin())):
                thought = self.chat.tokenizer.decode(done.tokens[i, j, : done.lengths[i, j] - 1])
                row = {"query": text, "thought": thought, "reward": float(grouped[i, j])}
                self._samples.append(row | {"tokens": int(done.lengths[i, j] - 1)})


def _sequences(groups: Groups):
    """Prompt and completion in one right-padded row: tokens [B, G, width], starts and lengths [B, G]."""
    count, group, new = groups.done.tokens.shape
    tokens = np.zeros((count, group, groups.prompts.shape[1] + new), np.int32)
    starts = np.repeat(groups.prompt_lengths.astype(np.int32)[:, None], group, axis=1)
    for i, end in enumerate(groups.prompt_lengths):
        tokens[i, :, :end] = groups.prompts[i, :end]
        tokens[i, :, end : end + new] = groups.done.tokens[i]
    return tokens, starts, starts + groups.done.lengths.astype(np.int32)
