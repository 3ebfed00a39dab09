"""The Qwen-2.5 decoder in flax.linen: RMSNorm, RoPE (rotate-half), grouped-query attention with bias on
q, k and v, SwiGLU; tied or untied unembedding. Source: transformers' Qwen2ForCausalLM, to which it is tested.

Axes: B batch, L length, S keys, D width, K kv heads, M query heads per kv head, H head dim, F ffn, V vocab,
P prompt length, G samples per prompt, T new tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from r3jax.model.attention import Begun, attend, behind, masked_softmax, visible
from r3jax.model.rope import rope
from r3jax.model.sharding import BATCH, brought, few, out, place, same_sums, used, where

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

UNROLLED = 8  # layers up to which `last_states` goes layer by layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) x A B. See `r3jax.model.lora`."""

    rank: int
    alpha: float
    dropout: float  # on x, in training only
    targets: tuple[str, ...]  # of q, k, v, o, gate, up, down
    token: int  # whose rows of the tables are trained too: the embed token, which the base has not learnt

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics; hashable, so jit sees it as static. Fields follow Qwen-2.5's config.json."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float = 1e6
    rope_factor: float = 1.0  # above 1: YaRN, for inputs up to so many times rope_original_length
    rope_original_length: int = 32768
    max_positions: int = 32768  # what a checkpoint says it was made for: kept for its readers, nothing here uses it
    norm_eps: float = 1e-6
    tied: bool = True
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"  # of `r3jax.model.attention`; decoding has its own
    lora: Lora | None = None

    @property
    def queries_per_kv(self) -> int:
        return self.heads // self.kv_heads


Shared = tuple[Float[Array, "*layers N P K H"], Float[Array, "*layers N P K H"]]  # keys and values
Table = dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]


def parameter_table(c: ModelConfig) -> Table:
    """{name: (shape, logical axes)} of every parameter: init, sharding, restore and conversion all follow it.

    Those under layers/ are stacked, with a leading axis of layers.
    """
    k, m, h = c.kv_heads, c.queries_per_kv, c.head_dim
    block: Table = {
        "attn_norm/scale": ((c.width,), (None,)),
        "attn/q/kernel": ((c.width, k, m, h), ("embed", "kv_heads", None, None)),
        "attn/q/bias": ((k, m, h), ("kv_heads", None, None)),
        "attn/k/kernel": ((c.width, k, h), ("embed", "kv_heads", None)),
        "attn/k/bias": ((k, h), ("kv_heads", None)),
        "attn/v/kernel": ((c.width, k, h), ("embed", "kv_heads", None)),
        "attn/v/bias": ((k, h), ("kv_heads", None)),
        "attn/o/kernel": ((k, m, h, c.width), ("kv_heads", None, None, "embed")),
        "mlp_norm/scale": ((c.width,), (None,)),
        "mlp/gate/kernel": ((c.width, c.ffn), ("embed", "ffn")),
        "mlp/up/kernel": ((c.width, c.ffn), ("embed", "ffn")),
        "mlp/down/kernel": ((c.ffn, c.width), ("ffn", "embed")),
    }
    table: Table = {"embed/table": ((c.vocab, c.width), ("vocab", "embed"))}
    table |= {f"layers/{name}": ((c.layers, *shape), (None, *axes)) for name, (shape, axes) in block.items()}
    table["final_norm/scale"] = ((c.width,), (None,))
    if not c.tied:
        table["unembed/table"] = ((c.vocab, c.width), ("vocab", "embed"))
    return table


class Linear(nn.Module):
    """A projection [B, L, *inputs] -> [B, L, *outputs] with a sharded weight, used as `sharding.where` says.

    It multiplies plain matrices: on CPU the gradient of an einsum over [B, L, ...] takes three times as long.
    Where the weights hold an adapter (lora_a, lora_b beside the kernel) it is on: to switch it off, leave it out.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes of the kernel, [*inputs, *outputs]
    config: ModelConfig
    bias: bool = False
    gathered: bool = True

    @nn.compact
    def __call__(self, x):
        c = self.config
        axes, rows = where(self.axes, self.gathered)
        left, right = math.prod(self.inputs), math.prod(self.outputs)
        shape = (*self.inputs, *self.outputs)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, c.param_dtype)
        kernel = brought(kernel.astype(c.compute_dtype), self.axes, self.gathered)
        row, column = axes[0], axes[len(self.inputs)]
        kernel = jnp.reshape(kernel, (left, right), out_sharding=same_sums(kernel, P(row, column)))
        flat = jnp.reshape(x, (-1, left), out_sharding=out(P(BATCH, used(self.axes)[0])))
        flat = place(flat, P(rows, row))
        # Where the sum goes over `fsdp`, each device gets that of its own rows.
        back = BATCH if row == "fsdp" else rows
        y = jnp.einsum("nd,df->nf", flat, kernel, out_sharding=out(P(back, column)))
        if self.has_variable("params", "lora_a"):
            y = y + self._adapted(flat, row, column, rows, back)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs, c.param_dtype)
            bias = place(bias.astype(c.compute_dtype), P(*axes[len(self.inputs) :]))
            y = y + jnp.reshape(bias, (right,), out_sharding=out(P(column)))
        column = used(self.axes)[len(self.inputs)]
        spec = P(BATCH, None, *used(self.axes)[len(self.inputs) :])
        return jnp.reshape(place(y, P(BATCH, column)), (*x.shape[:2], *self.outputs), out_sharding=out(spec))

    def _adapted(self, flat, row, column, rows, back):
        """(alpha / rank) x A B [n, outputs]; A is split as the kernel's inputs are, B as its outputs."""
        c, adapter = self.config, self.config.lora
        a, b = (self.get_variable("params", name).astype(c.compute_dtype) for name in ("lora_a", "lora_b"))
        if adapter.dropout and self.has_rng("dropout"):
            draw = jax.random.uniform(self.make_rng("dropout"), flat.shape, out_sharding=out(P(rows, row)))
            flat = jnp.where(draw < adapter.dropout, 0, flat / (1 - adapter.dropout)).astype(flat.dtype)
        low = jnp.einsum("nd,dr->nr", flat, place(a, P(row, None)), out_sharding=out(P(back, None)))
        b = place(b, P(None, column))
        return adapter.scale * jnp.einsum("nr,rf->nf", low, b, out_sharding=out(P(back, column)))


class RMSNorm(nn.Module):
    """Root mean square norm in fp32, whatever the compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.norm_eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    config: ModelConfig
    gathered: bool = True

    @nn.compact
    def __call__(self, x, positions, seen, before: Shared | None = None, memory=None, slot=None, at=None):
        """x [B, L, D] with `seen` as `attend` wants it: attention inside the sequence. With `at` [B] only that token of
        each row asks, so the output is [B, 1, D]. `before` are keys and values of what stands before all rows, as
        `shared_states` returns them, of one layer.

        With `memory` (one layer of a KVCache and prompt_valid) x holds one new token for each of L=G samples
        of a prompt: they attend to the shared prompt and to their own earlier tokens, whose slots 0..slot are
        filled. Returns the output [B, L, D] and this layer's (keys, values): those of x, or the new cache.
        """
        c = self.config
        k, m, h = c.kv_heads, c.queries_per_kv, c.head_dim
        linear = partial(Linear, config=c, bias=True, gathered=self.gathered)
        asking, places = (x, positions) if at is None else (token_at(x, at), token_at(positions[..., None], at)[..., 0])
        q = linear((c.width,), (k, m, h), ("embed", "kv_heads", None, None), name="q")(asking)
        keys = linear((c.width,), (k, h), ("embed", "kv_heads", None), name="k")(x)
        values = linear((c.width,), (k, h), ("embed", "kv_heads", None), name="v")(x)
        turn = partial(rope, theta=c.rope_theta, factor=c.rope_factor, original_length=c.rope_original_length)
        q, keys = turn(q, positions=places) * h**-0.5, turn(keys, positions=positions)
        if before is not None:
            keys, values = (behind(*both) for both in zip(before, (keys, values), strict=True))
        if memory is None:
            mixed = attend(q, keys, values, seen, c.attention if at is None else "xla")
            state = (keys, values)
        else:
            prompt_k, prompt_v, prompt_valid, new_k, new_v = memory
            new_k = jax.lax.dynamic_update_slice_in_dim(new_k, keys[:, :, :, None], slot, axis=3)
            new_v = jax.lax.dynamic_update_slice_in_dim(new_v, values[:, :, :, None], slot, axis=3)
            scores = jnp.concatenate(
                [jnp.einsum("bgkmh,bkph->bgkmp", q, prompt_k), jnp.einsum("bgkmh,bgkth->bgkmt", q, new_k)], -1
            )
            size, steps = prompt_k.shape[2], new_k.shape[3]
            filled = jnp.broadcast_to(jnp.arange(steps) <= slot, (x.shape[0], steps))
            filled = place(filled, P(BATCH, None))
            valid = jnp.concatenate([prompt_valid, filled], axis=-1)[:, None, None, None]
            weights = masked_softmax(scores, valid).astype(x.dtype)
            mixed = jnp.einsum("bgkmp,bkph->bgkmh", weights[..., :size], prompt_v)
            mixed += jnp.einsum("bgkmt,bgkth->bgkmh", weights[..., size:], new_v)
            state = (new_k, new_v)
        axes = ("kv_heads", None, None, "embed")
        y = Linear((k, m, h), (c.width,), axes, c, gathered=self.gathered, name="o")(mixed)
        return y, state


def token_at(x: Shaped[Array, "B L D"], at: Int[Array, " B"]) -> Shaped[Array, "B 1 D"]:
    """One token of each row."""
    return place(jnp.take_along_axis(x, at[:, None, None], axis=1), P(BATCH, None, None))


class MLP(nn.Module):
    config: ModelConfig
    gathered: bool = True

    @nn.compact
    def __call__(self, x):
        c = self.config
        linear = partial(Linear, config=c, gathered=self.gathered)
        gate = linear((c.width,), (c.ffn,), ("embed", "ffn"), name="gate")(x)
        up = linear((c.width,), (c.ffn,), ("embed", "ffn"), name="up")(x)
        return linear((c.ffn,), (c.width,), ("ffn", "embed"), name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: ModelConfig
    gathered: bool = True

    @nn.compact
    def __call__(self, x, positions, seen, before=None, memory=None, slot=None, at=None):
        c = self.config
        attention, mlp = Attention(c, self.gathered, name="attn"), MLP(c, self.gathered, name="mlp")
        mixed, state = attention(RMSNorm(c, name="attn_norm")(x), positions, seen, before, memory, slot, at)
        x = (x if at is None else token_at(x, at)) + mixed
        x = x + mlp(RMSNorm(c, name="mlp_norm")(x))
        return x, state


class Embed(nn.Module):
    config: ModelConfig
    gathered: bool = True

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        axes, rows = where(("vocab", "embed"), self.gathered)
        table = self.param("table", nn.initializers.normal(0.02), (c.vocab, c.width), c.param_dtype)
        table = brought(table.astype(c.compute_dtype), ("vocab", "embed"), self.gathered)
        tokens = place(tokens, P(rows, None))
        x = place(table.at[tokens].get(out_sharding=out(P(rows, None, axes[1]))), P(BATCH, None, None))
        if self.has_variable("params", "token_row"):
            row = place(self.get_variable("params", "token_row").astype(c.compute_dtype), P(None))
            x = jnp.where((place(tokens, P(BATCH, None)) == c.lora.token)[..., None], row, x)
        return x


class Decoder(nn.Module):
    """Tokens to the hidden states after the final norm (what transformers calls hidden_states[-1]).

    Layers are scanned: one compilation for all of them. `decode_step` runs them unrolled, on weights that
    were unstacked before the decoding loop.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        segments: Int[Array, "B L"] | Bool[Array, "B L"] | Begun,
        before: Shared | None = None,
    ):
        """Returns hidden [B, L, D] and the keys and values of all layers, each [layers, B, L, K, H].

        A token sees what stands before it in its own segment, and itself; segment 0 (False) is padding. Rows of packs
        that follow a beginning have a `Begun` in place of segments. With `before`, of `shared_states`, all see that
        too, and the keys and values returned begin with it. Splash can do neither.
        """
        c = self.config
        x = Embed(c, name="embed")(tokens)
        seen = segments if isinstance(segments, Begun) or c.attention == "splash" else _seen(segments, before)
        block = Block
        if REMAT[c.remat] is not None:
            block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.layers,
        )
        x, cache = stack(c, name="layers")(x, positions, seen, before)
        x = RMSNorm(c, name="final_norm")(x)
        return x, cache


def right_padded(lengths: Int[Array, " B"], length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and valid mask, each [B, L], of right-padded rows: from lengths, never from ids."""
    index = jnp.arange(length)
    valid = index[None, :] < lengths[:, None]
    positions = place(jnp.broadcast_to(index, valid.shape), P(BATCH, None))
    return positions, valid


def hidden_states(
    params, config: ModelConfig, tokens: Int[Array, "B L"], lengths: Int[Array, " B"], dropout: jax.Array | None = None
) -> Float[Array, "B L D"]:
    """Hidden states of right-padded rows; those past a row's length mean nothing.

    `dropout` is a random key: with one, an adapter drops inputs as its config says.
    """
    positions, valid = right_padded(lengths, tokens.shape[1])
    rngs = None if dropout is None else {"dropout": dropout}
    return Decoder(config).apply({"params": params}, tokens, positions, valid, rngs=rngs)[0]


def shared_states(params, config: ModelConfig, head: Int[Array, "N P"]) -> Shared:
    """Keys and values [layers, N, P, K, H] of ids that many rows begin with, once for each of N parts of the batch."""
    positions, valid = right_padded(jnp.full_like(head[:, 0], head.shape[1]), head.shape[1])
    read: Any = Decoder(config).apply({"params": params}, head, positions, valid)
    return read[1]


def last_states(
    params,
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    before: Shared | None = None,
) -> Float[Array, "B D"]:
    """The hidden state at each right-padded row's last token: `hidden_states` there, without what nothing reads.

    In the last layer only that token asks, and only it passes the MLP. To leave the last layer out of the scan its
    weights are taken from the stack, which copies all layers' where there are many: then the gain is small too.
    With `before`, of `shared_states`, the rows are what follows there (with the xla kernel).
    """
    positions, valid = right_padded(lengths, tokens.shape[1])
    length = _length(before)
    positions = positions + length
    if config.layers > UNROLLED:
        hidden, _ = Decoder(config).apply({"params": params}, tokens, positions, valid, before=before)
        return token_at(hidden, lengths - 1)[:, 0]
    seen = valid if config.attention == "splash" else _seen(valid, before)
    *others, last = unstack(params, config)["layers"]
    shared = [jax.tree.map(lambda x, i=i: x[i], before) for i in range(config.layers)]
    x: Any = Embed(config).apply({"params": params["embed"]}, tokens)
    for layer, kv in zip(others, shared, strict=False):
        x, _ = Block(config).apply({"params": layer}, x, positions, seen, kv)
    seen = jnp.pad(valid, [(0, 0), (length, 0)], constant_values=True)[:, None]
    x, _ = Block(config).apply({"params": last}, x, positions, seen, shared[-1], at=lengths - 1)
    x = RMSNorm(config).apply({"params": params["final_norm"]}, x)
    return x[:, 0]


def _seen(segments, before: Shared | None) -> jax.Array:
    """`visible`, where all that stands before is seen."""
    ones = None if before is None else jnp.ones((*segments.shape, _length(before)), bool)
    return visible(segments, ones if ones is None else place(ones, P(BATCH, None, None)))


def _length(before: Shared | None) -> int:
    return 0 if before is None else before[0].shape[-3]


def unembedding(params, config: ModelConfig, gathered: bool = True) -> Float[Array, "V D"]:
    """The table that turns hidden states into logits, where it is used."""
    table = params["embed" if config.tied else "unembed"]["table"]
    return brought(table.astype(config.compute_dtype), ("vocab", "embed"), gathered)


def head(
    params, config: ModelConfig, gathered: bool = True
) -> Callable[[Float[Array, "... D"]], Float[Array, "... V"]]:
    """The function from hidden states to logits in fp32; the vocabulary stays split over `tensor`."""
    table = unembedding(params, config, gathered)
    axes, rows = where(("vocab", "embed"), gathered)
    # An adapter's row gives one logit: a table with the row put into it would cost a gradient of [V, D].
    row = params["embed" if config.tied else "unembed"].get("token_row")

    def of(hidden):
        spec = P(BATCH, *([None] * (hidden.ndim - 2)))
        dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
        met = place(hidden, P(rows, *spec[1:], axes[1]))
        z = dot("...d,vd->...v", met, table, out_sharding=out(P(*spec, "tensor")))
        if row is None:
            return z
        own = dot("...d,d->...", hidden, place(row.astype(config.compute_dtype), P(None)), out_sharding=out(spec))
        ids = place(jnp.arange(z.shape[-1]), P("tensor"))
        return jnp.where(ids == config.lora.token, own[..., None], z)

    return of


def logits(params, config: ModelConfig, hidden: Float[Array, "B G D"]) -> Float[Array, "B G V"]:
    """Logits in fp32 of a decoding step's hidden states, as `head` computes them."""
    return head(params, config, not few(hidden.shape[0] * hidden.shape[1], config.width))(hidden)


def unstack(params, config: ModelConfig) -> dict:
    """The same parameters with a tuple of per-layer trees: done once, before a decoding loop."""
    layers = tuple(jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(config.layers))
    return {**params, "layers": layers}
