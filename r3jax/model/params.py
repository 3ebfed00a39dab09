"""Parameters: init in their sharded place, and the one regex table to and from Hugging Face names."""

import pathlib
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from r3jax.errors import UserError
from r3jax.model.qwen2 import ModelConfig, parameter_table
from r3jax.model.sharding import stored


def flatten(tree) -> dict[str, jax.Array]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat):
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def specs(config: ModelConfig) -> dict:
    """The tree of PartitionSpecs of the stored parameters."""
    return unflatten({name: stored(axes) for name, (_, axes) in parameter_table(config).items()})


def shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(config))


def abstract(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Shapes, dtypes and, with a mesh, shardings of the parameters, without memory."""
    dtype = jnp.dtype(config.param_dtype)
    table = parameter_table(config)
    return unflatten(
        {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, stored(axes)))
            for name, (shape, axes) in table.items()
        }
    )


def init(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int, embed_token: int | None = None) -> dict:
    """Random parameters, made in their sharded place; the unsharded tree never exists.

    Kernels and tables are normal with deviation 0.02 as in Qwen-2.5, biases 0, scales 1. The row of
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


def count(config: ModelConfig) -> int:
    return sum(int(np.prod(shape)) for shape, _ in parameter_table(config).values())


# Hugging Face name -> (our name, our shape's axes as a permutation of the reshaped tensor).
# `to_ours(w, c)` reshapes and transposes one layer's tensor; `to_theirs` is its inverse.
def _kernel(out_shape):
    """torch Linear [out, in] <-> ours [in, *out]."""

    def to_ours(w, c):
        return np.moveaxis(w.reshape(*out_shape(c), c.width), -1, 0)

    def to_theirs(w, c):
        return np.moveaxis(w, 0, -1).reshape(-1, c.width)

    return to_ours, to_theirs


def _vector(shape):
    return (lambda w, c: w.reshape(shape(c))), (lambda w, c: w.reshape(-1))


def _heads(c):
    return (c.kv_heads, c.queries_per_kv, c.head_dim)


def _kv(c):
    return (c.kv_heads, c.head_dim)


def _ffn(c):
    return (c.ffn,)


def _same():
    return (lambda w, c: w), (lambda w, c: w)


HUGGING_FACE = [
    (r"model\.embed_tokens\.weight", "embed/table", _same()),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", "layers/attn_norm/scale", _same()),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", "layers/attn/q/kernel", _kernel(_heads)),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.bias", "layers/attn/q/bias", _vector(_heads)),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.weight", "layers/attn/k/kernel", _kernel(_kv)),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.bias", "layers/attn/k/bias", _vector(_kv)),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.weight", "layers/attn/v/kernel", _kernel(_kv)),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.bias", "layers/attn/v/bias", _vector(_kv)),
    (
        r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight",
        "layers/attn/o/kernel",
        (lambda w, c: w.T.reshape(*_heads(c), c.width), lambda w, c: w.reshape(-1, c.width).T),
    ),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", "layers/mlp_norm/scale", _same()),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight", "layers/mlp/gate/kernel", _kernel(_ffn)),
    (r"model\.layers\.(\d+)\.mlp\.up_proj\.weight", "layers/mlp/up/kernel", _kernel(_ffn)),
    (
        r"model\.layers\.(\d+)\.mlp\.down_proj\.weight",
        "layers/mlp/down/kernel",
        (lambda w, c: w.T, lambda w, c: w.T),
    ),
    (r"model\.norm\.weight", "final_norm/scale", _same()),
    (r"lm_head\.weight", "unembed/table", _same()),
]


def from_hugging_face(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """A Qwen-2.5 state dict (numpy) as our parameters (numpy). Every tensor must match exactly one rule, and
    every parameter must be set; else UserError names the tensor."""
    table = parameter_table(config)
    dtype = jnp.dtype(config.param_dtype)
    flat = {name: np.zeros(shape, dtype) for name, (shape, _) in table.items()}
    missing = {(name, i) for name in table for i in range(config.layers if name.startswith("layers/") else 1)}
    for key, tensor in tensors.items():
        if key == "lm_head.weight" and config.tied:
            continue
        hits = [(re.fullmatch(p, key), name, fn) for p, name, fn in HUGGING_FACE if re.fullmatch(p, key)]
        if len(hits) != 1:
            raise UserError(f"checkpoint: tensor {key!r} matches {len(hits)} rules of the Qwen-2.5 table, not one.")
        match, name, (to_ours, _) = hits[0]
        layer = int(match.group(1)) if match.groups() else 0
        if name not in table or (name, layer) not in missing:
            raise UserError(f"checkpoint: tensor {key!r} has no place in a model of {config.layers} layers.")
        into = flat[name][layer] if match.groups() else flat[name]
        try:
            into[...] = to_ours(np.asarray(tensor), config)
        except ValueError:
            raise UserError(
                f"checkpoint: tensor {key!r} has shape {tensor.shape}, the config asks for {into.shape}."
            ) from None
        missing.discard((name, layer))
    if missing:
        raise UserError(f"checkpoint: {len(missing)} parameters were not set, the first is {min(missing)[0]!r}.")
    return unflatten(flat)


def to_hugging_face(params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters as a Qwen-2.5 state dict (numpy): the inverse of `from_hugging_face`."""
    flat = {name: np.asarray(w) for name, w in flatten(params).items()}
    tensors = {}
    for pattern, name, (_, to_theirs) in HUGGING_FACE:
        if name not in flat:
            continue
        if name.startswith("layers/"):
            for i in range(config.layers):
                key = pattern.replace(r"(\d+)", str(i)).replace("\\", "")
                tensors[key] = np.ascontiguousarray(to_theirs(flat[name][i], config))
        else:
            tensors[pattern.replace("\\", "")] = np.ascontiguousarray(to_theirs(flat[name], config))
    return tensors


def load_hugging_face(folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh, embed_token: int):
    """Parameters from the safetensors files of a local Qwen-2.5 folder, placed on the mesh.

    The row of `embed_token` becomes the mean of the rows if the checkpoint's is all zero. Raises UserError for a
    folder without safetensors or a tensor that does not fit.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"config.init_from: {folder} holds neither checkpoints/ (a run) nor *.safetensors (Hugging Face)."
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= load_file(file)
    tree = from_hugging_face(tensors, config)
    for name in ("embed", "unembed"):
        if name in tree and not tree[name]["table"][embed_token].any():
            tree[name]["table"][embed_token] = tree[name]["table"].mean(0)
    return jax.device_put(tree, shardings(config, mesh))
