"""Stage 2: GRPO with a retrieval reward.

Rollouts are sampled, embedded, searched and rewarded; the policy moves by the clipped gradient, held near the
reference by a KL term, and its vectors by an optional InfoNCE over the rollouts (a policy gradient alone
reaches the embedding only through shared weights).

On-policy: one optimiser step per batch of rollouts, so the sampler's own log-probabilities serve as the old
ones and none are recomputed. An adapter's dropout is not applied here: the policy that is moved must be the one that
sampled.

Axes: B prompts, G samples per prompt, R = B G rollouts, T new tokens, P prompt length, D width.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.data.stream import stream
from r3jax.losses import info_nce
from r3jax.model.encoder import bucket_of, encode_rows, normalise, pad, pool_last
from r3jax.model.lora import join
from r3jax.model.qwen2 import ModelConfig, hidden_states
from r3jax.model.sampler import sample
from r3jax.model.sharding import BATCH, out, place, put_batch
from r3jax.rl import algorithms
from r3jax.rl.environment import Clock, Environment, Rollouts
from r3jax.stages.sft import Lengths
from r3jax.stages.state import TrainState, apply, value_and_grad
from r3jax.stages.tokens import answer_terms, answer_window, fill
from r3jax.text.prompts import ChatFormat


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy gradient: see `r3jax.rl.algorithms`."""

    advantage: str
    normalise: str
    ratio: str
    clip_low: float
    clip_high: float
    kl: str
    kl_weight: float
    contrastive_weight: float
    contrastive_temperature: float
    hard_negatives: int
    temperature: float
    max_new: int


class PromptTransform:
    """A training record as what a rollout needs: its row, its known relevant documents, at most so many."""

    def __init__(self, most_positives: int):
        self.most_positives = most_positives

    def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        known = fill(record["positives"], self.most_positives, -1)
        return {"query": np.array(record["query_row"], np.int32), "known": known}


class RL:
    """The reinforcement-learning stage: see `r3jax.stages.state.Stage`.

    Args:
      documents: token rows of the whole corpus, by document row.
      queries: texts, by query row.
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
    ):
        self.steps, self.mesh, self.model, self.group = steps, mesh, model, group
        self.queries, self.documents, self.chat, self.lengths = queries, documents, chat, lengths
        self.environment, self.policy = environment, policy
        self.encode_batch, self.probe_every = encode_batch, probe_every
        self._stream = stream(source, transform=PromptTransform(most_positives), batch_size=prompts, seed=seed)
        self._whole = NamedSharding(mesh, P())  # on every device
        self._key = jax.device_put(jax.random.key(seed), self._whole)
        self._samples: list[dict] = []
        self.update = jax.jit(partial(update, model=model, tx=tx, policy=policy, chunks=chunks), donate_argnums=0)

    def next_batch(self, state: TrainState, step: int):
        clock = Clock()
        batch = next(self._stream)
        texts = [self.queries[row] for row in batch["query"]]
        prompt_rows = self.chat.reasoning_prompts(texts, self.lengths.query)
        width = bucket_of(self.chat.reasoning_extra + self.lengths.query)
        prompts, prompt_lengths = pad(prompt_rows, width)
        weights = state.weights
        done = jax.device_get(self._sample(weights, prompts, prompt_lengths, batch["query"], step))
        clock.lap("rollout")
        rollouts = self._rollouts(done, batch["known"])

        def encode(rows):
            return self._encode(weights, rows)

        rewards, stats = self.environment.score(rollouts, encode, step)
        if self.probe_every and step % self.probe_every == 0:
            vectors = self._encode(weights, np.arange(len(self.documents)))
            stats |= self.environment.probe(rollouts, rewards, vectors)
        grouped = rewards.reshape(-1, self.group).astype(np.float32)
        spread = grouped.max(1) - grouped.min(1)
        stats |= {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "policy/flat_groups": float((spread == 0).mean()),
            "completion/length_mean": float(rollouts.lengths.mean()),
            "completion/length_min": int(rollouts.lengths.min()),
            "completion/length_max": int(rollouts.lengths.max()),
            "completion/token_rate": float(rollouts.emitted.mean()),
            "time/rollout": clock.seconds["rollout"],
        }
        self._keep_samples(texts, done, grouped)
        tokens, starts, lengths = _sequences(prompt_rows, done, width + self.policy.max_new)
        docs = batch["known"][:, :1]
        if self.policy.hard_negatives:
            wrong = self.environment.hard_negatives(batch["known"], self.group, self.policy.hard_negatives)
            docs = np.concatenate([docs, wrong], axis=1).astype(np.int32)
        doc_tokens, doc_lengths = pad(
            [self.documents[row] for row in docs.ravel()],
            bucket_of(self.chat.direct_extra + self.lengths.document),
        )
        mask = done.mask.astype(np.float32)
        arrays = {
            "tokens": tokens,
            "starts": starts,
            "lengths": lengths,
            "old_logp": done.logp,
            "mask": mask,
            "rewards": grouped,
            "emitted": done.emitted,
            "docs": doc_tokens.reshape(*docs.shape, -1),
            "doc_lengths": doc_lengths.reshape(docs.shape),
            "doc_rows": docs,
            "known": batch["known"],
        }
        stats["tokens"] = int(lengths.sum())
        return put_batch(self.mesh, arrays), stats

    def samples(self) -> list[dict]:
        return self._samples

    def host_state(self) -> dict:
        return self.environment.state()

    def stream_state(self) -> Any:
        return self._stream.get_state()

    def resume(self, host_state: dict, stream_state) -> None:
        self.environment.restore(host_state)
        self._stream.set_state(stream_state)

    def _sample(self, params, prompts, lengths, ids, step: int):
        """Completions of one step; the key is folded from the seed and the step, so a resume repeats it."""
        t = self.chat.tokenizer
        put = partial(put_batch, self.mesh)
        return sample(
            params,
            put(prompts),
            put(lengths),
            put(ids),
            jax.random.fold_in(self._key, jax.device_put(np.int32(step), self._whole)),
            config=self.model,
            group=self.group,
            max_new=self.policy.max_new,
            temperature=self.policy.temperature,
            embed_id=t.embed_id,
            stop_ids=(t.im_end_id, t.pad_id),
        )

    def _encode(self, params, rows: np.ndarray) -> np.ndarray:
        documents = [self.documents[row] for row in rows]
        return encode_rows(params, self.model, self.mesh, documents, batch_size=self.encode_batch)

    def _rollouts(self, done, known: np.ndarray) -> Rollouts:
        vectors = done.embedding.reshape(-1, done.embedding.shape[-1])
        return Rollouts(
            vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            relevant=np.repeat(known, self.group, axis=0),
            emitted=done.emitted.reshape(-1),
            lengths=done.lengths.reshape(-1) - 1,
        )

    def _keep_samples(self, texts: list[str], done, grouped: np.ndarray) -> None:
        """The best and the worst completion of the first four queries."""
        self._samples = []
        for i, text in enumerate(texts[:4]):
            for j in (int(grouped[i].argmax()), int(grouped[i].argmin())):
                thought = self.chat.tokenizer.decode(done.tokens[i, j, : done.lengths[i, j] - 1])
                row = {"query": text, "thought": thought, "reward": float(grouped[i, j])}
                self._samples.append(row | {"tokens": int(done.lengths[i, j] - 1)})


def _sequences(prompt_rows: list[list[int]], done, width: int):
    """Prompt and completion in one right-padded row: tokens [B, G, width], starts and lengths [B, G]."""
    count, group, _ = done.tokens.shape
    tokens = np.zeros((count, group, width), np.int32)
    starts = np.repeat(np.array([[len(r)] for r in prompt_rows], np.int32), group, axis=1)
    for i, row in enumerate(prompt_rows):
        tokens[i, :, : len(row)] = row
        tokens[i, :, len(row) : len(row) + done.tokens.shape[2]] = done.tokens[i]
    return tokens, starts, starts + done.lengths.astype(np.int32)


def encode(params, part, *, model: ModelConfig, reference, policy: PolicyConfig):
    """Log-probabilities and unit vectors of some prompts' rollouts, row by row."""
    count, group, length = part["tokens"].shape
    flat = count * group

    def rows(x):
        return jnp.reshape(x, (flat, *x.shape[2:]), out_sharding=out(P(BATCH, *[None] * (x.ndim - 2))))

    def grouped(x):
        return jnp.reshape(x, (count, group, *x.shape[1:]), out_sharding=out(P(BATCH, *[None] * x.ndim)))

    tokens, starts, lengths = rows(part["tokens"]), rows(part["starts"]), rows(part["lengths"])
    hidden = hidden_states(params, model, tokens, lengths)
    positions, targets, _ = answer_window(tokens, starts, lengths, policy.max_new)
    terms = answer_terms(params, model, hidden, positions, targets, temperature=policy.temperature)
    result = {"logp": grouped(terms.logp), "entropy": grouped(terms.entropy)}
    if policy.kl_weight:
        ref_hidden = hidden_states(reference, model, tokens, lengths)
        ref = answer_terms(reference, model, ref_hidden, positions, targets, temperature=policy.temperature)
        result["ref_logp"] = grouped(jax.lax.stop_gradient(ref.logp))
    if policy.contrastive_weight:
        result["vectors"] = grouped(normalise(pool_last(hidden, lengths)))
        per_query = part["docs"].shape[1]
        doc_lengths = jnp.reshape(part["doc_lengths"], (count * per_query,), out_sharding=out(P(BATCH)))
        docs = jnp.reshape(part["docs"], (count * per_query, -1), out_sharding=out(P(BATCH, None)))
        docs = normalise(pool_last(hidden_states(params, model, docs, doc_lengths), doc_lengths))
        result["docs"] = jnp.reshape(docs, (count, per_query, -1), out_sharding=out(P(BATCH, None, None)))
    return result


def loss(result, batch, *, policy: PolicyConfig):
    """Policy gradient + KL + InfoNCE over the global batch, and its health signals."""
    count, group, steps = result["logp"].shape

    def rows(x):
        return jnp.reshape(x, (count * group, *x.shape[2:]), out_sharding=out(P(BATCH, *[None] * (x.ndim - 2))))

    mask = rows(batch["mask"])
    logp = rows(result["logp"])
    total, stats = algorithms.policy_loss(
        logp,
        rows(batch["old_logp"]),
        rows(algorithms.advantages(batch["rewards"], policy.advantage)),
        mask,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        normalise=policy.normalise,
        ratio=policy.ratio,
        max_tokens=policy.max_new,
    )
    metrics = {"policy/loss": total} | {f"policy/{name}": value for name, value in stats.items()}
    metrics["policy/entropy"] = algorithms.masked_mean(rows(result["entropy"]), mask)
    if policy.kl_weight:
        kl = algorithms.masked_mean(
            algorithms.kl(logp, rows(result["ref_logp"]), policy.kl, mask),
            mask,
            normalise=policy.normalise,
            max_tokens=policy.max_new,
        )
        metrics["policy/kl"] = kl
        total = total + policy.kl_weight * kl
    if policy.contrastive_weight:
        per_query = batch["doc_rows"].shape[1]
        total_docs = count * per_query
        doc_rows = jnp.reshape(batch["doc_rows"], (total_docs,), out_sharding=out(P(BATCH)))
        known = (batch["known"][:, :, None] == place(doc_rows, P(None))[None, None, :]).any(1)
        known = jnp.reshape(
            jnp.broadcast_to(known[:, None], (count, group, total_docs)),
            (count * group, total_docs),
            out_sharding=out(P(BATCH, None)),
        )
        positive = place(jnp.repeat(jnp.arange(count) * per_query, group), P(BATCH))
        contrast = info_nce(
            rows(result["vectors"]),
            jnp.reshape(result["docs"], (total_docs, -1), out_sharding=out(P(BATCH, None))),
            positive,
            known,
            policy.contrastive_temperature,
            weights=rows(batch["emitted"]).astype(jnp.float32),
        )
        metrics["policy/contrastive"] = contrast
        total = total + policy.contrastive_weight * contrast
    return total, metrics | {"loss": total}


def update(state: TrainState, batch, *, model: ModelConfig, tx, policy: PolicyConfig, chunks: int):
    """One optimiser step on one batch of rollouts: pure, jitted by `RL`."""

    def encode_rollouts(trained, part):
        return encode(join(state.reference, trained), part, model=model, reference=state.reference, policy=policy)

    global_loss = partial(loss, batch=batch, policy=policy)
    (_, metrics), gradient = value_and_grad(encode_rollouts, global_loss, state.params, batch, chunks)
    state, norms = apply(tx, state, gradient)
    return state, metrics | norms
