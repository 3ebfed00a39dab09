"""Parameters made in their sharded place."""

import re

import jax
import numpy as np
import pytest

from r3jax.errors import UserError
from r3jax.model.params import abstract, flatten, init
from r3jax.model.qwen2 import parameter_table
from r3jax.model.sharding import make_mesh, stored
from tests.tiny_model import sizes

EMBED_ID = 5


@pytest.fixture
def one():
    return make_mesh(devices=jax.devices()[:1])


def test_init_is_the_same_on_every_mesh_and_lies_where_it_should(one):
    config = sizes(tied=False)
    mesh = make_mesh(1, 4, 2)
    alone, spread = init(config, one, 0, EMBED_ID), init(config, mesh, 0, EMBED_ID)
    for name, leaf in flatten(spread).items():
        shape, axes = parameter_table(config)[name]
        assert leaf.shape == shape and leaf.sharding.mesh == mesh and leaf.sharding.spec == stored(axes)
        np.testing.assert_allclose(leaf, flatten(alone)[name], rtol=1e-6, atol=1e-8)
    # Each of the eight devices holds an eighth of a kernel.
    kernel = spread["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.size * 8 for shard in kernel.addressable_shards} == {kernel.size}
    promised = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract(config, mesh))
    assert promised == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), spread)


def test_init_follows_its_seed_and_the_embed_token_starts_at_the_mean(one):
    config = sizes(tied=False)
    made = [init(config, one, seed, EMBED_ID) for seed in (0, 0, 1)]
    first, same, other = (flatten(jax.device_get(tree)) for tree in made)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, same[name])
        if name.endswith("bias"):
            assert not np.any(leaf)
        elif name.endswith("scale"):
            assert np.all(leaf == 1)
        else:
            assert np.std(leaf) > 0 and not np.allclose(leaf, other[name])
        if name.endswith("table"):
            rest = np.delete(leaf, EMBED_ID, axis=0)
            replaced = config.vocab * leaf[EMBED_ID] - rest.sum(0)  # was a row like the others
            assert 0.5 < replaced.std() / rest.std() < 2
    kernels = [name for name in first if name.endswith("kernel")]
    draws = {first[name].ravel()[:4].tobytes() for name in kernels}
    assert len(draws) == len(kernels)  # no two kernels start alike


@pytest.mark.parametrize(
    ("mesh", "changes", "says"),
    [
        ((1, 8, 1), {"width": 12}, "config.mesh.fsdp=8 does not divide model.width=12"),
        ((1, 2, 4), {}, "config.mesh.tensor=4 does not divide model.kv_heads=2"),
        ((1, 4, 2), {"ffn": 33}, "config.mesh.tensor=2 does not divide model.ffn=33"),
        ((1, 4, 2), {"vocab": 25}, "config.mesh.tensor=2 does not divide model.vocab=25"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_refused(mesh, changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        init(sizes(**changes), make_mesh(*mesh), 0)
