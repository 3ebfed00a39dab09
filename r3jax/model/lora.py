"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a frozen base, and small leaves beside its kernels.

An adapter is a tree of its own, in fp32 whatever the base is stored in, and with paths of its own: `lora_a`
[layers, inputs, rank] and `lora_b` [layers, rank, outputs] beside a target's `kernel`, and `token_row` [D] beside a
table: the embed token's row as it is used, for a frozen table would never learn the one token that the base has not
seen. `join` lays it over the base for the forward pass; the base by itself is the model with the adapter off.
Inputs and outputs are flat, heads in Hugging Face's order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.model.params import flatten, unflatten
from r3jax.model.qwen2 import Lora, ModelConfig, Table, parameter_table
from r3jax.model.sharding import out, stored

# target -> the module it sits in, and how many leading axes of its kernel (after the layers') are inputs
TARGETS = {
    "q": ("layers/attn/q", 1),
    "k": ("layers/attn/k", 1),
    "v": ("layers/attn/v", 1),
    "o": ("layers/attn/o", 3),
    "gate": ("layers/mlp/gate", 1),
    "up": ("layers/mlp/up", 1),
    "down": ("layers/mlp/down", 1),
}
LEAVES = ("lora_a", "lora_b", "token_row")


def adapter_table(c: ModelConfig) -> Table:
    """{name: (shape, logical axes)} of the adapter, as `parameter_table` is of the base; empty without one.

    A is stored as the kernel's inputs are and B as its outputs, so that one rule serves all ranks and the adapter's
    optimiser state is split too.
    """
    table: Table = {}
    if c.lora is None:
        return table
    base = parameter_table(c)
    for target in c.lora.targets:
        module, split = TARGETS[target]
        shape, axes = base[f"{module}/kernel"]
        left, right = _sizes(shape, split)
        table[f"{module}/lora_a"] = ((c.layers, left, c.lora.rank), (None, axes[1], None))
        table[f"{module}/lora_b"] = ((c.layers, c.lora.rank, right), (None, None, axes[1 + split]))
    table |= {f"{name}/token_row": ((c.width,), ("embed",)) for name in _tables(c)}
    return table


def abstract(config: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict:
    """Shapes, dtypes and shardings of an adapter, without memory."""
    return unflatten(
        {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, stored(axes)))
            for name, (shape, axes) in adapter_table(config).items()
        }
    )


def init(base, config: ModelConfig, mesh: jax.sharding.Mesh, seed: int) -> dict:
    """A new adapter that changes nothing: B is 0, and the token's row that of the base.

    A is uniform within 1 / sqrt(inputs), as PEFT draws it.
    """

    def make(base, key):
        flat = {}
        for i, (name, (shape, _)) in enumerate(adapter_table(config).items()):
            if name.endswith("lora_a"):
                bound = shape[1] ** -0.5
                key_here = jax.random.fold_in(key, 10_000 + i)  # beyond those of `params.init`
                flat[name] = jax.random.uniform(key_here, shape, minval=-bound, maxval=bound)
            elif name.endswith("lora_b"):
                flat[name] = jnp.zeros(shape)
            else:
                table = base[name.split("/")[0]]["table"]
                # A product, for a table that is split over its rows cannot be indexed.
                chosen = (jnp.arange(config.vocab) == config.lora.token).astype(jnp.float32)
                flat[name] = jnp.einsum(
                    "v,vd->d",
                    chosen,
                    table.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST,
                    out_sharding=out(stored(("embed",))),
                )
        return unflatten(flat)

    places = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=places)(base, jax.random.key(seed))


def split(params) -> tuple[dict, dict]:
    """(base, adapter) of weights that hold both; an adapter of {} where they hold none."""
    base: dict = {}
    adapter: dict = {}
    for name, leaf in flatten(params).items():
        (adapter if name.rsplit("/", 1)[-1] in LEAVES else base)[name] = leaf
    return unflatten(base), unflatten(adapter)


def alike(a: Lora, b: Lora) -> bool:
    """Whether an adapter of one kind is one of the other."""
    return (a.rank, a.alpha, a.token, set(a.targets)) == (b.rank, b.alpha, b.token, set(b.targets))


def join(base, trained):
    """All weights: what is trained, and of the base what that does not hold. `base` may be None."""
    return trained if base is None else unflatten({**flatten(base), **flatten(trained)})


@partial(jax.jit, static_argnames=("config", "dtype"))
def merge(params, config: ModelConfig, dtype: str | None = None) -> dict:
    """Weights with an adapter as ordinary weights that compute the same; without one, as they are.

    Summed in fp32, layer by layer, then cast to `dtype`, by default that of the base: in bf16 the sum loses what of
    the adapter is smaller than the kernel's last bit. Arrays on a mesh want `jax.set_mesh` of it around the call.
    """
    base, adapter = (flatten(tree) for tree in split(params))
    kept = {name: dtype or leaf.dtype for name, leaf in base.items()}
    axes = parameter_table(config)
    for target, (module, _) in TARGETS.items():
        name = f"{module}/kernel"
        if f"{module}/lora_a" not in adapter:
            continue
        left, right = _sizes(axes[name][0], TARGETS[target][1])
        spec = stored(axes[name][1][1:])
        flat_spec = P(spec[0], spec[TARGETS[target][1]])

        def one(layer, name=name, shape=axes[name][0][1:], spec=spec, flat_spec=flat_spec):
            kernel, a, b = layer
            change = jnp.einsum("ir,ro->io", a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=out(flat_spec))
            change = jnp.reshape(config.lora.scale * change, shape, out_sharding=out(spec))
            return (kernel.astype(jnp.float32) + change).astype(kept[name])

        base[name] = jax.lax.map(one, (base[name], adapter[f"{module}/lora_a"], adapter[f"{module}/lora_b"]))
    for name in _tables(config):
        if f"{name}/token_row" in adapter:
            table = base[f"{name}/table"].astype(kept[f"{name}/table"])
            here = jnp.arange(config.vocab)[:, None] == config.lora.token
            base[f"{name}/table"] = jnp.where(here, adapter[f"{name}/token_row"].astype(table.dtype), table)
    return unflatten({name: leaf.astype(kept[name]) for name, leaf in base.items()})


def _tables(c: ModelConfig) -> tuple[str, ...]:
    return ("embed",) if c.tied else ("embed", "unembed")


def _sizes(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    """Inputs and outputs of a stacked kernel, flat."""
    left = right = 1
    for i, size in enumerate(shape[1:]):
        left, right = (left * size, right) if i < split else (left, right * size)
    return left, right
