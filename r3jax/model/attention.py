"""Attention inside the rows of a batch, by a kernel of choice; all give the same, up to rounding.

- `xla`: holds all scores, [B, K, M, L, S] (on CPU a block's). Runs everywhere, and is quickest for short rows.
- `splash`: Pallas's SplashAttention for TPU. Blocks of scores only, and none above the diagonal.
- `cudnn`: cuDNN's fused attention, for NVIDIA GPUs and bfloat16; scores never reach memory, a bit per score does.

The kernels want lengths that are multiples of 128 (cuDNN's gradient has been seen to be NaN at others); shorter rows
are padded here. In every kernel padding sees padding, so that no row is without a key.

Axes: B batch, L length, S keys, K kv heads, M query heads per kv head, H head dim; N groups of E beginnings of C tokens
and, behind them, P packs each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from r3jax.errors import UserError
from r3jax.model.sharding import BATCH, RULES, has_mesh, out, platform

KERNELS = ("xla", "splash", "cudnn")  # the first runs everywhere
_HEADS = RULES["kv_heads"]
_MULTIPLE = 128
UNSEEN = -1e30  # a score; finite, so that a row without any key is too
_BLOCK = 512  # of splash: the largest that divides the length is taken
_LEAST = 32  # queries of a block on CPU


def runs(kernel: str, platform: str, compute_dtype: str) -> bool:
    """Whether the kernel runs on devices of this platform (jax's name of it), in this dtype."""
    return {"splash": platform == "tpu", "cudnn": (platform, compute_dtype) == ("gpu", "bfloat16")}.get(kernel, True)


def check(kernel: str, platform: str, compute_dtype: str) -> None:
    """UserError if the kernel does not run here."""
    if not runs(kernel, platform, compute_dtype):
        raise UserError(
            f"config.model.attention={kernel!r} does not run on {platform} in {compute_dtype}: splash needs a TPU, "
            "cudnn a GPU and config.model.compute_dtype='bfloat16'; take 'xla'."
        )


def visible(
    segments: Int[Array, "B L"] | Bool[Array, "B L"], before: Bool[Array, "B L C"] | None = None
) -> Bool[Array, "B L S"]:
    """What a token (second axis) sees: itself and what stands before it in its own segment; and, of keys that stand
    before the row, those that `before` says (S = C + L)."""
    length = segments.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, None, :] == segments[:, :, None])
    return seen if before is None else jnp.concatenate([before, seen], axis=2)


class Begun(NamedTuple):
    """What sees what where a group's tokens lie in one: beginnings, then the packs that follow them, end to end (N
    groups of E C + P L tokens, cut into rows of any length). `visible` of both, and which beginning a pack follows."""

    beginnings: Bool[Array, "NE C C"]
    packs: Bool[Array, "NP L C+L"]
    after: Bool[Array, "N P E"]


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis in fp32; a row without any key stays finite."""
    return jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), UNSEEN), axis=-1)


def attend(
    q: Float[Array, "B L K M H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    seen: Array | Begun,
    kernel: str = "xla",
) -> Float[Array, "B L K M H"]:
    """Attention of queries that are scaled already; keys may stand before those of the queries (S >= L).

    seen: what `visible` gives, made once for all layers, or `Begun`; for `splash`, which knows neither that nor keys
      before, the segments [B, L].
    """
    if isinstance(seen, Begun):
        return _begun(q, keys, values, seen, kernel)
    if kernel == "xla":
        return (_in_blocks if platform() == "cpu" else _plain)(q, keys, values, seen)
    fused = {"splash": _splash, "cudnn": _cudnn}[kernel]
    if has_mesh():  # a kernel is opaque to the partitioner: each device runs it on its rows and heads
        kv = P(BATCH, None, _HEADS, None)
        many = P(BATCH, None, _HEADS, None, None)
        seen_spec = P(BATCH, *[None] * (seen.ndim - 1))
        fused = jax.shard_map(fused, in_specs=(many, kv, kv, seen_spec), out_specs=many, check_vma=False)
    return fused(q, keys, values, seen)


def _begun(q, keys, values, seen, kernel):
    """Beginnings by themselves; the packs with the keys of the one that they follow before their own."""
    (groups, _, each), (first, ends, _), (count, own, _) = seen.after.shape, seen.beginnings.shape, seen.packs.shape
    split, shape = each * ends, q.shape
    q, keys, values = (_laid(x, (groups, split + count // groups * own), x.ndim - 2) for x in (q, keys, values))

    def after(begun, then):
        # A product, for its gradient is one too, where that of picking would be added up pack by pack.
        chosen = jnp.einsum(
            "npe,neckh->npckh",
            seen.after.astype(begun.dtype),
            _laid(begun, (groups, each, ends), 2),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.concatenate([_laid(chosen, (count, ends), 2), then], axis=1)

    begun = [_laid(x[:, :split], (first, ends), x.ndim - 2) for x in (q, keys, values)]
    packs = [_laid(x[:, split:], (count, own), x.ndim - 2) for x in (q, keys, values)]
    keys, values = (after(*both) for both in zip(begun[1:], packs[1:], strict=True))
    mixed = (attend(*begun, seen.beginnings, kernel), attend(packs[0], keys, values, seen.packs, kernel))
    mixed = [_laid(x, (groups, -1), 3) for x in mixed]
    return _laid(jnp.concatenate(mixed, axis=1), shape[:2], 3)


def behind(shared: Float[Array, "N C K H"], own: Float[Array, "B L K H"]) -> Float[Array, "B C+L K H"]:
    """Keys or values that each of N parts of the batch has once, before each row's own."""
    parts, length, *rest = shared.shape
    wide = jnp.broadcast_to(shared[:, None], (parts, len(own) // parts, length, *rest))
    return jnp.concatenate([_laid(wide, (len(own), length), 2), own], axis=1)


def _laid(x, lead: tuple[int, ...], heads: int):
    """With other axes before those of the heads, so many; the first is the batch's."""
    spec = P(BATCH, *[None] * (len(lead) - 1), _HEADS, *[None] * (heads - 1))
    return jnp.reshape(x, (*lead, *x.shape[-heads:]), out_sharding=out(spec))


def _in_blocks(q, keys, values, seen):
    """`_plain`, some queries at a time with the keys up to their last: none above the diagonal but next to it.

    On CPU it takes half the time, for scores of a block stay in the cache.
    """
    length, before = q.shape[1], keys.shape[1] - q.shape[1]
    count = next(n for n in (8, 4, 2, 1) if n == 1 or (length % n == 0 and length // n >= _LEAST))
    size = length // count

    def block(end):
        asking, to = slice(end - size, end), before + end
        return _plain(q[:, asking], keys[:, :to], values[:, :to], seen[:, asking, :to])

    return jnp.concatenate([block(end) for end in range(size, length + 1, size)], axis=1)


def _plain(q, keys, values, seen):
    batch, queries, kv_heads, group, dim = q.shape
    # Queries of one kv head end to end: scores stay in the order in which they are multiplied, else they, the largest
    # arrays of all, are transposed. On CPU that and adding the mask, where it would choose by it, take a third off the
    # attention. What is not seen must be finite for that.
    q = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, kv_heads, group * queries, dim)
    keys, values = (jnp.transpose(x, (0, 2, 1, 3)) for x in (keys, values))
    spec, shape = P(BATCH, None, None, None), (batch, group, queries, keys.shape[2])
    bias = jnp.broadcast_to(jnp.where(seen, 0.0, UNSEEN)[:, None], shape)
    bias = jnp.reshape(bias, (batch, 1, group * queries, -1), out_sharding=out(spec))
    weights = jax.nn.softmax(jnp.einsum("bkqh,bksh->bkqs", q, keys).astype(jnp.float32) + bias, axis=-1)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(q.dtype), values)
    return jnp.transpose(mixed.reshape(batch, kv_heads, group, queries, dim), (0, 3, 1, 2, 4))


def _padded(length: int, *arrays: jax.Array) -> list[jax.Array]:
    """With the second axis filled up to `length` with zeros."""
    return [jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in arrays]


def _splash(q, keys, values, segments):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas takes a while to import

    batch, length, kv_heads, group, dim = q.shape
    full = -(-length // _MULTIPLE) * _MULTIPLE
    q, keys, values, segments = _padded(full, q, keys, values, segments.astype(jnp.int32))
    q = jnp.transpose(q.reshape(batch, full, kv_heads * group, dim), (0, 2, 1, 3))
    keys, values = (jnp.transpose(x, (0, 2, 1, 3)) for x in (keys, values))
    size = next(s for s in (_BLOCK, _BLOCK // 2, _MULTIPLE) if full % s == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((full, full))] * (kv_heads * group))
    kernel = splash.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=platform() == "cpu"
    )
    mixed = jax.vmap(kernel)(q, keys, values, splash.SegmentIds(segments, segments))
    return jnp.transpose(mixed, (0, 2, 1, 3)).reshape(batch, full, kv_heads, group, dim)[:, :length]


def _cudnn(q, keys, values, seen):
    batch, length, kv_heads, group, dim = q.shape
    before = keys.shape[1] - length
    full = -(-length // _MULTIPLE) * _MULTIPLE
    whole = -(-(before + full) // _MULTIPLE) * _MULTIPLE  # room for a key of its own for each padded query
    q, (keys, values) = _padded(full, q)[0], _padded(whole, keys, values)
    seen = jnp.pad(seen, [(0, 0), (0, full - length), (0, whole - before - length)])
    seen |= jnp.eye(full, whole, before, dtype=bool)
    mixed = jax.nn.dot_product_attention(
        q.reshape(batch, full, kv_heads * group, dim),
        keys,
        values,
        mask=seen[:, None],
        scale=1.0,
        implementation="cudnn",
    )
    return mixed.reshape(batch, full, kv_heads, group, dim)[:, :length]
