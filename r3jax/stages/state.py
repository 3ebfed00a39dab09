"""What both stages share: the training state, the optimiser, and the shape of a stage."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from r3jax.losses import grad_cache
from r3jax.model.lora import join


@flax.struct.dataclass
class TrainState:
    """What the optimiser changes, and what it is held against. Lives on the devices, sharded as stored.

    Under LoRA `params` is the adapter alone, and `reference` the base: the KL term's reference is the model with its
    adapter off, in both stages, and there is no second copy of the weights.
    """

    step: Int[Array, ""]  # optimiser steps done in this stage
    params: Any  # what is trained: all weights, or an adapter
    opt_state: Any
    reference: Any  # frozen weights that the KL term looks at; None without one

    @property
    def weights(self):
        """All weights of the model as it is now."""
        return join(self.reference, self.params)


class Stage(Protocol):
    """A stage of training; `train.py` runs any of them in one loop."""

    name: str
    steps: int

    def next_batch(self, state: TrainState, step: int) -> tuple[Any, dict[str, float]]:
        """The batch of optimiser step `step` (from 1), on the devices, and what its making measured."""

    def update(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step; pure and jitted. The state is donated."""

    def consumed(self) -> list[int]:
        """Query rows of the records that the last batch, of all processes, took from the stream, in their order."""

    def samples(self) -> list[dict]:
        """Rows for the table of sampled completions; empty where there are none."""

    def host_state(self) -> dict:
        """Numpy arrays besides the TrainState that a checkpoint must hold."""

    def stream_state(self) -> Any:
        """The data iterator's state, as JSON."""

    def resume(self, host_state: dict, stream_state: Any) -> None:
        """Takes both back."""

    def close(self) -> None:
        """Ends the data workers; there will be no next batch."""


def optimiser(
    *, learning_rate: float, warmup: int, steps: int, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW, linear warm-up, cosine decay to a twentieth, clipped by global norm; its state is in fp32."""
    warmup = min(warmup, max(steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, max(steps, 1), learning_rate / 20
    )
    return in_float32(
        optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=weight_decay),
        )
    )


class Float32State(NamedTuple):
    """State of `in_float32` for weights held in less."""

    whole: Any  # the weights in fp32
    inner: Any


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with moments in fp32 and, for weights held in less, a whole copy that it steps and that they are rounded to.

    bf16 has 8 bits: a step under 1/256 of a weight, and at usual learning rates all are, would be lost.
    """

    def init(params):
        if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
            return tx.init(params)
        whole = optax.tree.cast(params, jnp.float32)
        return Float32State(whole, tx.init(whole))

    def update(gradient, state, params):
        gradient = optax.tree.cast(gradient, jnp.float32)
        if not isinstance(state, Float32State):
            return tx.update(gradient, state, params)
        updates, inner = tx.update(gradient, state.inner, state.whole)
        whole = optax.apply_updates(state.whole, updates)
        # `optax.apply_updates` adds in fp32 before it rounds, so this lands on the rounded whole weight.
        return jax.tree.map(lambda w, p: w - p, whole, params), Float32State(whole, inner)

    return optax.GradientTransformation(init, update)


def new_state(params, tx: optax.GradientTransformation, mesh, keep_reference: bool, base=None) -> TrainState:
    """A state at step 0 around `params`; the optimiser's state is born sharded like them.

    With a `base`, `params` are an adapter on it. The state takes the base over: the first step donates it.
    """
    # A step donates its state, so the reference, and the params the caller still holds, need copies.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())),
        params=copy(params),
        opt_state=jax.tree.map(lambda x: _placed(x, mesh), jax.jit(tx.init)(params)),
        reference=base if base is not None else copy(params) if keep_reference else None,
    )


def _placed(x: jax.Array, mesh) -> jax.Array:
    """Scalars of the optimiser come out of jit on one device; the whole mesh must hold them."""
    return x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, NamedSharding(mesh, P()))


def abstract_state(params: Any, tx: optax.GradientTransformation, mesh, keep_reference: bool) -> Any:
    """The shapes and shardings of `new_state` from abstract params: what a restore asks for."""
    replicated = NamedSharding(mesh, P())
    opt_state = jax.eval_shape(tx.init, params)
    shardings = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}

    def place(path, leaf):
        # Moments mirror the parameters: same path below mu and nu, same sharding.
        sharding = _at(params, path) if leaf.shape in shardings and leaf.shape else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(place, opt_state),
        reference=params if keep_reference else None,
    )


def _at(params, path):
    """The sharding of the parameter whose keys end `path`."""
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    node = params
    for key in keys:
        node = node[key]
    return node.sharding


def value_and_grad(encode: Callable, loss: Callable, params, batch, chunks: int):
    """((loss, metrics), gradient) of loss(encode(params, batch)); in `chunks` parts by gradient caching."""
    if chunks == 1:
        return jax.value_and_grad(lambda p: loss(encode(p, batch)), has_aux=True)(params)
    return grad_cache(encode, loss, params, batch, chunks, has_aux=True)


def apply(
    tx: optax.GradientTransformation, state: TrainState, gradient, loss: jax.Array | float = 0.0
) -> tuple[TrainState, dict]:
    """One optimiser step, the gradient's norm before clipping, and whether the step was skipped.

    Where loss or gradient is not finite, weights and optimiser stay as they are and only `step` counts on.
    """
    norm = optax.tree.norm(optax.tree.cast(gradient, jnp.float32))
    good = jnp.isfinite(norm) & jnp.isfinite(loss)

    def moved():
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    # No jnp.where: with it XLA's CPU threads begin gathers in different orders and wait for each other for ever.
    params, opt_state = jax.lax.cond(good, moved, lambda: (state.params, state.opt_state))
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {"grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}
