"""The update of stage 2, pure and on the devices: policy gradient, KL to the reference, InfoNCE over the rollouts.

On-policy: one optimiser step per batch of rollouts, so the sampler's own log-probabilities serve as the old
ones and none are recomputed. With several epochs the trainer's own are, and truncated importance weights stand for
the difference to the sampler's. An adapter's dropout is not applied here: the policy that is moved must be the one that
sampled.

Axes: B prompts, G samples per prompt, R = B G rollouts, T new tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from r3jax.losses import in_chunks, info_nce
from r3jax.model.lora import join
from r3jax.model.packing import last_vectors, packed_states, pick
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import BATCH, out, place
from r3jax.rl import algorithms
from r3jax.stages.state import TrainState, apply, value_and_grad
from r3jax.stages.tokens import answer_terms, answer_window


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
    epochs: int = 1  # optimiser steps per batch of rollouts
    importance_cap: float = 2.0  # of the weights that several epochs want; see `algorithms.importance`
    reference_decay: float = 0.0  # of the reference, an average of the policies so far; 0 freezes it


def encode(params, part, *, model: ModelConfig, reference, policy: PolicyConfig):
    """Log-probabilities and unit vectors of some prompts' rollouts, row by row."""
    count, group, _ = part["tokens"].shape

    def grouped(x):
        return jnp.reshape(x, (count, group, *x.shape[1:]), out_sharding=out(P(BATCH, *[None] * x.ndim)))

    tokens, starts, lengths, begins = (_rows(part[name]) for name in ("tokens", "starts", "lengths", "begins"))
    _, targets, mask = answer_window(tokens, starts, lengths, policy.max_new)
    # The prompt's last token predicts a completion's first, each of the completion's own the next.
    steps = jnp.arange(policy.max_new)[None, :]
    ends = _rows(jnp.broadcast_to(part["prompt_ends"][:, None], (count, group)))
    places = jnp.where(steps == 0, ends[:, None], (begins + starts)[:, None] + steps - 1)
    places = place(jnp.where(mask, places, 0), P(BATCH, None))
    states = packed_states(params, model, part["packs"])
    terms = answer_terms(params, model, pick(states, places), targets, mask, temperature=policy.temperature)
    result = {"logp": grouped(terms.logp), "entropy": grouped(terms.entropy)}
    if policy.kl_weight:
        frozen = pick(packed_states(reference, model, part["packs"]), places)
        ref = answer_terms(reference, model, frozen, targets, mask, temperature=policy.temperature)
        result["ref_logp"] = grouped(jax.lax.stop_gradient(ref.logp))
    if policy.contrastive_weight:
        result["vectors"] = grouped(last_vectors(states, begins, lengths))
        per_query = part["doc_lengths"].shape[1]
        docs = packed_states(params, model, part["doc_packs"])
        docs = last_vectors(docs, _rows(part["doc_begins"]), _rows(part["doc_lengths"]))
        result["docs"] = jnp.reshape(docs, (count, per_query, -1), out_sharding=out(P(BATCH, None, None)))
    return result


def loss(result, batch, *, policy: PolicyConfig):
    """Policy gradient + KL + InfoNCE over the global batch, and its health signals."""
    count, group, _ = result["logp"].shape
    mask = _rows(batch["mask"])
    logp = _rows(result["logp"])
    total, stats = algorithms.policy_loss(
        logp,
        _rows(batch["old_logp"]),
        _rows(algorithms.advantages(batch["rewards"], policy.advantage)),
        mask,
        weights=_rows(batch["importance"]) if "importance" in batch else None,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        normalise=policy.normalise,
        ratio=policy.ratio,
        max_tokens=policy.max_new,
    )
    metrics = {"policy/loss": total} | {f"policy/{name}": value for name, value in stats.items()}
    metrics["policy/entropy"] = algorithms.masked_mean(_rows(result["entropy"]), mask)
    if policy.kl_weight:
        kl = algorithms.masked_mean(
            algorithms.kl(logp, _rows(result["ref_logp"]), policy.kl, mask),
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
            _rows(result["vectors"]),
            jnp.reshape(result["docs"], (total_docs, -1), out_sharding=out(P(BATCH, None))),
            positive,
            known,
            policy.contrastive_temperature,
            weights=_rows(batch["emitted"]).astype(jnp.float32),
        )
        metrics["policy/contrastive"] = contrast
        total = total + policy.contrastive_weight * contrast
    return total, metrics | {"loss": total}


def update(state: TrainState, batch, *, model: ModelConfig, tx, policy: PolicyConfig, chunks: int):
    """The optimiser's steps on one batch of rollouts, one or several epochs: jitted by `r3jax.stages.rl.RL`.

    Metrics are the mean over the epochs.
    """

    def encode_rollouts(trained, part, reference):
        return encode(join(reference, trained), part, model=model, reference=reference, policy=policy)

    def step(state, batch):
        rows = partial(encode_rollouts, reference=state.reference)
        global_loss = partial(loss, batch=batch, policy=policy)
        (_, metrics), gradient = value_and_grad(rows, global_loss, state.params, batch, chunks)
        state, norms = apply(tx, state, gradient, metrics["loss"])
        return state, metrics | norms

    if policy.epochs == 1:
        after, metrics = step(state, batch)
    else:
        batch, stats = _recomputed(state, batch, model=model, policy=policy, chunks=chunks)
        after, metrics = jax.lax.scan(lambda s, _: step(s, batch), state, length=policy.epochs)
        after = after.replace(step=state.step + 1)  # counts batches of rollouts
        metrics = jax.tree.map(lambda x: x.mean(0), metrics) | stats
    if policy.reference_decay:
        moved = optax.incremental_update(after.params, state.reference, 1 - policy.reference_decay)
        after = after.replace(reference=moved)
    return after, metrics


def _recomputed(state: TrainState, batch, *, model: ModelConfig, policy: PolicyConfig, chunks: int):
    """The batch with the trainer's own log-probabilities as the old ones, and the weights that make up for that."""
    only = dataclasses.replace(policy, kl_weight=0.0, contrastive_weight=0.0)
    names = ("tokens", "starts", "lengths", "prompt_ends", "begins", "packs")

    def log_probs(params, part):
        return encode(params, part, model=model, reference=None, policy=only)["logp"]

    old = in_chunks(log_probs, state.weights, {name: batch[name] for name in names}, chunks)
    weights, stats = algorithms.importance(
        _rows(old), _rows(batch["old_logp"]), _rows(batch["mask"]), policy.importance_cap
    )
    weights = jnp.reshape(weights, old.shape, out_sharding=out(P(BATCH, None, None)))
    return batch | {"old_logp": old, "importance": weights}, {f"policy/{name}": x for name, x in stats.items()}


def _rows(x):
    """[B, G, ...] as [R, ...]."""
    return jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=out(P(BATCH, *[None] * (x.ndim - 2))))
