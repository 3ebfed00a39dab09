"""Meshes: what they refuse, that 4x2 computes what 1x1 does, and that the big models type-check on one."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.base import QWEN2_5
from r3jax.errors import UserError
from r3jax.model import lora, sampler
from r3jax.model import params as model_params
from r3jax.model.decoding import KVCache, decode_step
from r3jax.model.encoder import embed
from r3jax.model.qwen2 import Lora, ModelConfig, hidden_states, logits
from r3jax.model.sampler import sample
from r3jax.model.sharding import (
    AXES,
    BATCH,
    batch_parts,
    make_mesh,
    out,
    place,
    put_batch,
    stored,
    used,
)
from tests.tiny_model import padded, sizes, weights

FIELDS = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied")


def test_one_size_may_be_what_is_left():
    assert make_mesh().shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert make_mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(-1, 1, 4).shape == {"data": 2, "fsdp": 1, "tensor": 4}
    mesh = make_mesh(1, 4, 2)
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Explicit}
    assert batch_parts(mesh) == 4 and batch_parts(make_mesh(2, 2, 2)) == 4


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ((1, 4, 1), "data=1 x fsdp=4 x tensor=1 does not multiply to the 8 devices there are"),
        ((1, 4, 4), "data=1 x fsdp=4 x tensor=4 does not multiply to the 8 devices there are"),
        ((3, -1, 1), "does not multiply to the 8 devices there are"),
        ((16, -1, 1), "does not multiply to the 8 devices there are"),
        ((-1, -1, 1), "only one of data, fsdp and tensor can be -1"),
        ((0, -1, 1), "config.mesh.data must be at least 1, or -1 for all devices left, not 0"),
        ((1, 1, -2), "config.mesh.tensor must be at least 1, or -1 for all devices left, not -2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_sentence(mesh, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        make_mesh(*mesh)
    sentence = str(caught.value)
    assert sentence.startswith("config.mesh") and sentence.endswith(".") and sentence.count(". ") == 0


def test_weights_are_stored_over_fsdp_and_tensor_and_used_over_tensor():
    axes = ("embed", "kv_heads", None, None)
    assert stored(axes) == P("fsdp", "tensor", None, None)
    assert used(axes) == P(None, "tensor", None, None)
    assert stored((None,)) == P(None)
    with pytest.raises(KeyError):
        stored(("embde",))


def test_batches_are_split_over_the_batch_axes():
    mesh = make_mesh(2, 2, 2)
    batch = {"x": np.arange(24).reshape(8, 3), "n": np.arange(8)}
    spread = put_batch(mesh, batch)
    assert spread["x"].sharding.spec == P(BATCH, None) and spread["n"].sharding.spec == P(BATCH)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), batch)
    assert {shard.data.shape for shard in spread["x"].addressable_shards} == {(2, 3)}


def test_without_a_mesh_placing_does_nothing():
    x = jnp.ones(4)
    assert place(x, P("fsdp")) is x and out(P("fsdp")) is None
    with jax.set_mesh(make_mesh(1, 4, 2)):
        assert out(P("fsdp")) == P("fsdp") and place(x, P("fsdp")).sharding.spec == P("fsdp")


def test_eight_devices_compute_what_one_does():
    """Hidden states, logits, vectors and gradients on 1x1x1, 1x4x2 (fsdp x tensor) and 2x2x2."""
    config = sizes(remat="full")
    tokens, lengths = padded(np.random.default_rng(0), [9, 4, 1, 6], 9, config.vocab)

    @jax.jit
    def everything(params, tokens, lengths):
        def loss(params):
            hidden = hidden_states(params, config, tokens, lengths)
            z = logits(params, config, hidden)
            return jax.nn.logsumexp(z, -1).mean(), (hidden, z, embed(params, config, tokens, lengths))

        return jax.value_and_grad(loss, has_aux=True)(params)

    host = jax.device_get(weights(config))
    results = []
    for shape in ((1, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            params = jax.device_put(host, model_params.shardings(config, mesh))
            value, gradient = everything(params, *put_batch(mesh, (tokens, lengths)))
        same = jax.tree.map(lambda g, p: g.sharding.spec == p.sharding.spec, gradient, params)
        assert all(jax.tree.leaves(same))  # gradients scatter back to where the weights are stored
        assert value[1][1].sharding.spec == P(BATCH, None, "tensor")
        results.append(jax.device_get((value, gradient)))
    for result in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), result, results[0])


# 32 rows at the beginning are more than the width, 16, and 4 times 2 are fewer: then they go to the weights.
@pytest.mark.parametrize(("group", "tied", "mesh"), [(8, False, (1, 4, 2)), (2, True, (2, 2, 2))])
def test_eight_devices_sample_what_one_does(monkeypatch, group, tied, mesh):
    monkeypatch.setattr(sampler, "LOOK", 2)  # so that rows leave, on each device as many
    config = sizes(vocab=12, tied=tied)
    host = jax.device_get(weights(config))
    prompts, lengths = padded(np.random.default_rng(0), [7, 2, 5, 4], 7, config.vocab)
    results = []
    for shape in ((1, 1, 1), mesh):
        where = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(where):
            done = sample(
                jax.device_put(host, model_params.shardings(config, where)),
                *put_batch(where, (prompts, lengths, np.arange(4, dtype=np.int32))),
                jax.random.key(0),
                config=config,
                group=group,
                max_new=12,
                temperature=1.0,
                embed_id=7,
                stop_ids=(3,),
            )
        results.append(jax.device_get(done))
    one, eight = results
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_array_equal(eight.mask, one.mask)
    np.testing.assert_allclose(eight.logp, one.logp, atol=1e-5)
    np.testing.assert_allclose(eight.embedding, one.embedding, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_few_rows_go_to_the_weights(adapted):
    """No weight is gathered for a decoding step of few rows, and each is for one of many; both compute the same."""
    config = sizes(layers=1, width=64, ffn=96, vocab=40, tied=False)
    mesh, adapter = make_mesh(2, 2, 2), Lora(2, 4.0, 0.0, ("q", "o", "gate", "down"), 7)
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.device_get(weights(config)), model_params.shardings(config, mesh))
        if adapted:
            config = dataclasses.replace(config, lora=adapter)
            added = jax.tree.map(lambda x: x + 0.1, lora.init(params, config, mesh, 0))
            params = lora.join(params, added)
        params = sampler.unstacked(params, config)
        found = {}
        for rows in (8, 256):
            shape = (rows // 2, 2)
            tokens = (np.arange(rows, dtype=np.int32) % 8).reshape(shape)
            args = put_batch(mesh, (tokens, tokens, np.ones((shape[0], 4), bool)))

            def step(params, tokens, positions, valid, config=config):
                prompt, new = jnp.ones((len(tokens), 2, 4, 8)), jnp.ones((*tokens.shape, 2, 4, 8))
                prompt, new = place(prompt, P(BATCH, "tensor")), place(new, P(BATCH, None, "tensor"))
                cache = KVCache((prompt,), (prompt,), valid, (new,), (new,))
                hidden, cache = decode_step(params, config, tokens, positions, cache, 0)
                return logits(params, config, hidden), cache.new_k

            done = jax.jit(step).lower(params, *args).compile()
            gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", done.as_text())
            largest = max((np.prod([int(n) for n in shape.split(",")]) for shape in gathered), default=0)
            assert (largest < 64 * 32) == (rows == 8), (rows, gathered)
            found[rows] = jax.device_get(done(params, *args))
    few, many = found[8], found[256]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[: len(a)], atol=2e-5), few, many)


@pytest.mark.parametrize(
    ("name", "shape", "published"),
    [
        ("qwen2_5_0_5b", (4, 2, 2), 494_032_768),
        ("qwen2_5_7b", (1, 16, 4), 7_615_616_512),
        ("qwen2_5_72b", (2, 64, 8), 72_706_203_648),
    ],
)
def test_published_sizes_type_check_on_an_abstract_mesh(name, shape, published):
    """Forward, backward and (where it traces in a second) sampling, without devices or memory."""
    sizes = dict(zip(FIELDS, QWEN2_5[name], strict=True))
    config = ModelConfig(**sizes, compute_dtype="bfloat16", remat="full")
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3)
    params = model_params.abstract(config, mesh)
    flat = model_params.flatten(params)
    assert sum(leaf.size for leaf in flat.values()) == published
    # Every kernel and table is split over all chips of fsdp and tensor.
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for path, leaf in flat.items():
        shard = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert path.endswith(("scale", "bias")) or shard * parts == leaf.size, path

    def rows(*shape):
        spec = P(BATCH, *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))

    def loss(params, tokens, lengths):
        z = logits(params, config, hidden_states(params, config, tokens, lengths))
        return jax.nn.logsumexp(z, -1).mean()

    batch = 2 * batch_parts(mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.eval_shape(jax.grad(loss), params, rows(batch, 512), rows(batch))
        for path, leaf in model_params.flatten(gradient).items():
            assert (leaf.shape, leaf.sharding) == (flat[path].shape, flat[path].sharding), path
        if config.layers <= 28:  # the decoding loop is unrolled over layers
            options = dict(config=config, group=8)
            ends = dict(embed_id=151665, stop_ids=(151645,))

            def draw(params, prompts, lengths, ids, key):
                state = sampler.prefill(params, prompts, lengths, ids, **options, max_new=32, room=32)
                weights = sampler.unstacked(params, config)
                return sampler.decode(weights, state, key, **options, **ends, temperature=1.0, look=32)[0].result

            key = jax.eval_shape(jax.random.key, 0)
            done = jax.eval_shape(draw, params, rows(batch, 128), rows(batch), rows(batch), key)
            assert done.tokens.shape == (batch, 8, 32)
            assert done.embedding.sharding.spec == P(BATCH, None, None)
