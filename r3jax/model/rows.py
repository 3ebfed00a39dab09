"""The rows that a decoding loop writes: their state, how those that have ended leave, and how all come home.

Everything happens within a part of the batch, so nothing crosses devices.
Axes: B prompts, G samples per prompt, T new tokens, D width, N parts of the batch on the mesh, R rows of a part
(R = B G / N; once some have left, each that stays is a prompt of its own: G = 1, B = N R).
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from r3jax.model.decoding import KVCache
from r3jax.model.sharding import BATCH, batch_parts, has_mesh, out


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
    start: Int[Array, "B G"]  # length of the row's prompt
    prompt: Int[Array, "B G"]  # id of the row's prompt
    home: Int[Array, "B G"]  # the row's place in its part of the batch, by prompt and sample
    hidden: Float[Array, "B G D"]  # of the last token
    done: Bool[Array, "B G"]
    closing: Bool[Array, "B G"]  # the model ended its turn without the embed token
    cache: KVCache
    result: Completions


def fewer(left: int) -> int:
    """The shape that so many rows are put into: a power of two, 4 at least, for each compiles a loop."""
    return max(4, 1 << (left - 1).bit_length())


def parts() -> int:
    """N."""
    return batch_parts(jax.sharding.get_abstract_mesh()) if has_mesh() else 1


def _shaped(x, first: int, second: int):
    """x with its first two axes, split over the batch and not at all, as [first, second]."""
    rest = jax.typeof(x).sharding.spec[2:] if has_mesh() else ()
    return jnp.reshape(x, (first, second, *x.shape[2:]), out_sharding=out(P(BATCH, None, *rest)))


def lined(x):
    """[B, G, ...] as [N, R, ...]."""
    return _shaped(x, parts(), -1)


def _single(x):
    """[N, R, ...] as [N R, 1, ...]."""
    return _shaped(x, -1, 1)


def _taken(x, order):
    """Rows of x [N, R, ...] in an order [N, r]."""
    return jax.vmap(lambda rows, i: rows[i])(x, order)


@partial(jax.jit, static_argnames=("rows",))
def evict(state: SamplingState, *, rows: int):
    """The state of `rows` rows of each part, each with a prompt of its own, and (home, result) [N, R - rows] of the
    others, which have ended.
    """
    group = state.done.shape[1]
    order = jnp.argsort(lined(state.done).astype(jnp.int32), axis=1)  # those still written first; stable

    def split(x):
        x = _taken(lined(x), order)
        return x[:, :rows], x[:, rows:]

    def own(x):
        """What B prompts have, for each row that stays: [B, ...] to [N rows, ...]."""
        return _single(_taken(lined(x[:, None]), order[:, :rows] // group))[:, 0]

    def stay(tree):
        return jax.tree.map(lambda x: _single(split(x)[0]), tree)

    c = state.cache
    gone = jax.tree.map(lambda x: split(x)[1], (state.home, state.result))
    prompt_k, prompt_v, prompt_valid = jax.tree.map(own, (c.prompt_k, c.prompt_v, c.prompt_valid))
    new_k, new_v = stay((c.new_k, c.new_v))
    names = ("start", "prompt", "home", "hidden", "done", "closing", "result")
    fields = stay({name: getattr(state, name) for name in names})
    cache = KVCache(prompt_k, prompt_v, prompt_valid, new_k, new_v)
    return SamplingState(slot=state.slot, cache=cache, **fields), gone


@jax.jit
def grown(state: SamplingState) -> SamplingState:
    """With room for twice as many new tokens."""
    most = state.result.tokens.shape[2]

    def more(x):
        extra = min(x.shape[3], most - x.shape[3])
        return jnp.pad(x, [(0, 0)] * 3 + [(0, extra), (0, 0)])

    new_k, new_v = (jax.tree.map(more, x) for x in (state.cache.new_k, state.cache.new_v))
    return state.replace(cache=state.cache.replace(new_k=new_k, new_v=new_v))


@partial(jax.jit, static_argnames=("shape",))
def home(pieces, *, shape: tuple[int, int]) -> Completions:
    """The results of all rows [B, G, ...]; the last piece is of those that stayed, as [rows, 1, ...]."""
    *gone, last = pieces
    pieces = [*gone, jax.tree.map(lined, last)]
    homes, results = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pieces)
    order = jnp.argsort(homes, axis=1)
    return jax.tree.map(lambda x: _shaped(_taken(x, order), *shape), results)
