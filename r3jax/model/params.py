"""Parameters: flat and nested names, shapes and shardings without memory, init in their sharded place."""

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from r3jax.errors import UserError
from r3jax.model.qwen2 import ModelConfig, parameter_table
from r3jax.model.sharding import RULES, stored


def flatten(tree) -> dict:
    """A tree of parameters as {"layers/attn/q/kernel": leaf}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def abstract(config: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict:
    """Shapes, dtypes and shardings of the parameters, without memory.

    Raises UserError for a size of the model that its mesh axis does not divide.
    """
    for logical, field in (("embed", "width"), ("kv_heads",) * 2, ("ffn",) * 2, ("vocab",) * 2):
        axis = RULES[logical]
        parts, size = mesh.shape[axis], getattr(config, field)
        if size % parts:
            raise UserError(f"config.mesh.{axis}={parts} does not divide model.{field}={size}; choose a divisor of it.")
    dtype = jnp.dtype(config.param_dtype)
    table = parameter_table(config)
    return unflatten(
        {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, stored(axes)))
            for name, (shape, axes) in table.items()
        }
    )


def shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    """Where each parameter lives between steps. Raises UserError as `abstract` does."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh))


def init(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int, embed_token: int | None = None) -> dict:
    """Random parameters, made in their sharded place; the unsharded tree never exists.

    Kernels and tables are normal with deviation 0.02 as in Qwen-2.5 (1 / sqrt(inputs) fits the training
    queries of the tiny default sooner and retrieves a third worse on others), biases 0, scales 1. The row of
    `embed_token` starts as the mean of the table's rows (our choice).
    """
    dtype = jnp.dtype(config.param_dtype)

    def make(key):
        flat = {}
        for i, (name, (shape, _)) in enumerate(parameter_table(config).items()):
            if name.endswith("bias"):
                flat[name] = jnp.zeros(shape, dtype)
            elif name.endswith("scale"):
                flat[name] = jnp.ones(shape, dtype)
            else:
                draw = jax.random.normal(jax.random.fold_in(key, i), shape)
                flat[name] = (0.02 * draw).astype(dtype)
                if name.endswith("table") and embed_token is not None:
                    flat[name] = flat[name].at[embed_token].set(flat[name].mean(0))
        return unflatten(flat)

    return jax.jit(make, out_shardings=shardings(config, mesh))(jax.random.key(seed))
