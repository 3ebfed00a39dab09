"""Adapters: what they are, that off is the base and merged is on, meshes, the sampler, and who gets a gradient."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import lora
from r3jax.model import params as model_params
from r3jax.model.qwen2 import Lora, ModelConfig, hidden_states, logits
from r3jax.model.sampler import sample
from r3jax.model.sharding import make_mesh, put_batch, stored
from r3jax.stages.state import optimiser
from tests.tiny_model import padded, sizes, weights

EMBED = 7
ALL = tuple(lora.TARGETS)


def adapted(targets=ALL, rank=3, dropout=0.0, **changes) -> ModelConfig:
    return sizes(lora=Lora(rank, 5.0, dropout, targets, EMBED), **changes)


def trained(config: ModelConfig, seed: int = 0) -> dict:
    """An adapter in which every leaf matters: B is not 0 and the rows are not the base's."""
    rng = np.random.default_rng(seed)
    table = lora.adapter_table(config)
    return model_params.unflatten(
        {n: jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32) for n, (s, _) in table.items()}
    )


@pytest.fixture(scope="module")
def rows():
    """Right-padded rows in which the embed token occurs."""
    tokens, lengths = padded(np.random.default_rng(0), [9, 4, 2, 6], 9, 24)
    tokens[:, 1] = EMBED
    return tokens, lengths


@partial(jax.jit, static_argnames="config")
def forward(params, tokens, lengths, *, config, dropout=None):
    hidden = hidden_states(params, config, tokens, lengths, dropout)
    return hidden, logits(params, config, hidden)


def seen(result, lengths):
    """Only what means something: positions before each row's end."""
    return [np.concatenate([np.asarray(x)[i, :n] for i, n in enumerate(lengths)]) for x in result]


# What an adapter is.


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_share_and_optimiser_bytes_are_as_counted_by_hand(tied):
    config = adapted(rank=8, tied=tied, heads=6)  # width 16, 6 heads on 2 of 8, ffn 32, 2 layers, 24 rows
    q, kv, ffn, width = 6 * 8, 2 * 8, 32, 16
    per_layer = 8 * ((width + q) + 2 * (width + kv) + (q + width) + 2 * (width + ffn) + (ffn + width))
    count = 2 * per_layer + (16 if tied else 32)
    leaves = jax.tree.leaves(lora.abstract(config, make_mesh()))
    assert sum(leaf.size for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    base = sum(leaf.size for leaf in jax.tree.leaves(model_params.abstract(config, make_mesh())))
    kernels = 2 * (width * q + 2 * width * kv + q * width + 3 * width * ffn)
    biases = 2 * (q + 2 * kv) + 2 * 2 * width + width
    assert base == kernels + biases + (1 if tied else 2) * 24 * width
    tx = optimiser(learning_rate=1e-3, warmup=0, steps=10, weight_decay=0.0, clip_norm=1.0)
    state = jax.eval_shape(tx.init, lora.abstract(config, make_mesh()))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == 2 * 4 * count


def test_rank_8_on_qwen_0_5b_trains_what_the_paper_counts():
    config = ModelConfig(24, 896, 14, 2, 64, 4864, 151936, lora=Lora(8, 32.0, 0.0, ("q", "v"), 151665))
    count = sum(int(np.prod(shape)) for shape, _ in lora.adapter_table(config).values())
    assert count == 24 * 8 * ((896 + 896) + (896 + 128)) + 896  # 541,568 of 494,032,768: 0.11 %


@pytest.mark.parametrize("targets", [("q",), ("o", "down"), ALL])
def test_only_the_targets_get_leaves(targets):
    names = set(lora.adapter_table(adapted(targets)))
    modules = {lora.TARGETS[t][0] for t in targets}
    assert names == {f"{m}/lora_{x}" for m in modules for x in "ab"} | {"embed/token_row"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_adapter_changes_nothing(rows, tied):
    config = adapted(tied=tied)
    base = weights(config)
    new = jax.device_get(lora.init(base, config, make_mesh(devices=jax.devices()[:1]), 0))
    for on, off in zip(*(forward(p, *rows, config=config) for p in (base, lora.join(base, new))), strict=True):
        np.testing.assert_allclose(on, off, atol=2e-6)  # the token's logit is another product of the same numbers
    flat = model_params.flatten(new)
    for name, leaf in flat.items():
        if name.endswith("lora_a"):
            bound = leaf.shape[1] ** -0.5  # kaiming uniform with a = sqrt(5): what PEFT draws
            assert 0.8 * bound < np.abs(leaf).max() <= bound and abs(np.mean(leaf)) < 0.2 * bound
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.15)
        elif name.endswith("lora_b"):
            assert not np.any(leaf)
        else:
            np.testing.assert_array_equal(leaf, base[name.split("/")[0]]["table"][EMBED])
    other = lora.init(base, config, make_mesh(devices=jax.devices()[:1]), 1)
    assert np.any(model_params.flatten(other)["layers/attn/q/lora_a"] != flat["layers/attn/q/lora_a"])


def test_split_undoes_join():
    config = adapted()
    base, adapter = weights(config), trained(config)
    jax.tree.map(np.testing.assert_array_equal, lora.split(lora.join(base, adapter)), (base, adapter))
    assert lora.split(base)[1] == {} and lora.join(None, base) is base


# On, off, merged.


@pytest.mark.parametrize("target", ALL)
def test_each_target_adds_its_low_rank_product(rows, target):
    """Against the formula with the whole kernel: W + (alpha / rank) A B."""
    config = adapted((target,), rank=2)
    base, adapter = weights(config), trained(config)
    module, _ = lora.TARGETS[target]
    flat = model_params.flatten(lora.join(base, adapter))
    a, b = (np.asarray(flat[f"{module}/lora_{x}"], np.float64) for x in "ab")
    kernel = np.asarray(flat[f"{module}/kernel"], np.float64)
    by_hand = dict(model_params.flatten(base))
    by_hand[f"{module}/kernel"] = jnp.asarray(kernel + (2.5 * a @ b).reshape(kernel.shape), jnp.float32)
    row = flat["embed/token_row"]
    by_hand["embed/table"] = base["embed"]["table"].at[EMBED].set(row)
    on = forward(model_params.unflatten(flat), *rows, config=config)
    want = forward(model_params.unflatten(by_hand), *rows, config=config)
    for x, y in zip(seen(on, rows[1]), seen(want, rows[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    off = forward(base, *rows, config=config)
    assert max(np.abs(x - y).max() for x, y in zip(on, off, strict=True)) > 1e-2


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_adapter_on(rows, tied, mesh):
    config = adapted(tied=tied)
    params = lora.join(weights(config), trained(config))
    on = forward(params, *rows, config=config)
    if mesh is None:
        merged = lora.merge(params, config)
    else:
        where = make_mesh(*mesh)
        places = lora.join(model_params.shardings(config, where), shardings(config, where))
        with jax.set_mesh(where):
            merged = lora.merge(jax.device_put(params, places), config)
        for name, leaf in model_params.flatten(merged).items():
            assert leaf.sharding.spec == model_params.flatten(places)[name].spec
        merged = jax.device_get(merged)
    assert lora.split(merged)[1] == {}
    plain = forward(merged, *rows, config=dataclasses.replace(config, lora=None))
    for x, y in zip(seen(on, rows[1]), seen(plain, rows[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_in_float32_equals_adapter_on_over_a_base_in_bfloat16(rows, tied):
    """In the base's own dtype it does not."""
    config = adapted(tied=tied, param_dtype="bfloat16")
    params = lora.join(weights(config), trained(config))
    on = seen(forward(params, *rows, config=config), rows[1])
    gaps = {}
    for dtype in ("float32", "bfloat16"):
        merged = lora.merge(params, config, dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {dtype}
        plain = forward(merged, *rows, config=dataclasses.replace(config, lora=None, param_dtype=dtype))
        gaps[dtype] = max(np.abs(x - y).max() for x, y in zip(on, seen(plain, rows[1]), strict=True))
    assert gaps["float32"] < 1e-5 < 1e-3 < gaps["bfloat16"]


def test_merging_keeps_the_stored_dtype_and_sums_in_fp32():
    config = adapted(param_dtype="bfloat16")
    params = lora.join(weights(config), trained(config))
    merged = model_params.flatten(lora.merge(params, config))
    assert {leaf.dtype.name for leaf in merged.values()} == {"bfloat16"}
    a, b = (np.asarray(params["layers"]["mlp"]["up"][f"lora_{x}"], np.float64) for x in "ab")
    exact = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float64) + 5 / 3 * a @ b
    np.testing.assert_allclose(np.asarray(merged["layers/mlp/up/kernel"], np.float64), exact, rtol=2**-8, atol=1e-6)


def test_a_frozen_base_in_the_compute_dtype_loses_nothing(rows):
    """What `assembly` stores: every use of a weight casts it to the compute dtype, so it may lie in it."""
    config = adapted(compute_dtype="bfloat16", tied=False)
    base, adapter = weights(config), trained(config)
    cast = jax.tree.map(lambda w: w.astype("bfloat16"), base)
    both = (forward(lora.join(b, adapter), *rows, config=config) for b in (base, cast))
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_weights_without_an_adapter_merge_to_themselves():
    config = adapted()
    jax.tree.map(np.testing.assert_array_equal, lora.merge(weights(config), config), weights(config))


# Meshes and the sampler.


def shardings(config, mesh):
    return jax.tree.map(lambda leaf: leaf.sharding, lora.abstract(config, mesh))


def test_an_adapter_lies_as_its_kernels_do_and_starts_alike_everywhere():
    config = adapted(tied=False)
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh(1, 4, 2)
    base = weights(config)
    alone, spread = (
        lora.init(jax.device_put(base, model_params.shardings(config, m)), config, m, 0) for m in (one, eight)
    )
    for name, leaf in model_params.flatten(spread).items():
        shape, axes = lora.adapter_table(config)[name]
        assert leaf.shape == shape and leaf.sharding.spec == stored(axes)
        np.testing.assert_allclose(leaf, model_params.flatten(alone)[name], rtol=1e-6)
    assert spread["layers"]["mlp"]["down"]["lora_a"].sharding.spec[1] == "tensor"
    assert spread["layers"]["mlp"]["down"]["lora_b"].sharding.spec[2] == "fsdp"


@pytest.mark.parametrize("tied, dropout", [(True, 0.3), (False, 0.0)])
def test_eight_devices_compute_what_one_does(rows, tied, dropout):
    config = adapted(tied=tied, remat="full", dropout=dropout)
    key = jax.random.key(1) if dropout else None

    @jax.jit
    def everything(adapter, base, tokens, lengths):
        def loss(adapter):
            params = lora.join(base, adapter)
            hidden = hidden_states(params, config, tokens, lengths, key)
            z = logits(params, config, hidden)
            return jax.nn.logsumexp(z, -1).mean(), (hidden, z)

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    host, results = (trained(config), weights(config)), []
    for shape in ((1, 1, 1), (1, 4, 2)):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            adapter, base = jax.device_put(host, (shardings(config, mesh), model_params.shardings(config, mesh)))
            value, gradient = everything(adapter, base, *put_batch(mesh, rows))
        same = jax.tree.map(lambda g, p: g.sharding.spec == p.sharding.spec, gradient, adapter)
        assert all(jax.tree.leaves(same))
        results.append(jax.device_get((value, gradient)))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(results[0][1]))  # each leaf learns
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), *results)


def test_the_samplers_log_probabilities_are_those_of_teacher_forcing():
    config, temperature = adapted(vocab=12), 0.7
    params = lora.join(weights(config), trained(config))
    prompts, starts = padded(np.random.default_rng(0), [7, 2, 5], 7, config.vocab)
    done = jax.device_get(
        sample(
            params,
            prompts,
            starts,
            np.arange(3, dtype=np.int32),
            jax.random.key(0),
            config=config,
            group=4,
            max_new=6,
            temperature=temperature,
            embed_id=EMBED,
            stop_ids=(3,),
        )
    )
    for i, start in enumerate(starts):
        for j in range(4):
            n = int(done.lengths[i, j])
            row = np.zeros((1, 13), np.int32)
            row[0, :start], row[0, start : start + n] = prompts[i, :start], done.tokens[i, j, :n]
            hidden, z = forward(params, row, np.array([start + n]), config=config)
            want = jax.nn.log_softmax(z[0, start - 1 : start + n - 1] / temperature)
            want = np.where(done.mask[i, j, :n], want[np.arange(n), done.tokens[i, j, :n]], 0)
            np.testing.assert_allclose(done.logp[i, j, :n], want, atol=1e-4)
            np.testing.assert_allclose(done.embedding[i, j], hidden[0, start + n - 1], atol=1e-4)


# Dropout, and what the gradient costs.


def test_dropout_drops_the_adapters_input_only_where_it_has_a_key(rows):
    config = adapted(dropout=0.5)
    base, adapter = weights(config), trained(config)
    params = lora.join(base, adapter)
    quiet = forward(params, *rows, config=dataclasses.replace(config, lora=adapted().lora))
    jax.tree.map(np.testing.assert_array_equal, forward(params, *rows, config=config), quiet)
    draws = [forward(params, *rows, config=config, dropout=jax.random.key(i))[0] for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-2 and np.abs(draws[0] - quiet[0]).max() > 1e-2
    # The base's own path is never dropped.
    off = forward(base, *rows, config=config, dropout=jax.random.key(0))
    np.testing.assert_array_equal(off[0], forward(base, *rows, config=config)[0])


def test_the_base_costs_no_gradient(rows):
    """A backward pass through a frozen kernel is one product where training it takes two."""
    config = sizes(width=64, ffn=256, vocab=512, lora=Lora(2, 4.0, 0.0, ALL, EMBED))

    def flops(train_all: bool) -> float:
        base, adapter = weights(config), trained(config)

        def loss(trainable, base):
            params = lora.join(base, trainable)
            return jax.nn.logsumexp(logits(params, config, hidden_states(params, config, *rows)), -1).mean()

        wanted = (base, base) if train_all else (adapter, base)
        return jax.jit(jax.grad(loss)).lower(*wanted).cost_analysis()["flops"]

    assert flops(train_all=False) < 0.8 * flops(train_all=True)
