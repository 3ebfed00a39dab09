"""The jitted sampler: the prompt is read once and shared by its group; one `while_loop` decodes until every
row has ended.

A completion ends with the embed token. If the model closes its turn instead (`<|im_end|>`), or the limit
comes, the embed token is forced: the row then has an embedding, but `emitted` is False and the forced token
has no log-probability and no place in the loss mask.

Noise is folded from (key, prompt id, sample id, position), so a row's text does not depend on its batch.
`begin` and `advance` are the greedy loop in pieces, for whoever shows a text while it is written.
Axes: B prompts, G samples per prompt, T new tokens, P prompt length, D width, V vocab.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from r3jax.model.qwen2 import (
    Decoder,
    KVCache,
    ModelConfig,
    decode_step,
    logits,
    right_padded,
    unstack,
)
from r3jax.model.sharding import BATCH, place


@flax.struct.dataclass
class Completions:
    """What the sampler returns. Log-probabilities are of the distribution sampled from, after temperature."""

    tokens: Int[Array, "B G T"]
    logp: Float[Array, "B G T"]  # 0 where the mask is False
    mask: Bool[Array, "B G T"]  # sampled tokens, the terminal one included; forced ones are not
    lengths: Int[Array, "B G"]  # tokens up to and with the embed token
    emitted: Bool[Array, "B G"]  # the embed token came by itself
    embedding: Float[Array, "B G D"]  # hidden state at the embed token, fp32, not normalised


@flax.struct.dataclass
class SamplingState:
    """The state of the decoding loop."""

    slot: Int[Array, ""]  # next position among the new tokens
    hidden: Float[Array, "B G D"]  # of the last token
    done: Bool[Array, "B G"]
    closing: Bool[Array, "B G"]  # the model ended its turn without the embed token
    cache: KVCache
    result: Completions


def _draw(key: jax.Array, log_probs: Float[Array, "V"]) -> Int[Array, ""]:
    return jax.random.categorical(key, log_probs)


@partial(jax.jit, static_argnames=("config", "group", "max_new", "temperature", "embed_id", "stop_ids"))
def sample(
    params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    prompt_ids: Int[Array, "B"],
    key: jax.Array,
    *,
    config: ModelConfig,
    group: int,
    max_new: int,
    temperature: float,
    embed_id: int,
    stop_ids: tuple[int, ...],
) -> Completions:
    """Samples `group` completions of at most `max_new` tokens (the embed token included) for each prompt.

    prompts are right-padded; arrays on a mesh want `jax.set_mesh` of it around the call. temperature 0 is
    greedy; its log-probabilities are those at temperature 1.
    """
    state = _first(params, prompts, prompt_lengths, config, group, max_new)
    keys = jax.vmap(lambda p: jax.vmap(lambda g: jax.random.fold_in(jax.random.fold_in(key, p), g))(jnp.arange(group)))(
        prompt_ids
    )
    ends = (embed_id, stop_ids)
    step = partial(_step, unstack(params, config), config, prompt_lengths, ends, temperature=temperature, keys=keys)
    return jax.lax.while_loop(_going(max_new), step, state).result


@partial(jax.jit, static_argnames=("config", "max_new"))
def begin(
    params, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B"], *, config: ModelConfig, max_new: int
) -> SamplingState:
    """The state after the prompts are read, for `advance`: one sample of each, of which nothing is written yet."""
    return _first(params, prompts, prompt_lengths, config, 1, max_new)


@partial(jax.jit, static_argnames=("config", "embed_id", "stop_ids", "count"), donate_argnames=("state",))
def advance(
    params,
    state: SamplingState,
    prompt_lengths: Int[Array, "B"],
    *,
    config: ModelConfig,
    embed_id: int,
    stop_ids: tuple[int, ...],
    count: int,
) -> SamplingState:
    """At most `count` more tokens, greedily: until every row has ended, as `sample` at temperature 0. Takes `state`."""
    step = partial(_step, unstack(params, config), config, prompt_lengths, (embed_id, stop_ids))
    last = jnp.minimum(state.slot + count, state.result.tokens.shape[2])
    return jax.lax.while_loop(_going(last), step, state)


def _going(last):
    """Whether there is a row to write on, up to slot `last`."""
    return lambda s: (s.slot < last) & ~jnp.all(s.done)


def _first(params, prompts, prompt_lengths, config: ModelConfig, group: int, max_new: int) -> SamplingState:
    """Reads the prompts, each once for its group."""
    batch = prompts.shape[0]
    positions, valid = right_padded(prompt_lengths, prompts.shape[1])
    prefill: Any = Decoder(config).apply({"params": params}, prompts, positions, valid)
    hidden, (k, v) = prefill
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)

    def full(shape, value, dtype):
        x = jnp.full(shape, value, dtype)
        return place(x, P(BATCH, *([None] * (len(shape) - 1))))

    def empty():
        shape = (batch, group, max_new, config.kv_heads, config.head_dim)
        return place(jnp.zeros(shape, k.dtype), P(BATCH, None, None, "tensor", None))

    layers = range(config.layers)
    cache = KVCache(
        prompt_k=tuple(k[i] for i in layers),
        prompt_v=tuple(v[i] for i in layers),
        prompt_valid=valid,
        new_k=tuple(empty() for _ in layers),
        new_v=tuple(empty() for _ in layers),
    )
    width = config.width
    return SamplingState(
        slot=jnp.zeros((), jnp.int32),
        hidden=place(jnp.broadcast_to(last, (batch, group, width)), P(BATCH, None, None)),
        done=full((batch, group), False, bool),
        closing=full((batch, group), False, bool),
        cache=cache,
        result=Completions(
            tokens=full((batch, group, max_new), 0, jnp.int32),
            logp=full((batch, group, max_new), 0, jnp.float32),
            mask=full((batch, group, max_new), False, bool),
            lengths=full((batch, group), 0, jnp.int32),
            emitted=full((batch, group), False, bool),
            embedding=full((batch, group, width), 0, jnp.float32),
        ),
    )


def _step(
    params,
    config: ModelConfig,
    prompt_lengths,
    ends: tuple[int, tuple[int, ...]],
    s: SamplingState,
    *,
    temperature: float = 0.0,
    keys=None,
) -> SamplingState:
    """One token more for each sample. `params` as `unstack` returns them; `ends`: the embed token and the stops."""
    embed_id, stop_ids = ends
    _, group, max_new = s.result.tokens.shape
    z = logits(params, config, s.hidden)
    # Sampling looks at whole rows of the vocabulary: gather the split one first.
    log_probs = jax.nn.log_softmax(place(z, P(BATCH, None, None)) / (temperature or 1.0))
    if temperature:
        slot_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, s.slot)
        token = jax.vmap(jax.vmap(_draw))(slot_keys, log_probs).astype(jnp.int32)
    else:
        token = log_probs.argmax(-1).astype(jnp.int32)
    logp = jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]
    forced = s.closing | ((s.slot == max_new - 1) & (token != embed_id))
    token = jnp.where(forced, embed_id, token)
    live = ~s.done
    sampled = live & ~forced
    r = s.result
    put = partial(jax.lax.dynamic_update_index_in_dim, index=s.slot, axis=2)
    r = r.replace(
        tokens=put(r.tokens, jnp.where(live, token, 0)),
        logp=put(r.logp, jnp.where(sampled, logp, 0.0)),
        mask=put(r.mask, sampled),
        lengths=r.lengths + live,
    )
    position = place(prompt_lengths[:, None] + s.slot + jnp.zeros((1, group), jnp.int32), P(BATCH, None))
    hidden, cache = decode_step(params, config, token, position, s.cache, s.slot)
    ended = live & (token == embed_id)
    r = r.replace(
        emitted=r.emitted | (ended & ~forced),
        embedding=jnp.where(ended[..., None], hidden.astype(jnp.float32), r.embedding),
    )
    stop = jnp.isin(token, jnp.asarray(stop_ids)) if stop_ids else jnp.zeros_like(live)
    return s.replace(slot=s.slot + 1, hidden=hidden, done=s.done | ended, closing=live & stop, cache=cache, result=r)
