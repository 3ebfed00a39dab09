"""Parameters to and from Hugging Face's names, and made in their sharded place."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from r3jax.errors import UserError
from r3jax.model.params import (
    abstract,
    flatten,
    from_hugging_face,
    init,
    load_hugging_face,
    to_hugging_face,
)
from r3jax.model.qwen2 import parameter_table
from r3jax.model.sharding import make_mesh, stored
from tests.tiny_model import reference, sizes, state_dict, weights

EMBED_ID = 5
Q_PROJ, K_PROJ, O_PROJ = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qko")
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def one():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bit_identical(tied, dtype):
    config = sizes(tied=tied, heads=14, param_dtype=dtype)
    ours = weights(config)
    theirs = to_hugging_face(ours, config)
    names = {name for name, _ in reference(config).named_parameters()}
    assert set(theirs) == names
    back = flatten(from_hugging_face(theirs, config))
    for name, leaf in flatten(ours).items():
        assert back[name].dtype == leaf.dtype == dtype
        assert back[name].tobytes() == np.asarray(leaf).tobytes(), name
    again = to_hugging_face(from_hugging_face(theirs, config), config)
    assert all(again[name].tobytes() == theirs[name].tobytes() for name in names)
    shapes = {name: tuple(w.shape) for name, w in reference(config).named_parameters()}
    assert {name: w.shape for name, w in theirs.items()} == shapes


def spoil(tensors, key, value=None):
    """The state dict with one tensor replaced, added, or (without a value) left out."""
    rest = {name: w for name, w in tensors.items() if name != key}
    return rest if value is None else rest | {key: value}


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("model.layers.0.self_attn.rotary.weight", lambda t: np.zeros(3), "matches 0 rules"),
        ("model.layers.2.mlp.up_proj.weight", lambda t: t["model.layers.1.mlp.up_proj.weight"], "no place"),
        ("model.layers.01.mlp.up_proj.weight", lambda t: t["model.layers.1.mlp.up_proj.weight"], "twice"),
        (Q_PROJ, lambda t: None, "1 tensors are missing"),
        ("model.layers.0.self_attn.v_proj.bias", lambda t: None, "1 tensors are missing"),
        (TABLE, lambda t: t[TABLE][:-1], r"\(23, 16\), the config asks for \(24, 16\)"),
        # Each of these would fit after a reshape or a broadcast.
        (Q_PROJ, lambda t: np.ascontiguousarray(t[Q_PROJ].T), "has shape"),
        (O_PROJ, lambda t: np.ascontiguousarray(t[O_PROJ].T), "has shape"),
        (K_PROJ, lambda t: t[K_PROJ].reshape(2, 8, 16), "has shape"),
        ("model.norm.weight", lambda t: np.ones(1, np.float32), "has shape"),
        ("lm_head.weight", lambda t: t[TABLE] + 1, "tied=False"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(key, change, says):
    config = sizes()
    tensors = to_hugging_face(weights(config), config)
    with pytest.raises(UserError, match=says) as caught:
        from_hugging_face(spoil(tensors, key, change(tensors)), config)
    assert f"'{key}'" in str(caught.value)


def test_a_tied_model_may_bring_its_head_and_an_untied_one_must():
    tied, untied = sizes(tied=True), sizes(tied=False)
    tensors = to_hugging_face(weights(tied), tied)
    from_hugging_face(tensors | {"lm_head.weight": tensors[TABLE].copy()}, tied)
    with pytest.raises(UserError, match="1 tensors are missing, the first is 'lm_head.weight'"):
        from_hugging_face(tensors, untied)


def test_a_folder_of_safetensors_is_read(tmp_path):
    config = sizes(tied=False)
    mesh = make_mesh(1, 4, 2)
    tensors = {name: w.copy() for name, w in state_dict(reference(config)).items()}
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:7]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[7:]}, tmp_path / "model-00002-of-00002.safetensors")
    params = load_hugging_face(tmp_path, config, mesh, EMBED_ID)
    for name, leaf in flatten(params).items():
        assert leaf.sharding.spec == stored(parameter_table(config)[name][1])
    got = to_hugging_face(params, config)
    kept = to_hugging_face(load_hugging_face(tmp_path, config, mesh, None), config)
    for name in names:
        np.testing.assert_array_equal(kept[name], tensors[name])
    # A token that the checkpoint has not learnt begins as the mean.
    for name in (TABLE, "lm_head.weight"):
        np.testing.assert_allclose(got[name][EMBED_ID], tensors[name].mean(0), atol=1e-6)
        tensors[name][EMBED_ID] = got[name][EMBED_ID]
    for name in names:
        np.testing.assert_array_equal(got[name], tensors[name])


def test_a_bfloat16_checkpoint_gives_float32_weights_and_a_sound_mean(tmp_path, one):
    config = sizes(vocab=4096)
    tensors = {n: w.astype(ml_dtypes.bfloat16) for n, w in to_hugging_face(weights(config), config).items()}
    tensors[TABLE] += ml_dtypes.bfloat16(1)
    save_file(tensors, tmp_path / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        params = load_hugging_face(tmp_path, dataclasses.replace(config, param_dtype=dtype), one, EMBED_ID)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        row = np.asarray(params["embed"]["table"][EMBED_ID], np.float32)
        np.testing.assert_allclose(row, tensors[TABLE].astype(np.float64).mean(0), rtol=1e-2)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, one):
    config = sizes()
    with pytest.raises(UserError, match=re.escape(f"config.init_from: {tmp_path} holds neither")):
        load_hugging_face(tmp_path, config, one, EMBED_ID)
    tensors = to_hugging_face(weights(config), config)
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds the tensor 'model.norm.weight' in two files"):
        load_hugging_face(tmp_path, config, one, EMBED_ID)
    (tmp_path / "b.safetensors").write_bytes(b"half of a fi")
    with pytest.raises(UserError, match="b.safetensors cannot be read"):
        load_hugging_face(tmp_path, config, one, EMBED_ID)


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
