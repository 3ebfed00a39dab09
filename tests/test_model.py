"""The decoder against transformers' Qwen2ForCausalLM, and by its properties: cache, padding, causality."""

import dataclasses
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from r3jax.model.decoding import KVCache, decode_step
from r3jax.model.hugging_face import from_hugging_face
from r3jax.model.params import flatten
from r3jax.model.qwen2 import (
    Block,
    Decoder,
    RMSNorm,
    hidden_states,
    logits,
    parameter_table,
    right_padded,
    unstack,
)
from r3jax.model.rope import frequencies
from tests.tiny_model import padded, reference, sizes, state_dict, weights

SHAPES = {
    "gqa-7-to-1-tied": sizes(heads=14, kv_heads=2),
    "gqa-7-to-1-untied": sizes(heads=14, kv_heads=2, width=56, head_dim=4, layers=1, tied=False),
    "mha-untied": sizes(heads=4, kv_heads=4, tied=False, layers=3),
    "one-kv-head": sizes(heads=3, kv_heads=1, rope_theta=1e4, norm_eps=1e-2),
}
run = jax.jit(hidden_states, static_argnames="config")


def agrees(model, params, config, tokens, lengths):
    """Asserts transformers' states and logits where there are tokens; our hidden states, and where that is."""
    hidden = run(params, config, tokens, lengths)
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        want = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            output_hidden_states=True,
        )
    np.testing.assert_allclose(hidden[mask], want.hidden_states[-1].numpy()[mask], atol=1e-4)
    np.testing.assert_allclose(logits(params, config, hidden)[mask], want.logits.numpy()[mask], atol=1e-4)
    return hidden, mask


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_equals_transformers(config):
    model = reference(config)
    params = from_hugging_face(state_dict(model), config)
    tokens, lengths = padded(np.random.default_rng(0), [9, 4, 1], 9, config.vocab)
    agrees(model, params, config, tokens, lengths)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(("factor", "original"), [(1.0, 32768), (4.0, 32768), (2.5, 8192), (4.0, 32), (8.0, 4)])
def test_frequencies_equal_transformers(head_dim, theta, factor, original):
    config = sizes(head_dim=head_dim, rope_theta=theta, rope_factor=factor, rope_original_length=original)
    rotary = reference(config).model.rotary_emb
    ours, scale = frequencies(head_dim, theta, factor, original)
    assert ours.dtype == np.float32 and scale == pytest.approx(rotary.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=3e-7)


def test_yarn_equals_transformers_below_and_above_the_original_length():
    config = sizes(heads=14, width=56, head_dim=32, rope_theta=1e4, rope_factor=4.0, rope_original_length=32)
    model = reference(config)
    params = from_hugging_face(state_dict(model), config)
    tokens, lengths = padded(np.random.default_rng(0), [128, 33, 20], 128, config.vocab)
    hidden, mask = agrees(model, params, config, tokens, lengths)
    plain = run(params, dataclasses.replace(config, rope_factor=1.0), tokens, lengths)
    assert np.abs(plain - hidden)[mask].max() > 0.1  # so agreement says something


def test_bfloat16_stays_near_float32_and_keeps_fp32_logits():
    config = sizes()
    params = weights(config)
    tokens, lengths = padded(np.random.default_rng(0), [9, 4, 1], 9, config.vocab)
    low = dataclasses.replace(config, compute_dtype="bfloat16")
    rough, fine = run(params, low, tokens, lengths), run(params, config, tokens, lengths)
    assert rough.dtype == jnp.bfloat16 and logits(params, low, rough).dtype == jnp.float32
    error = np.abs(np.asarray(rough, np.float32) - fine) / np.std(fine)
    assert 1e-4 < np.mean(error) < 0.03


def equations(jaxpr):
    """Every equation of a jaxpr, those of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_under_bfloat16_softmax_norms_angles_and_logits_are_in_float32():
    config = sizes(compute_dtype="bfloat16", param_dtype="bfloat16")
    tokens, lengths = padded(np.random.default_rng(0), [9, 4, 1], 9, config.vocab)

    def forward(params):
        return logits(params, config, hidden_states(params, config, tokens, lengths))

    traced = jax.make_jaxpr(forward)(weights(config))
    inputs = {}
    for equation in equations(traced.jaxpr):
        for of in equation.invars[:1]:
            inputs.setdefault(equation.primitive.name, set()).add(str(of.aval.dtype))
    # softmax: reduce_max, exp, its sum; norms: rsqrt, the sum of squares; positions: cos, sin
    for name in ("reduce_max", "exp", "rsqrt", "reduce_sum", "cos", "sin"):
        assert inputs[name] == {"float32"}, name
    assert inputs["dot_general"] == {"bfloat16"}  # what is multiplied is bf16
    assert traced.out_avals[0].dtype == jnp.float32


def test_left_and_right_padding_agree():
    config = sizes()
    params = weights(config)
    rng, width = np.random.default_rng(0), 9
    tokens, lengths = padded(rng, [9, 4, 1], width, config.vocab)
    right = run(params, config, tokens, lengths)
    left_tokens = rng.integers(0, config.vocab, tokens.shape, dtype=np.int32)
    for i, n in enumerate(lengths):
        left_tokens[i, width - n :] = tokens[i, :n]
    positions = np.maximum(np.arange(width) - (width - lengths[:, None]), 0)
    valid = np.arange(width) >= width - lengths[:, None]
    left, _ = jax.jit(Decoder(config).apply)({"params": params}, left_tokens, positions, valid)
    assert np.isfinite(left).all()
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(left[i, width - n :], right[i, :n], atol=1e-5)


def test_cached_decoding_equals_the_full_forward():
    config = sizes(layers=3)
    params = weights(config)
    rng = np.random.default_rng(0)
    group, steps = 2, 5
    prompts, lengths = padded(rng, [6, 2], 6, config.vocab)
    new = rng.integers(0, config.vocab, (2, group, steps), dtype=np.int32)

    positions, valid = right_padded(lengths, 6)
    _, (k, v) = jax.jit(Decoder(config).apply)({"params": params}, prompts, positions, valid)
    # What lies in slots not yet written must not matter.
    junk = tuple(jnp.full((2, group, k.shape[3], steps, k.shape[4]), 7.0) for _ in range(config.layers))
    k, v = (tuple(x.swapaxes(2, 3)) for x in (k, v))
    cache = KVCache(prompt_k=k, prompt_v=v, prompt_valid=valid, new_k=junk, new_v=junk)
    step = jax.jit(partial(decode_step, unstack(params, config), config))
    found = []
    for slot in range(steps):
        place = jnp.broadcast_to(lengths[:, None] + slot, (2, group))
        hidden, cache = step(new[..., slot], place, cache, slot)
        found.append(hidden)

    for i, n in enumerate(lengths):
        rows = np.concatenate([np.tile(prompts[i, :n], (group, 1)), new[i]], axis=1)
        full = run(params, config, rows, np.full(group, rows.shape[1]))
        np.testing.assert_allclose(np.stack(found, 2)[i], full[:, n:], atol=1e-5)


def test_causality_and_padding_by_gradient():
    """Each token of a row is another row of the table, so the table's gradient tells who was looked at."""
    config = sizes(tied=False)
    params = weights(config)
    tokens = np.arange(8, dtype=np.int32)[None]
    mix = np.random.default_rng(0).normal(size=config.width)

    def outputs(table, lengths):
        changed = params | {"embed": {"table": table}}
        return hidden_states(changed, config, tokens, lengths)[0] @ mix

    seen = jax.jit(jax.jacrev(outputs))
    for length in (8, 5):
        touched = np.abs(seen(params["embed"]["table"], np.array([length]))[:, :8]).max(-1) > 0
        want = np.tril(np.ones((8, 8), bool))
        np.testing.assert_array_equal(touched[:length], want[:length])


def test_a_row_without_tokens_stays_finite():
    config = sizes()

    def total(params):
        return hidden_states(params, config, np.zeros((2, 4), np.int32), np.array([0, 4])).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(weights(config))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))


def test_scanned_layers_equal_a_loop_of_blocks():
    config = sizes(layers=3)
    params = weights(config)
    tokens, lengths = padded(np.random.default_rng(0), [6, 3], 6, config.vocab)
    positions, valid = right_padded(lengths, 6)
    mask = jnp.tril(jnp.ones((6, 6), bool)) & valid[:, None]
    layers = unstack(params, config)["layers"]
    assert len(layers) == 3

    @jax.jit
    def loop(x):
        for layer in layers:
            x, _ = Block(config).apply({"params": layer}, x, positions, mask)
        return RMSNorm(config).apply({"params": params["final_norm"]}, x)

    want = np.asarray(loop(params["embed"]["table"][tokens]))
    np.testing.assert_allclose(np.asarray(run(params, config, tokens, lengths))[valid], want[valid], atol=1e-5)


def test_remat_saves_less_and_changes_no_value():
    tokens, lengths = padded(np.random.default_rng(0), [12, 7], 12, 24)

    def total(config, params):
        return (hidden_states(params, config, tokens, lengths) ** 2)[0].sum()

    saved, functions = {}, {}
    for remat in ("none", "dots", "full"):
        config = sizes(remat=remat)
        functions[remat] = f = partial(total, config)
        kept = jax.eval_shape(lambda p, f=f: jax.vjp(f, p)[1], weights(config))
        saved[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    assert saved["full"] < 0.8 * saved["dots"] < 0.8 * 0.8 * saved["none"], saved
    plain, full = (jax.jit(jax.value_and_grad(functions[name]))(weights(sizes())) for name in ("none", "full"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), full, plain)


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_table_is_what_the_decoder_creates(tied):
    config = sizes(tied=tied)
    args = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    made = jax.eval_shape(Decoder(config).init, jax.random.key(0), *args)["params"]
    shapes = {name: leaf.shape for name, leaf in flatten(made).items()}
    table = {name: shape for name, (shape, _) in parameter_table(config).items()}
    if not tied:  # the unembedding is used outside the module, by `logits`
        assert table.pop("unembed/table") == (config.vocab, config.width)
    assert shapes == table
    assert all(len(shape) == len(axes) for shape, axes in parameter_table(config).values())
