"""Attention kernels against the plain one: splash interpreted on CPU, cuDNN as far as lowering for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.model import attention
from r3jax.model.sharding import BATCH, make_mesh, place

B, L, K, M, H = 4, 40, 2, 3, 16


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, L, K, M, H)).astype(np.float32) * H**-0.5
    keys, values = rng.normal(size=(2, B, L, K, H)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (B, L)), axis=1).astype(np.int32)
    segments[:, 33:] = 0
    return q, keys, values, segments


def value_and_gradients(q, keys, values, segments, kernel):
    """What tokens that are not padding get, and the gradients of a sum of it."""
    real = (segments > 0)[:, :, None, None, None]

    def loss(q, keys, values):
        before = jnp.arange(keys.shape[1] - q.shape[1]) % 3 < 2
        seen = segments if kernel == "splash" else attention.visible(segments, jnp.tile(before, (*q.shape[:2], 1)))
        mixed = jnp.where(real, attention.attend(q, keys, values, seen, kernel), 0)
        return jnp.sin(mixed.astype(jnp.float32)).sum(), mixed

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, keys, values)


@pytest.mark.parametrize(("length", "blocks"), [(40, 1), (80, 2), (256, 8)])
@pytest.mark.parametrize("before", [0, 24])
def test_in_blocks_it_is_the_same(length, blocks, before):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, length, K, M, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, before + length, K, H)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    segments[:, length - 5 :] = 0
    seen = attention.visible(segments, jnp.asarray(rng.random((2, length, before)) < 0.5))

    def both(which):
        return lambda *args: (jnp.sin(which(*args, seen)).sum(), which(*args, seen))

    (_, want), gradients = jax.value_and_grad(both(attention._plain), (0, 1, 2), has_aux=True)(q, keys, values)
    (_, got), found = jax.value_and_grad(both(attention._in_blocks), (0, 1, 2), has_aux=True)(q, keys, values)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    program = jax.make_jaxpr(lambda *args: attention.attend(*args, seen))(q, keys, values)
    assert str(program).count("dot_general") == 2 * blocks  # on CPU it is taken


@pytest.mark.parametrize("sharded", [False, True])
def test_splash_equals_xla(inputs, sharded):
    (_, want), gradients = jax.jit(value_and_gradients, static_argnums=4)(*inputs, "xla")
    if sharded:
        with jax.set_mesh(make_mesh(2, 1, 2, devices=jax.devices()[:4])):
            kv = P(BATCH, None, "tensor", None)
            specs = (P(BATCH, None, "tensor", None, None), kv, kv, P(BATCH, None))
            placed = [place(jnp.asarray(x), spec) for x, spec in zip(inputs, specs, strict=True)]
            (_, got), found = jax.jit(value_and_gradients, static_argnums=4)(*placed, "splash")
    else:
        (_, got), found = jax.jit(value_and_gradients, static_argnums=4)(*inputs, "splash")
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("length", "before"), [(40, 0), (192, 0), (40, 72), (40, 90)])
def test_cudnn_is_called_with_lengths_it_can_differentiate(inputs, monkeypatch, length, before):
    # Without a GPU: the checks of the installation are answered for it, the program is lowered and not run.
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")
    sizes = (length, before + length, before + length)
    q, kv, kv2 = (
        jax.ShapeDtypeStruct((B, size, *x.shape[2:]), jnp.bfloat16) for x, size in zip(inputs, sizes, strict=False)
    )
    segments = jax.ShapeDtypeStruct((B, length), np.int32)
    traced = jax.jit(value_and_gradients, static_argnums=4).trace(q, kv, kv2, segments, "cudnn")
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    full = {40: 128, 192: 256}[length]
    whole = {0: full, 72: 256, 90: 256}[before]
    for call in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        line = next(line for line in text.splitlines() if call in line)
        assert f"(tensor<{B}x{full}x{K * M}x{H}xbf16>, tensor<{B}x{whole}x{K}x{H}xbf16>" in line


@pytest.mark.parametrize("before", [0, 24, 100])
def test_what_cudnn_is_given_is_the_same_attention(inputs, monkeypatch, before):
    """Its padding and its mask, by XLA's attention in its place."""
    q, keys, values, segments = inputs
    more = np.random.default_rng(2).normal(size=(2, B, before, K, H)).astype(np.float32)
    keys, values = (np.concatenate([x, own], axis=1) for x, own in zip(more, (keys, values), strict=True))
    (_, want), gradients = value_and_gradients(q, keys, values, segments, "xla")
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **b: plain(*a, **b))
    (_, got), found = value_and_gradients(q, keys, values, segments, "cudnn")
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kernel", ["xla", "cudnn"])
def test_packs_see_the_beginning_they_follow(monkeypatch, kernel):
    """Two groups of two beginnings and three packs each, beside each pack laid behind its own."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **b: plain(*a, **b))
    rng, (size, length) = np.random.default_rng(3), (6, 8)
    texts = np.array([[[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], [[1, 2, 2, 2, 2, 2], [1, 1, 2, 0, 0, 0]]])
    after = np.array([[0, 1, 0], [1, 1, 0]])
    follows = rng.integers(1, 3, (2, 3, length))
    segments = np.sort(rng.integers(1, 3, (2, 3, length)), axis=2)
    total = 2 * size + 3 * length
    q = rng.normal(size=(2, total, K, M, H)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, total, K, H)).astype(np.float32)
    before = follows[..., None] == np.take_along_axis(texts, after[..., None], 1)[:, :, None]
    seen = attention.Begun(
        attention.visible(texts.reshape(4, size)),
        attention.visible(segments.reshape(6, length), before.reshape(6, length, size)),
        after[..., None] == np.arange(2),
    )
    rows = (x.reshape(-1, 4, *x.shape[2:]) for x in (q, keys, values))  # cut into rows of any length
    got = np.asarray(attention.attend(*rows, seen, kernel)).reshape(q.shape)
    causal = np.tril(np.ones((size + length, size + length), bool))
    for n in range(2):
        for i in range(3):
            first, then = after[n, i] * size, 2 * size + i * length
            places = [*range(first, first + size), *range(then, then + length)]
            row_seen, text = causal.copy()[None], texts[n, after[n, i]]
            row_seen[0, :size, :size] &= text[:, None] == text
            row_seen[0, size:, :size] = before[n, i]
            row_seen[0, size:, size:] &= segments[n, i][:, None] == segments[n, i]
            row = [x[n : n + 1, places] for x in (q, keys, values)]
            want = np.asarray(attention._plain(*row, row_seen))[0]
            np.testing.assert_allclose(got[n, first : first + size], want[:size], atol=2e-6)
            np.testing.assert_allclose(got[n, then : then + length], want[size:], atol=2e-6)


def test_a_kernel_that_does_not_run_here_is_refused():
    attention.check("xla", "cpu", "float32")
    attention.check("splash", "tpu", "float32")
    attention.check("cudnn", "gpu", "bfloat16")
    for kernel, platform, dtype in (("splash", "gpu", "bfloat16"), ("cudnn", "gpu", "float32"), ("cudnn", "tpu", "x")):
        with pytest.raises(UserError, match=f"config.model.attention='{kernel}' does not run on {platform}"):
            attention.check(kernel, platform, dtype)
