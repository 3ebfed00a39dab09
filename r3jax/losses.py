"""Losses of stage 1 as pure JAX functions: contrastive terms, token terms in chunks, and gradient caching.

All of them work bare and under an Explicit mesh with the batch axis sharded; what has to be gathered for
that is gathered visibly. Axis legend: B queries, M documents, H hard negatives, D width, N tokens, V
vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

CHUNK = 1024  # tokens whose logits a device computes at once


def info_nce(
    query: Float[Array, "B D"],
    docs: Float[Array, "M D"],
    positive: Int[Array, " B"],
    false_negatives: Bool[Array, "B M"],
    temperature: float,
    weights: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean over queries of -log softmax over documents of cosine / temperature (van den Oord et al. 2018).

    Args:
      docs: every document of the global batch: all devices' positives and hard negatives.
      positive: the index into `docs` of each query's document.
      false_negatives: documents to leave out of a query's denominator, known positives of it for one; its own
        positive is never left out.
      weights: of each query in the mean, >= 0; 1 where not given. All 0 gives a loss of 0.
    """
    scores = jnp.einsum("bd,md->bm", _unit(query), _gathered(_unit(docs))) / temperature
    own = jnp.arange(docs.shape[0])[None, :] == positive[:, None]
    scores = jnp.where(false_negatives & ~own, -jnp.inf, scores)
    # A sum over a one-hot mask: indexing a sharded axis by a sharded index is refused on an Explicit mesh.
    loss = jax.nn.logsumexp(scores, axis=1) - jnp.where(own, scores, 0.0).sum(axis=1)
    return _weighted_mean(loss, weights)


def triplet_margin(
    query: Float[Array, "B D"],
    positive: Float[Array, "B D"],
    negative: Float[Array, "B D"] | Float[Array, "B H D"],
    margin: float,
    mask: Float[Array, " B"] | Float[Array, "B H"] | None = None,
) -> Float[Array, ""]:
    """Mean over triplets of max(0, d(q, d+) - d(q, d-) + margin) with d = 1 - cosine.

    `mask` is 1 at the triplets that exist; without any the loss is 0.
    """
    if negative.ndim == 3:
        query, positive = query[:, None], positive[:, None]
    query = _unit(query)
    near = (query * _unit(positive)).sum(axis=-1)
    far = (query * _unit(negative)).sum(axis=-1)
    return _weighted_mean(jax.nn.relu(far - near + margin), mask)


class TokenTerms(NamedTuple):
    """What `token_terms` computes for each token [N], float32."""

    logp: jax.Array  # log-probability of the target
    entropy: jax.Array  # of the policy's distribution, nats
    kl: jax.Array  # KL(reference || policy) over the whole vocabulary, nats; 0 without a reference


def token_terms(
    hidden: Float[Array, "N D"],
    unembed: Array | Callable,
    targets: Int[Array, " N"],
    *,
    ref_hidden: Float[Array, "N D"] | None = None,
    ref_unembed: Array | Callable | None = None,
    used: Bool[Array, " N"] | None = None,
    chunk: int = CHUNK,
) -> TokenTerms:
    """Log-probability, entropy and exact KL of each token without ever holding logits [N, V].

    Chunks of about `chunk` tokens of each device go one after the other through the unembedding, and again in the
    backward pass (rematerialised), so memory is chunk * V. Each chunk also costs the table's gradient a reduction over
    all devices: hence as few chunks on many devices as on one. Differentiable in `hidden` and in whatever `unembed`
    holds.
    KL(reference || policy) keeps all that the reference thinks possible.

    Args:
      unembed: the table [V, D], or a function from hidden states [n, D] to logits [n, V].
      ref_hidden: the frozen reference's hidden states; no gradient flows there.
      ref_unembed: its unembedding; the policy's own where not given, with the gradient cut off.
      used: which tokens count; the terms of the others are 0, or what they would be. Texts are shorter than the window
        they have: those that count go first, and chunks without any are left out.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, it is {chunk}")
    logits_of = _logits_function(unembed)
    ref_logits_of = logits_of if ref_unembed is None else _logits_function(ref_unembed)

    @jax.checkpoint
    def one_chunk(part):
        hidden, targets, ref_hidden = part
        logp = jax.nn.log_softmax(logits_of(hidden).astype(jnp.float32), axis=-1)
        picked = jnp.where(jnp.arange(logp.shape[-1]) == targets[:, None], logp, 0.0).sum(axis=-1)
        entropy = -(jnp.exp(logp) * logp).sum(axis=-1)
        if ref_hidden is None:
            return TokenTerms(picked, entropy, jnp.zeros_like(entropy))
        ref_logits = jax.lax.stop_gradient(ref_logits_of(ref_hidden).astype(jnp.float32))
        ref_logp = jax.nn.log_softmax(ref_logits, axis=-1)
        kl = (jnp.exp(ref_logp) * (ref_logp - logp)).sum(axis=-1)
        return TokenTerms(picked, entropy, kl)

    @jax.checkpoint  # again: what a branch keeps for its backward pass, the table above all, is kept for each chunk
    def unless_unused(part):
        *inputs, counts = part
        nothing = jnp.zeros_like(inputs[1], jnp.float32)
        return jax.lax.cond(counts.any(), one_chunk, lambda _: TokenTerms(nothing, nothing, nothing), inputs)

    count = hidden.shape[0]
    chunks = -(-count // (chunk * _row_shards(hidden)))
    if used is None or chunks == 1:
        parts = jax.tree.map(lambda x: _split(x, chunks), (hidden, targets, ref_hidden))
        terms = jax.lax.map(one_chunk, parts)
        return jax.tree.map(lambda x: _join(x, count), terms)
    rows = jax.tree.map(lambda x: _filled(x, chunks), (hidden, targets, ref_hidden, used))
    order, back = _used_first(rows[-1], chunks)
    parts = jax.tree.map(lambda x: _split(_reordered(x, order), chunks), rows)
    terms = jax.lax.map(unless_unused, parts)
    return jax.tree.map(lambda x: _reordered(_join(x, rows[1].shape[0]), back)[:count], terms)


def grad_cache(encode_fn: Callable, loss_fn: Callable, params, batch, chunks: int, has_aux: bool = False):
    """Loss and gradient of `loss_fn(encode_fn(params, batch))`, encoding `chunks` parts one after the other.

    The gradient is that of the one big batch, the activations held are those of one part, the price is a
    second forward pass. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup" (GradCache, arXiv 2101.06983).

    Args:
      encode_fn: (params, part of the batch) to a pytree of floating-point arrays with one row per row of the
        part: embeddings, and per-row sums of other losses if wanted. A row must depend on its own row of the
        batch only.
      loss_fn: from that pytree for the whole batch to a scalar, or to (scalar, anything) with `has_aux`.
      batch: a pytree of arrays [B, ...]; `chunks` divides the rows of each device. An array may have fewer rows, as
        many for each chunk as for another: what a chunk's rows have in common.

    Returns:
      (loss, gradient), or ((loss, aux), gradient), as `jax.value_and_grad` would; the gradient is in fp32.
    """
    rows = _rows(batch, chunks)
    parts = jax.tree.map(lambda x: _split(x, chunks), batch)
    encoded = _encoded(encode_fn, params, parts, rows)
    value, upstream = jax.value_and_grad(loss_fn, has_aux=has_aux)(encoded)
    upstream = jax.tree.map(lambda x: _split(x, chunks), upstream)

    def add(total, part_and_upstream):
        part, upstream = part_and_upstream
        rows, pull_back = jax.vjp(lambda p: encode_fn(p, part), params)
        upstream = jax.tree.map(_laid_as, upstream, rows)  # parts of one row lose their sharding on the way
        return jax.tree.map(jnp.add, total, pull_back(upstream)[0]), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)  # bf16 would round each sum
    gradient, _ = jax.lax.scan(add, zeros, (parts, upstream))
    return value, gradient


def in_chunks(encode_fn: Callable, params, batch, chunks: int):
    """`encode_fn(params, batch)`, `chunks` parts one after the other; for what needs no gradient. As `grad_cache`."""
    if chunks == 1:
        return encode_fn(params, batch)
    rows = _rows(batch, chunks)
    return _encoded(encode_fn, params, jax.tree.map(lambda x: _split(x, chunks), batch), rows)


def _rows(batch, chunks: int) -> int:
    """How many rows a batch has; ValueError if `chunks` does not divide those of each device."""
    largest = max(jax.tree.leaves(batch), key=lambda x: x.shape[0])
    rows, shards = largest.shape[0], _row_shards(largest)
    if chunks < 1 or rows % (chunks * shards):
        raise ValueError(f"chunks must divide the {rows // shards} rows of each device, it is {chunks}")
    return rows


def _encoded(encode_fn: Callable, params, parts, rows: int):
    """The first `rows` encoded rows of `parts` [chunks, n, ...]."""
    encoded = jax.lax.map(lambda part: encode_fn(params, part), parts)
    return jax.tree.map(lambda x: _join(x, rows), encoded)


def _laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    spec = _spec(like)
    return x if spec is None else jax.reshard(x, spec)


def _logits_function(unembed) -> Callable:
    if callable(unembed):
        return unembed
    return lambda hidden: jnp.einsum("nd,vd->nv", hidden, unembed, preferred_element_type=jnp.float32)


def _unit(vectors: jax.Array) -> jax.Array:
    """Rows of length 1 in float32; a zero row stays zero, with a finite gradient."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt((vectors * vectors).sum(axis=-1, keepdims=True) + 1e-12)


def _weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return values.mean()
    total = weights.sum()
    return jnp.where(weights > 0, values * weights, 0.0).sum() / jnp.where(total > 0, total, 1.0)


def _gathered(x: jax.Array) -> jax.Array:
    """`x` whole on every device: the all-gather of a sharded batch."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, P(*[None] * x.ndim))


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """[N, ...] as [chunks, n, ...]: chunk c takes rows c, c + chunks, ..., zeros where N does not divide.

    Interleaved, so that n inherits a sharding of N and each device has a piece of every chunk.
    """
    x = _filled(x, chunks)
    return jnp.moveaxis(jnp.reshape(x, (-1, chunks, *x.shape[1:]), out_sharding=_spec(x, None)), 1, 0)


def _filled(x: jax.Array, chunks: int) -> jax.Array:
    """With zeros at its end, so that each device has as many rows for each chunk as for another."""
    short = -x.shape[0] % (chunks * _row_shards(x))
    return jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) if short else x


def _spec(x: jax.Array, *between) -> P | None:
    """The sharding of `x` with axes set in behind its first."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else P(sharding.spec[0], *between, *sharding.spec[1:])


def _used_first(used: jax.Array, chunks: int) -> tuple[jax.Array, jax.Array]:
    """An order of each device's rows [S, n] by which `_split` puts those that are used into its first chunks; and back.

    Both are sorted out on the device: S shards never look at each other's rows.
    """
    shards, spec = _row_shards(used), _spec(used, None)
    ours = jnp.reshape(used, (shards, -1), out_sharding=spec)
    order = jnp.argsort(~ours, axis=1, stable=True)
    order = jnp.reshape(order, (shards, chunks, -1), out_sharding=_spec(used, None, None))
    order = jnp.reshape(order.swapaxes(1, 2), ours.shape, out_sharding=spec)
    return order, jnp.argsort(order, axis=1)


def _reordered(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows [N, ...] in an order [S, n] of each shard's."""
    ours = jnp.reshape(x, (*order.shape, *x.shape[1:]), out_sharding=_spec(x, None))
    taken = jnp.take_along_axis(ours, order.reshape(*order.shape, *[1] * (x.ndim - 1)), axis=1)
    return jnp.reshape(taken, x.shape, out_sharding=_spec(x))


def _row_shards(x: jax.Array) -> int:
    """Into how many pieces the mesh splits the first axis of `x`."""
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] or ()
    return math.prod(sharding.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def _join(x: jax.Array, count: int) -> jax.Array:
    """The inverse of `_split` for the first `count` rows."""
    joined = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return joined if joined.shape[0] == count else joined[:count]
