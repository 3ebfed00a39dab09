"""Vectors that do not depend on batch, order or padding, in few compiled shapes."""

import jax
import numpy as np
import pytest

from r3jax.model import encoder, qwen2
from r3jax.model.encoder import bucket_of, embed, embed_jit, encode_rows, normalise, pad, rows_at_once
from r3jax.model.qwen2 import hidden_states
from r3jax.model.sharding import make_mesh
from tests.tiny_model import sizes, weights

CONFIG = sizes()


@pytest.fixture(scope="module")
def params():
    return weights(CONFIG)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab, n).tolist() for n in (3, 17, 1, 8, 30, 9, 2, 16, 5, 23)]


@pytest.fixture(scope="module")
def vectors(params, mesh, rows):
    return encode_rows(params, CONFIG, mesh, rows, batch_size=4)


def test_a_vector_is_the_normalised_last_hidden_state(params, rows, vectors):
    assert vectors.shape == (len(rows), CONFIG.width) and vectors.dtype == np.float32
    for row, vector in zip(rows, vectors, strict=True):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(row)] = row
        hidden = jax.jit(hidden_states, static_argnames="config")(params, CONFIG, tokens, np.array([len(row)]))
        want = np.asarray(hidden[0, len(row) - 1], np.float64)
        np.testing.assert_allclose(vector, want / np.linalg.norm(want), atol=1e-5)


def test_batch_order_and_padding_do_not_change_a_vector(params, mesh, rows, vectors):
    single = np.concatenate([encode_rows(params, CONFIG, mesh, [row], batch_size=4) for row in rows])
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = encode_rows(params, CONFIG, mesh, [rows[i] for i in order], batch_size=7)[np.argsort(order)]
    padding = np.full((len(rows), 40), 11, np.int32)  # ids past a row's end must not matter
    for i, row in enumerate(rows):
        padding[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    wide = embed_jit(params, CONFIG, padding, lengths)
    for other in (single, shuffled, np.asarray(wide)):
        assert (vectors * other).sum(1).min() >= 0.99999
    distance = 1 - vectors @ vectors.T + 2 * np.eye(len(rows))
    assert distance.min() > 0.01  # the rows' vectors are told apart, so agreement says something


def test_eight_devices_give_the_same_vectors_without_a_mesh_set(params, rows, vectors):
    """The caller's batch size need not be a multiple of the parts that the batch is split into."""
    spread = encode_rows(params, CONFIG, make_mesh(1, 4, 2), rows, batch_size=6)
    np.testing.assert_allclose(spread, vectors, atol=1e-5)


@pytest.mark.parametrize("unrolled", [8, 0])
@pytest.mark.parametrize("shape", [None, (1, 4, 2), (2, 2, 2)])
def test_what_all_rows_begin_with_is_computed_once(monkeypatch, params, rows, shape, unrolled):
    """The longer head is theirs; rows that do not share one, and small batches, are read whole."""
    monkeypatch.setattr(qwen2, "UNROLLED", unrolled)
    mesh = make_mesh(*shape) if shape else make_mesh(devices=jax.devices()[:1])
    head = [5, 6, 7]
    whole = [head + row for row in rows]
    widths = []

    def watched(*args, **kwargs):
        widths.append(kwargs["tokens"].shape[1])
        return jax.jit(embed, static_argnames="config")(*args, **kwargs)

    monkeypatch.setattr(encoder, "embed_jit", watched)

    def encode(rows, **options):
        widths.clear()
        return encode_rows(params, CONFIG, mesh, rows, **options)

    want = encode(whole, batch_size=64)
    assert widths == [40]
    np.testing.assert_allclose(encode(whole, batch_size=64, heads=([9], head)), want, atol=1e-5)
    assert widths == [32]
    encode([*whole, [1]], batch_size=64, heads=(head,))
    assert widths == [40]
    encode([*whole, head], batch_size=64, heads=(head,))  # a row that is nothing but the head
    assert widths == [40]
    encode(whole, batch_size=4, heads=(head,))
    assert max(widths) == 40


def test_long_rows_come_in_smaller_batches_on_cpu(monkeypatch, params, mesh):
    """So fewer of them are padded to the longest; where they are short a batch is as large as asked for."""
    rows = [[1] * n for n in (*range(1, 41), *[300] * 20)]
    shapes = []

    def watched(*args, **kwargs):
        shapes.append(kwargs["tokens"].shape)
        return embed_jit(*args, **kwargs)

    monkeypatch.setattr(encoder, "embed_jit", watched)
    vectors = encode_rows(params, CONFIG, mesh, rows, batch_size=32)
    assert shapes == [(8, 320), (8, 320), (8, 320), (32, 40), (32, 8)]
    alone = encode_rows(params, CONFIG, mesh, rows[::7], batch_size=1)
    np.testing.assert_allclose(vectors[::7], alone, atol=1e-5)


@pytest.mark.parametrize(
    "platform, width, rows", [("cpu", 64, 64), ("cpu", 320, 16), ("gpu", 320, 256), ("tpu", 8, 256)]
)
def test_accelerators_take_the_batches_asked_for(platform, width, rows):
    assert rows_at_once(256, 2, width, platform) == rows


def test_nothing_to_encode_and_nothing_in_a_row(params, mesh):
    none = encode_rows(params, CONFIG, mesh, [], batch_size=4)
    assert none.shape == (0, CONFIG.width) and none.dtype == np.float32
    with pytest.raises(ValueError, match="row 1 is empty"):
        encode_rows(params, CONFIG, mesh, [[1], []], batch_size=1)


def test_many_lengths_compile_few_shapes(params, mesh):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, CONFIG.vocab, n).tolist() for n in rng.permutation(24) + 1]
    before = embed_jit._cache_size()
    encode_rows(params, CONFIG, mesh, rows, batch_size=5)
    new = embed_jit._cache_size() - before
    assert 1 <= new <= 3  # of 24 lengths; multiples of eight
    encode_rows(params, CONFIG, mesh, rows[::-1], batch_size=5)
    assert embed_jit._cache_size() - before == new


def test_padded_lengths_waste_little_and_are_few():
    lengths = np.arange(1, 4097)
    buckets = np.array([bucket_of(int(n)) for n in lengths])
    assert (buckets >= lengths).all() and (np.diff(buckets) >= 0).all()
    assert ((buckets - lengths) <= np.maximum(7, lengths / 4)).all()
    assert len(set(buckets)) <= 8 + 4 * 6  # eight up to 64, four for each doubling
    assert all(bucket_of(b) == b for b in buckets.tolist())


def test_pad():
    tokens, lengths = pad([[1, 2, 3], [4]], 4, 3)
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 1, 1])


@pytest.mark.parametrize("unrolled", [8, 0])
def test_last_states_are_hidden_states_at_the_last_token(monkeypatch, unrolled):
    monkeypatch.setattr(qwen2, "UNROLLED", unrolled)
    params = weights(CONFIG)
    tokens, lengths = pad([[1, 2, 3, 4, 5], [4], [7, 8, 9]], 8)
    want = hidden_states(params, CONFIG, tokens, lengths)[np.arange(3), lengths - 1]
    np.testing.assert_allclose(qwen2.last_states(params, CONFIG, tokens, lengths), want, atol=1e-6)


def test_normalise_is_safe_at_zero():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], np.float32)
    np.testing.assert_allclose(normalise(x), [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-6)
    gradient = jax.grad(lambda x: normalise(x).sum())(x)
    assert np.isfinite(gradient).all()
