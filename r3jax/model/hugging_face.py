"""Qwen-2.5's tensors by their Hugging Face names: one table for both directions, read and placed one at a time.

A projection is there a plain matrix as torch's Linear keeps it, [outputs, inputs], here [*inputs, *outputs]; a
layer's tensors are separate there, stacked here.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.model.params import abstract, flatten, unflatten
from r3jax.model.qwen2 import ModelConfig, parameter_table
from r3jax.model.tensor_files import TensorFiles

HEAD = "lm_head.weight"
BLOCK = 4096  # rows of a table that are looked at together
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
      pattern: the whole Hugging Face name; a group in it is the layer. "model." is missing where the checkpoint is a
        Qwen2Model, such as sentence-transformers saves.
      name: of our parameter.
      inputs: how many of our leading axes (without the layers') the projection reads, 0 for its bias; None for a
        tensor that is the same on both sides.
    """

    pattern: str
    name: str
    inputs: int | None = None

    def key(self, layer: int | None) -> str:
        """The Hugging Face name in one layer."""
        return self.pattern.replace(r"(?:model\.)?", "model.").replace(r"(\d+)", str(layer)).replace("\\", "")

    def order(self, axes: int) -> Shape:
        """Our axes in their order: outputs, then inputs."""
        inputs = self.inputs or 0
        return (*range(inputs, axes), *range(inputs))

    def parted(self, shape: Shape) -> Shape:
        """Their shape before heads and head dim are flattened into one axis."""
        return tuple(shape[axis] for axis in self.order(len(shape)))

    def theirs(self, shape: Shape) -> Shape:
        """Their shape of our parameter of one layer."""
        if self.inputs is None:
            return shape
        outputs, inputs = shape[self.inputs :], shape[: self.inputs]
        return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        back = np.argsort(self.order(len(shape)))
        return tensor.reshape(self.parted(shape)).transpose(back)

    def to_theirs(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose(self.order(leaf.ndim)).reshape(self.theirs(leaf.shape))


_LAYER = r"(?:model\.)?layers\.(\d+)\."
TABLE = (
    Rule(r"(?:model\.)?embed_tokens\.weight", "embed/table"),
    Rule(_LAYER + r"input_layernorm\.weight", "layers/attn_norm/scale"),
    Rule(_LAYER + r"self_attn\.q_proj\.weight", "layers/attn/q/kernel", 1),
    Rule(_LAYER + r"self_attn\.q_proj\.bias", "layers/attn/q/bias", 0),
    Rule(_LAYER + r"self_attn\.k_proj\.weight", "layers/attn/k/kernel", 1),
    Rule(_LAYER + r"self_attn\.k_proj\.bias", "layers/attn/k/bias", 0),
    Rule(_LAYER + r"self_attn\.v_proj\.weight", "layers/attn/v/kernel", 1),
    Rule(_LAYER + r"self_attn\.v_proj\.bias", "layers/attn/v/bias", 0),
    Rule(_LAYER + r"self_attn\.o_proj\.weight", "layers/attn/o/kernel", 3),
    Rule(_LAYER + r"post_attention_layernorm\.weight", "layers/mlp_norm/scale"),
    Rule(_LAYER + r"mlp\.gate_proj\.weight", "layers/mlp/gate/kernel", 1),
    Rule(_LAYER + r"mlp\.up_proj\.weight", "layers/mlp/up/kernel", 1),
    Rule(_LAYER + r"mlp\.down_proj\.weight", "layers/mlp/down/kernel", 1),
    Rule(r"(?:model\.)?norm\.weight", "final_norm/scale"),
    Rule(r"lm_head\.weight", "unembed/table"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor belongs: our parameter `rule.name`, in one layer of it, there of this shape."""

    rule: Rule
    layer: int | None
    shape: Shape

    @property
    def theirs(self) -> Shape:
        return self.rule.theirs(self.shape)


def layout(config: ModelConfig) -> dict[str, Place]:
    """{Hugging Face name: place} of every tensor of a model, in the decoder's order."""
    table = parameter_table(config)
    stacked = [rule for rule in TABLE if rule.name.startswith("layers/")]
    alone = [rule for rule in TABLE if rule not in stacked and rule.name in table]
    # The embedding comes before the layers, norm and head after them.
    found = {rule.key(None): Place(rule, None, table[rule.name][0]) for rule in alone[:1]}
    for layer in range(config.layers):
        found |= {rule.key(layer): Place(rule, layer, table[rule.name][0][1:]) for rule in stacked}
    return found | {rule.key(None): Place(rule, None, table[rule.name][0]) for rule in alone[1:]}


def places(shapes: Mapping[str, Shape], config: ModelConfig) -> dict[str, Place]:
    """Where each tensor of a checkpoint belongs, by name and shape; the head of a tied model belongs nowhere.

    Every tensor must match one rule of the table and have its shape, every parameter must be set once; else
    UserError names the tensor.
    """
    missing = layout(config)
    names = set(missing)
    taken: dict[str, str] = {}
    found = {}
    for key, shape in shapes.items():
        if key == HEAD and config.tied:
            continue
        hits = [(rule, match) for rule in TABLE if (match := re.fullmatch(rule.pattern, key))]
        if len(hits) != 1:
            raise UserError(
                f"checkpoint: tensor {key!r} matches {len(hits)} rules of the Qwen-2.5 table, not one; "
                "give a Qwen-2.5 checkpoint."
            )
        rule, match = hits[0]
        name = rule.key(int(match.group(1)) if match.groups() else None)
        if name not in names:
            raise UserError(
                f"checkpoint: tensor {key!r} has no place in a model of {config.layers} layers; "
                "give the config.json that belongs to it."
            )
        if name in taken:
            raise UserError(
                f"checkpoint: tensor {taken[name]!r} is given twice, {key!r} is the same; leave one of them."
            )
        taken[name], found[key] = key, missing.pop(name)
        if tuple(shape) != found[key].theirs:
            raise UserError(
                f"checkpoint: tensor {key!r} has shape {tuple(shape)}, its config asks for {found[key].theirs}; "
                "give the config.json that belongs to it."
            )
    if missing:
        raise UserError(
            f"checkpoint: {len(missing)} tensors are missing, the first is {next(iter(missing))!r}; "
            "give all of its files, or the config.json that belongs to them."
        )
    return found


def _embedding(where: Mapping[str, Place]) -> str:
    """What this checkpoint calls its embedding table."""
    return next(key for key, place in where.items() if place.rule.name == "embed/table")


def _check_head(same: bool) -> None:
    if not same:
        raise UserError(
            f"checkpoint: tensor {HEAD!r} is not the embedding table, so the model is untied; "
            'set "tie_word_embeddings" to false in its config.json.'
        )


def from_hugging_face(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict:
    """A Qwen-2.5 state dict (numpy) as our parameters (numpy, in config.param_dtype).

    Raises UserError as `places` does, and for a tied model with a head that is not the embedding table.
    """
    where = places({key: tensor.shape for key, tensor in tensors.items()}, config)
    if config.tied and HEAD in tensors:
        _check_head(np.array_equal(tensors[HEAD], tensors[_embedding(where)]))
    dtype = jnp.dtype(config.param_dtype)
    flat = {name: np.empty(shape, dtype) for name, (shape, _) in parameter_table(config).items()}
    for key, place in where.items():
        flat[place.rule.name][... if place.layer is None else place.layer] = place.rule.to_ours(
            tensors[key], place.shape
        )
    return unflatten(flat)


def to_hugging_face(params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters as a Qwen-2.5 state dict (numpy): the inverse of `from_hugging_face`."""
    flat = flatten(params)
    return {key: tensor_of(flat, place) for key, place in layout(config).items()}


def tensor_of(flat: Mapping, place: Place) -> np.ndarray:
    """One tensor of a checkpoint, on the host, from our flat parameters (numpy, or jax on any mesh)."""
    leaf = flat[place.rule.name]
    if place.layer is not None:
        leaf = _layer(leaf, place.layer) if isinstance(leaf, jax.Array) else leaf[place.layer]
    return np.ascontiguousarray(place.rule.to_theirs(np.asarray(leaf)))


@jax.jit
def _layer(stack: jax.Array, layer) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def load_hugging_face(folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh, new_token: int | None):
    """Parameters from the safetensors of a local Qwen-2.5 folder, in config.param_dtype, placed on the mesh.

    One tensor is read at a time and goes straight to its place: beyond the shards that this host keeps, the host
    holds one tensor, and for a stacked one its copy on the devices.

    `new_token` is an id that the checkpoint has not learnt: its row becomes the mean of all rows. Raises UserError
    as `TensorFiles` and `places` do, and for a size that the mesh does not divide.
    """
    files = TensorFiles(folder)
    where = places(files.shapes, config)
    if config.tied and HEAD in files.shapes:
        _check_head(_same_rows(files, HEAD, _embedding(where)))
    target = flatten(abstract(config, mesh))
    flat = _zeros({name: leaf for name, leaf in target.items() if name.startswith("layers/")})
    for key, place in where.items():
        tensor, name = files.read(key), place.rule.name
        leaf = target[name]
        if name.endswith("/table") and new_token is not None:
            tensor[new_token] = _mean_row(tensor)
        if place.layer is None:
            flat[name] = _placed(tensor, leaf.sharding, leaf.dtype)
        else:
            flat[name] = _into_layer(flat[name], tensor, place)
        jax.block_until_ready(flat[name])
        del tensor  # or two would be in memory while the next is read
    return unflatten(flat)


def _zeros(target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    def make():
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in target.items()}

    return jax.jit(make, out_shardings={name: leaf.sharding for name, leaf in target.items()})()


def _placed(tensor: np.ndarray, sharding: NamedSharding, dtype) -> jax.Array:
    """Each device's part of a host array, copied and cast part by part."""
    return jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index].astype(dtype))


def _into_layer(stack: jax.Array, tensor: np.ndarray, place: Place) -> jax.Array:
    """Writes one layer of a stacked parameter in its memory. The devices transpose: numpy takes far longer."""
    order = place.rule.order(len(place.shape))
    spec = stack.sharding.spec[1:]
    there = NamedSharding(stack.sharding.mesh, P(*(spec[axis] for axis in order)))
    x = _placed(tensor.reshape(place.rule.parted(place.shape)), there, tensor.dtype)
    back = tuple(int(axis) for axis in np.argsort(order))
    return _write(stack, x, place.layer, back)


@partial(jax.jit, donate_argnums=0, static_argnames="back")
def _write(stack, x, layer, back):
    return jax.lax.dynamic_update_index_in_dim(stack, x.transpose(back).astype(stack.dtype), layer, 0)


def _mean_row(table: np.ndarray) -> np.ndarray:
    total = np.zeros(table.shape[1])
    for start in range(0, len(table), BLOCK):
        total += table[start : start + BLOCK].astype(np.float32).sum(0, dtype=np.float64)
    return (total / len(table)).astype(np.float32)


def _same_rows(files: TensorFiles, a: str, b: str) -> bool:
    if files.shapes[a] != files.shapes[b]:
        return False
    count = files.shapes[a][0]
    blocks = (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))
    return all(np.array_equal(files.read(a, rows), files.read(b, rows)) for rows in blocks)
