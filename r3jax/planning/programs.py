"""The programs of a run, on abstract arrays: the functions that training jits, at the largest shapes that it meets.

Nothing is computed and no weight exists. Rows are as long as the config lets them be, so time is that of a step without
a short row, and memory an upper bound.

Axes: B queries or prompts, G samples per prompt, T new tokens, W prompt width.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.model import sampler
from r3jax.model.encoder import bucket_of, embed_jit
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.rows import Completions
from r3jax.model.sharding import BATCH, batch_parts
from r3jax.stages.rl import RL
from r3jax.stages.rollouts import Groups
from r3jax.stages.sft import SFT
from r3jax.stages.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    Attributes:
      read, trained, written: tokens of a call, over all devices: read forward only, read and trained on, sampled.
      cache: bytes of keys, values and their mask among its arguments on one device.
      copied: bytes on one device of its first argument that are not those of the state.
      trips: of the loop whose length only a run knows (decoding), at most; 1 where there is none.
    """

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    read: int = 0
    trained: int = 0
    written: int = 0
    trips: int = 1
    cache: float = 0.0
    copied: float = 0.0

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return self.function.lower(*self.args, **self.kwargs)


def supervised(stage: SFT, state: TrainState, mesh: Mesh, transform, record: dict, rows: int) -> Program:
    """The step of stage 1 on a batch of `rows` such records; `transform` is the stage's own."""
    row = transform(record, np.random.default_rng(0))
    stage.mesh = mesh  # the host's packing asks it for the number of shards
    batch = stage.packed({name: np.stack([value] * rows) for name, value in row.items()})
    tokens = sum(batch[name].computed() for name in ("query_packs", "doc_packs"))
    return Program("SFT step", stage.update, (state, _abstract(batch, mesh)), {}, trained=tokens)


def sampling(stage: RL, params, mesh: Mesh, rows: int) -> tuple[Program, Program]:
    """What `sample` runs for `rows` prompts with their groups: prefill, and decoding with the cache at its full size.

    Between the two the weights are unstacked, by a program that only copies.
    """
    c, m = stage.collector, stage.model
    width = _prompt_width(stage)
    prompts, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=NamedSharding(mesh, P()))
    args = (params, *_abstract((prompts, lengths, lengths), mesh))
    options = {name: c.sampling[name] for name in ("config", "group", "max_new")}
    with jax.set_mesh(mesh):
        full = jax.eval_shape(partial(sampler.prefill, **options, room=c.max_new), *args)
        weights = jax.eval_shape(partial(sampler.unstacked, config=m), params)
    full, weights = _on(mesh, full), _on(mesh, weights)
    first = Program(
        "prefill", sampler.prefill, args, options | {"room": min(sampler.LOOK, c.max_new)}, read=rows * width
    )
    then = Program(
        name="decoding",
        function=sampler.decode,
        args=(weights, full, key),
        kwargs={name: value for name, value in c.sampling.items() if name != "max_new"} | {"look": sampler.LOOK},
        written=rows * c.group * c.max_new,
        trips=c.max_new,
        cache=on_one(full.cache),
        copied=on_one(weights["layers"]),
    )
    return first, then


def policy_update(stage: RL, state: TrainState, mesh: Mesh, rows: int) -> Program:
    """The step of stage 2 on `rows` prompts whose completions all reach the limit."""
    c, stage.mesh = stage.collector, mesh
    width = _prompt_width(stage)
    shape = (rows, c.group)
    full = np.full(shape, c.max_new, np.int32)
    new = np.zeros((*shape, c.max_new), np.int32)
    longest = stage.chat.reasoning_extra + stage.lengths.query
    groups = Groups(
        query=np.zeros(rows, np.int32),
        known=np.zeros((rows, 1), np.int32),
        gains=np.ones((rows, 1), np.int32),
        prompts=np.zeros((rows, width), np.int32),
        prompt_lengths=np.full(rows, longest, np.int32),
        done=Completions(new, new.astype(np.float32), new > 0, full, full > 0, None),  # type: ignore[arg-type]
        rewards=np.zeros(shape),
        terms={},
        negatives=np.zeros((rows, c.hard_negatives), np.int32),
        dropped=np.zeros(rows, bool),
    )
    batch = stage.packed(stage.arrays(groups))
    tokens = batch["packs"].computed() + batch["doc_packs"].computed()
    return Program("policy update", stage.update, (state, _abstract(batch, mesh)), {}, trained=tokens)


def encoding(model: ModelConfig, params, mesh: Mesh, rows: int, longest: int) -> Program:
    """A batch of the corpus, every document `longest` tokens with its chat.

    More than what runs where `encode_rows` computes once what all documents begin with, or, on CPU, takes fewer rows.
    """
    rows = -(-rows // batch_parts(mesh)) * batch_parts(mesh)
    tokens, lengths = np.zeros((rows, bucket_of(longest)), np.int32), np.zeros(rows, np.int32)
    args = _abstract({"tokens": tokens, "lengths": lengths}, mesh)
    return Program("encoding", embed_jit, (params,), args | {"config": model}, read=rows * longest)


def on_one(tree) -> float:
    """Bytes that a tree of abstract arrays takes of one device."""
    return float(
        sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
    )


def _prompt_width(stage: RL) -> int:
    return bucket_of(stage.chat.reasoning_extra + stage.lengths.query)


def _on(mesh: Mesh, tree):
    """What `jax.eval_shape` says of arrays under the mesh, on its devices; it gives whole ones no sharding."""

    def leaf(x):
        spec = x.sharding.spec if x.sharding else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, tree)


def _abstract(batch, mesh: Mesh):
    """Host arrays as `put_batch` would place them."""

    def leaf(x):
        sharding = NamedSharding(mesh, P(BATCH, *[None] * (x.ndim - 1)))
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=sharding)

    return jax.tree.map(leaf, batch)
