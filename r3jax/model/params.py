"""Parameters: init in their sharded place, and the one regex table to and from Hugging Face names."""

import pathlib
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file

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


# Rows of the table: regex of the Hugging Face name, our name, (to_ours, to_theirs). `to_ours(w, c)` reshapes
# and transposes one layer's tensor; `to_theirs` is its inverse.
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


def _key(pattern: str, layer: int) -> str:
    """The Hugging Face name that a pattern of the table stands for in one layer."""
    return pattern.replace(r"(\d+)", str(layer)).replace("\\", "")


def from_hugging_face(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """A Qwen-2.5 state dict (numpy) as our parameters (numpy, in config.param_dtype).

    Every tensor must match one rule of the table and have its shape, every parameter must be set once; else
    UserError names the tensor. A tied model may bring its lm_head, if that is the embedding table.
    """
    dtype = jnp.dtype(config.param_dtype)
    flat = {name: np.zeros(shape, dtype) for name, (shape, _) in parameter_table(config).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    missing: dict[tuple[str, int], str] = {}
    for pattern, name, (_, to_theirs) in HUGGING_FACE:
        if name in flat:
            stacked = name.startswith("layers/")
            shapes[name] = to_theirs(flat[name][0] if stacked else flat[name], config).shape
            missing |= {(name, i): _key(pattern, i) for i in range(config.layers if stacked else 1)}
    places = set(missing)
    for key, tensor in tensors.items():
        if key == "lm_head.weight" and config.tied:
            if not np.array_equal(tensor, tensors.get("model.embed_tokens.weight")):
                raise UserError(
                    f"checkpoint: tensor {key!r} is not the embedding table, so the model is untied; "
                    "set config.model.tied=False."
                )
            continue
        hits = [(match, name, fn) for p, name, fn in HUGGING_FACE if (match := re.fullmatch(p, key))]
        if len(hits) != 1:
            raise UserError(
                f"checkpoint: tensor {key!r} matches {len(hits)} rules of the Qwen-2.5 table, not one; "
                "give a Qwen-2.5 checkpoint."
            )
        match, name, (to_ours, _) = hits[0]
        layer = int(match.group(1)) if match.groups() else 0
        if (name, layer) not in places:
            raise UserError(
                f"checkpoint: tensor {key!r} has no place in a model of {config.layers} layers; "
                "set config.model to the checkpoint's sizes."
            )
        if (name, layer) not in missing:
            raise UserError(f"checkpoint: tensor {key!r} is given twice; leave one of the two.")
        if tensor.shape != shapes[name]:
            raise UserError(
                f"checkpoint: tensor {key!r} has shape {tensor.shape}, the config asks for {shapes[name]}; "
                "set config.model to the checkpoint's sizes."
            )
        into = flat[name][layer] if match.groups() else flat[name]
        into[...] = to_ours(tensor, config)
        del missing[name, layer]
    if missing:
        raise UserError(
            f"checkpoint: {len(missing)} tensors are missing, the first is {next(iter(missing.values()))!r}; "
            "give all of its files, or set config.model to its sizes."
        )
    return unflatten(flat)


def to_hugging_face(params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters as a Qwen-2.5 state dict (numpy): the inverse of `from_hugging_face`."""
    flat = {name: np.asarray(w) for name, w in flatten(params).items()}
    tensors = {}
    for pattern, name, (_, to_theirs) in HUGGING_FACE:
        if name in flat:
            layers = flat[name] if name.startswith("layers/") else [flat[name]]
            for i, w in enumerate(layers):
                tensors[_key(pattern, i)] = np.ascontiguousarray(to_theirs(w, config))
    return tensors


def load_hugging_face(folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh, new_token: int | None):
    """Parameters from the safetensors files of a local Qwen-2.5 folder, placed on the mesh.

    `new_token` is an id that the checkpoint has not learnt: its row becomes the mean of all rows. Raises UserError
    for a folder without safetensors, a damaged file or a tensor that does not fit.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"config.init_from: {folder} holds neither checkpoints/ (a run) nor *.safetensors (Hugging Face)."
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            part = load_file(file)
        except (SafetensorError, OSError) as e:
            raise UserError(f"config.init_from: {file} cannot be read ({e}); fetch it again.") from None
        if twice := tensors.keys() & part.keys():
            raise UserError(
                f"config.init_from: {folder} holds the tensor {min(twice)!r} in two files; leave one of them."
            )
        tensors |= part
    tree = from_hugging_face(tensors, config)
    for name in ("embed", "unembed"):
        if name in tree and new_token is not None:
            tree[name]["table"][new_token] = tree[name]["table"].mean(0, dtype=np.float32)
    return jax.device_put(tree, shardings(config, mesh))
