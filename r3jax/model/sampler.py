"""The sampler: the prompt is read once and shared by its group; a `while_loop` decodes LOOK tokens of every row, then
the host looks how many rows are still being written.

Rows that have ended leave when those that go on fit into half the shape, and the cache of new tokens doubles when it
is full: a step costs what the rows that are left need. The rows that stay are then each a prompt of their own.

A completion ends with the embed token. If the model closes its turn instead (`<|im_end|>`), or the limit
comes, the embed token is forced: the row then has an embedding, but `emitted` is False and the forced token
has no log-probability and no place in the loss mask.

Noise is folded from (key, prompt id, sample id, position), so a row's text does not depend on its batch.
`begin` and `advance` are the greedy loop in pieces, for whoever shows a text while it is written.
Axes: B prompts, G samples per prompt, T new tokens, P prompt length, D width, V vocab.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from r3jax.model.decoding import KVCache, decode_step
from r3jax.model.qwen2 import (
    Decoder,
    ModelConfig,
    logits,
    right_padded,
    unstack,
)
from r3jax.model.rows import Completions, SamplingState, evict, fewer, grown, home, lined, parts
from r3jax.model.sharding import BATCH, place

LOOK = 32  # tokens between two looks at how many rows are left
BLOCK = 128  # tokens of the vocabulary that are drawn from together


def draw(key: jax.Array, mass: Float[Array, " V"]) -> Int[Array, ""]:
    """A token with probability proportional to its mass, which need not sum to 1.

    First one of the blocks of tokens by their sums, then a token of it: two random numbers, where the Gumbel trick
    wants one for every token of the vocabulary.
    """
    u = jax.random.uniform(key, (2,))
    blocks = jnp.pad(mass, (0, -mass.shape[0] % BLOCK)).reshape(-1, BLOCK)
    block = _pick(u[0], blocks.sum(1))
    return block * BLOCK + _pick(u[1], blocks[block])


def _pick(u: jax.Array, mass: Float[Array, " n"]) -> Int[Array, ""]:
    """The first index at which the running sum exceeds the share u of the whole; never one without mass."""
    running = jnp.cumsum(mass)
    target = jnp.minimum(u * running[-1], jnp.nextafter(running[-1], jnp.float32(0)))
    return (running <= target).sum().astype(jnp.int32)


def sample(
    params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    prompt_ids: Int[Array, " B"],
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
    state = prefill(params, prompts, prompt_lengths, prompt_ids, config=config, group=group, max_new=max_new, room=LOOK)
    weights = unstacked(params, config)
    options = dict(config=config, group=group, temperature=temperature, embed_id=embed_id, stop_ids=stop_ids)
    left_early, shape = [], state.done.shape
    while True:
        state, left = decode(weights, state, key, look=LOOK, **options)
        left, slot = jax.device_get((left, state.slot))
        if not left or slot == max_new:
            break
        rows, now = fewer(int(left)), state.done.size // parts()
        if 2 * rows <= now:
            state, gone = evict(state, rows=rows)
            left_early.append(gone)
        if slot == state.cache.new_k[0].shape[3]:
            state = grown(state)
    return home([*left_early, (state.home, state.result)], shape=shape) if left_early else state.result


@partial(jax.jit, static_argnames=("config",))
def unstacked(params, config: ModelConfig):
    """`unstack`, for `decode` and `advance`."""
    return unstack(params, config)


@partial(jax.jit, static_argnames=("config", "max_new"))
def begin(
    params, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], *, config: ModelConfig, max_new: int
) -> SamplingState:
    """The state after the prompts are read, for `advance`: one sample of each, of which nothing is written yet."""
    options = dict(config=config, group=1, max_new=max_new, room=max_new)
    return prefill(params, prompts, prompt_lengths, prompt_lengths, **options)


@partial(jax.jit, static_argnames=("config", "embed_id", "stop_ids", "count"), donate_argnames=("state",))
def advance(
    weights, state: SamplingState, *, config: ModelConfig, embed_id: int, stop_ids: tuple[int, ...], count: int
) -> SamplingState:
    """At most `count` more tokens, greedily: until every row has ended, as `sample` at temperature 0. Takes `state`.

    `weights` as `unstacked` returns them.
    """
    step = partial(_step, weights, config, (embed_id, stop_ids))
    last = jnp.minimum(state.slot + count, state.result.tokens.shape[2])
    return jax.lax.while_loop(_going(last), step, state)


@partial(
    jax.jit,
    static_argnames=("config", "group", "temperature", "embed_id", "stop_ids", "look"),
    donate_argnames=("state",),
)
def decode(
    weights, state: SamplingState, key, *, config: ModelConfig, group: int, temperature, embed_id, stop_ids, look: int
):
    """`look` more tokens of each row, or fewer if all end; and the number of rows left, of the part that has most."""
    fold = jax.vmap(jax.vmap(lambda p, g: jax.random.fold_in(jax.random.fold_in(key, p), g)))
    keys = fold(state.prompt, state.home % group)
    step = partial(_step, weights, config, (embed_id, stop_ids), temperature=temperature, keys=keys)
    last = jnp.minimum(state.slot + look, state.result.tokens.shape[2])
    state = jax.lax.while_loop(_going(last), step, state)
    return state, place(lined(~state.done).sum(1).max(), P())


def _going(last):
    """Whether there is a row to write on, up to slot `last`."""
    return lambda s: (s.slot < last) & ~jnp.all(s.done)


@partial(jax.jit, static_argnames=("config", "group", "max_new", "room"))
def prefill(params, prompts, prompt_lengths, prompt_ids, *, config: ModelConfig, group: int, max_new: int, room: int):
    """Reads the prompts, each once for its group; the cache has room for so many new tokens."""
    batch = prompts.shape[0]
    positions, valid = right_padded(prompt_lengths, prompts.shape[1])
    read: Any = Decoder(config).apply({"params": params}, prompts, positions, valid)
    hidden, (k, v) = read
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)

    def full(shape, value, dtype):
        x = jnp.full(shape, value, dtype)
        return place(x, P(BATCH, *([None] * (len(shape) - 1))))

    def empty():
        shape = (batch, group, config.kv_heads, min(room, max_new), config.head_dim)
        return place(jnp.zeros(shape, k.dtype), P(BATCH, None, "tensor", None, None))

    def of_rows(x):
        return place(jnp.broadcast_to(x[:, None], (batch, group)), P(BATCH, None))

    layers = range(config.layers)
    cache = KVCache(
        prompt_k=tuple(k[i].swapaxes(1, 2) for i in layers),
        prompt_v=tuple(v[i].swapaxes(1, 2) for i in layers),
        prompt_valid=valid,
        new_k=tuple(empty() for _ in layers),
        new_v=tuple(empty() for _ in layers),
    )
    width = config.width
    return SamplingState(
        slot=jnp.zeros((), jnp.int32),
        start=of_rows(prompt_lengths),
        prompt=of_rows(prompt_ids),
        home=place((jnp.arange(batch * group) % (batch * group // parts())).reshape(batch, group), P(BATCH, None)),
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
    weights,
    config: ModelConfig,
    ends: tuple[int, tuple[int, ...]],
    s: SamplingState,
    *,
    temperature: float = 0.0,
    keys=None,
) -> SamplingState:
    """One token more for each row. `weights` as `unstack` returns them; `ends`: the embed token and the stops."""
    embed_id, stop_ids = ends
    max_new = s.result.tokens.shape[2]
    # Sampling looks at whole rows of the vocabulary: gather the split one first.
    z = place(logits(weights, config, s.hidden), P(BATCH, None, None)) / (temperature or 1.0)
    top = z.max(-1, keepdims=True)
    mass = jnp.exp(z - top)
    if temperature:
        slot_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, s.slot)
        token = jax.vmap(jax.vmap(draw))(slot_keys, mass)
    else:
        token = z.argmax(-1).astype(jnp.int32)
    logp = (jnp.take_along_axis(z, token[..., None], -1) - top)[..., 0] - jnp.log(mass.sum(-1))
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
    hidden, cache = decode_step(weights, config, token, s.start + s.slot, s.cache, s.slot)
    ended = live & (token == embed_id)
    r = r.replace(
        emitted=r.emitted | (ended & ~forced),
        embedding=jnp.where(ended[..., None], hidden.astype(jnp.float32), r.embedding),
    )
    stop = jnp.isin(token, jnp.asarray(stop_ids)) if stop_ids else jnp.zeros_like(live)
    return s.replace(slot=s.slot + 1, hidden=hidden, done=s.done | ended, closing=live & stop, cache=cache, result=r)
