"""Packs hold every row whole, once; a row reads the same in a pack as by itself."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.losses import grad_cache
from r3jax.model.encoder import embed
from r3jax.model.packing import last_vectors, pack, pack_after, packed_states, pick
from r3jax.model.qwen2 import hidden_states
from r3jax.model.sharding import batch_parts, make_mesh, put_batch
from tests.tiny_model import padded, sizes, weights

CONFIG = sizes()


def rows(seed: int, count: int, longest: int):
    rng = np.random.default_rng(seed)
    return padded(rng, rng.integers(1, longest + 1, count), longest, CONFIG.vocab)


@pytest.mark.parametrize(("shards", "chunks"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_every_row_is_whole_and_alone(shards, chunks):
    kinds = [rows(0, 24, 9), rows(1, 24, 16)]
    packs, begins = pack(kinds, length=32, shards=shards, chunks=chunks)
    groups = shards * chunks
    assert packs.tokens.shape[0] == groups and packs.tokens.shape[2] == 32
    tokens, positions, segments = (x.reshape(groups, -1) for x in packs[:3])
    used = np.zeros(tokens.shape, int)
    for (ids, lengths), begin in zip(kinds, begins, strict=True):
        for row in range(24):
            shard, within = divmod(row, 24 // shards)
            group = shard * chunks + within % chunks  # as gradient caching takes its chunks
            here = slice(begin[row], begin[row] + lengths[row])
            assert begin[row] // 32 == (begin[row] + lengths[row] - 1) // 32
            np.testing.assert_array_equal(tokens[group, here], ids[row, : lengths[row]])
            np.testing.assert_array_equal(positions[group, here], np.arange(lengths[row]))
            number = set(segments[group, here].tolist())
            assert len(number) == 1 and 0 not in number
            mates = packs.segments.reshape(groups, -1, 32)[group, begin[row] // 32]
            assert (mates == number.pop()).sum() == lengths[row]
            used[group, here] += 1
    assert used.max() == 1 and ((used == 1) == (segments > 0)).all()


def test_little_is_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 41, 512).astype(np.int32)
    packs, _ = pack([(np.ones((512, 40), np.int32), lengths)], length=120, shards=1)
    assert (packs.segments > 0).mean() > 0.85 > lengths.mean() / 40


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into packs of 8"):
        pack([(np.ones((2, 9), np.int32), np.array([9, 1]))], length=8, shards=1)
    with pytest.raises(ValueError, match="6 rows cannot be split into 2 shards of 2 chunks"):
        pack([rows(0, 6, 4)], length=8, shards=2, chunks=2)


def test_processes_agree_on_the_number_of_packs():
    packs, _ = pack([rows(0, 40, 4)], length=8, shards=1, agree=lambda most: 35)
    assert packs.tokens.shape[1] == 36
    alone, _ = pack([rows(0, 5, 4)], length=4, shards=1, agree=lambda most: 5)
    assert alone.tokens.shape[1] == 5  # no more than rows, though 6 would be a rounder number


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 2), (2, 4, 1)])
def test_states_are_those_of_the_rows_by_themselves(mesh):
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    kinds = [rows(2, 16, 7), rows(3, 16, 20)]
    packs, begins = pack(kinds, length=40, shards=batch_parts(mesh))
    params = weights(CONFIG)

    @jax.jit
    def read(params, packs, begins, lengths, places):
        states = packed_states(params, CONFIG, packs)
        return pick(states, places), last_vectors(states, begins, lengths)

    for (tokens, lengths), begin in zip(kinds, begins, strict=True):
        places = begin[:, None] + np.minimum(np.arange(tokens.shape[1]), lengths[:, None] - 1)
        with jax.set_mesh(mesh):
            states, vectors = read(params, *put_batch(mesh, (packs, begin, lengths, places)))
            states, vectors = jax.device_get((states, vectors))
        valid = np.arange(tokens.shape[1]) < lengths[:, None]
        want = np.asarray(hidden_states(params, CONFIG, tokens, lengths))
        np.testing.assert_allclose(states[valid], want[valid], atol=1e-5)
        np.testing.assert_allclose(vectors, embed(params, CONFIG, tokens, lengths), atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "room", "beginnings"),
    [(None, 7, 3), (None, 8, 2), (None, 16, 1), ((4, 1, 1), 8, 1), ((2, 2, 2), 10, 1)],
)
def test_texts_behind_their_prompt_are_read_as_by_themselves(mesh, room, beginnings):
    rng = np.random.default_rng(6)
    starts = np.array([5, 1, 7, 3], np.int32)
    own = rng.integers(0, 7, (4, 4)).astype(np.int32)
    prompts, _ = padded(rng, starts, 9, CONFIG.vocab)
    texts, _ = padded(rng, own.ravel(), 8, CONFIG.vocab)
    mesh = mesh and make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    packs, ends, begins = pack_after(
        (prompts, starts),
        (texts.reshape(4, 4, -1), own),
        room=room,
        length=8,
        shards=batch_parts(mesh) if mesh else 1,
        chunks=1,
    )
    shards = len(packs.tokens)
    assert packs.before.tokens.shape == (shards, beginnings, room)
    assert packs.computed() == own.sum() + starts.sum()
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        given = put_batch(mesh, packs) if mesh else packs
        states = np.asarray(jax.jit(lambda p, packs: packed_states(p, CONFIG, packs))(weights(CONFIG), given))
    lengths = np.repeat(starts, 4) + own.ravel()
    whole = np.zeros((16, 16), np.int32)
    for row, (start, end) in enumerate(zip(np.repeat(starts, 4), lengths, strict=True)):
        whole[row, :start], whole[row, start:end] = prompts[row // 4, :start], texts[row, : end - start]
    want = np.asarray(hidden_states(weights(CONFIG), CONFIG, whole, lengths)).reshape(4, 4, 16, -1)
    for b, start in enumerate(starts):
        ours = states[b * shards // 4]  # shards have their prompts in order
        np.testing.assert_allclose(ours[ends[b] + 1 - start : ends[b] + 1], want[b, 0, :start], atol=1e-5)
        for g, n in enumerate(own[b]):
            first = begins[b, g] + start
            np.testing.assert_allclose(ours[first : first + n], want[b, g, start : start + n], atol=1e-5)


def test_prompts_and_texts_that_do_not_fit_are_refused():
    prompts, texts = (np.ones((1, 9), np.int32), np.array([9])), (np.ones((1, 2, 5), np.int32), np.array([[5, 4]]))
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into packs of 8"):
        pack_after(prompts, texts, room=8, length=5, shards=1, chunks=1)
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into packs of 4"):
        pack_after(prompts, texts, room=9, length=4, shards=1, chunks=1)


@pytest.mark.parametrize(("shards", "chunks"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("more", [0, 3])
def test_a_head_that_all_rows_of_a_kind_have_is_read_once(shards, chunks, more):
    heads = [[3, 1, 4, 1], [3, 1, 4, 1, 5, 9, 2][: 4 + more]]
    kinds = [rows(7, 12, 9), rows(8, 12, 15)]
    for (tokens, lengths), head in zip(kinds, heads, strict=True):
        tokens[:, : len(head)] = head
        lengths[:] = np.maximum(lengths, len(head) + 1)
    params = weights(CONFIG)
    packs, begins = pack(kinds, heads=heads, length=20, shards=shards, chunks=chunks)
    ours = sum(int((lengths - len(head)).sum()) for (_, lengths), head in zip(kinds, heads, strict=True))
    assert packs.computed() == ours + shards * chunks * (11 if more else 4)
    states = np.asarray(packed_states(params, CONFIG, packs))
    groups = np.arange(12).reshape(shards, -1, chunks).transpose(0, 2, 1).reshape(shards * chunks, -1)
    for (tokens, lengths), head, begin in zip(kinds, heads, begins, strict=True):
        assert begin.dtype == np.int32
        want = np.asarray(hidden_states(params, CONFIG, tokens, lengths))
        for n, members in enumerate(groups):
            for row in members:
                own = states[n, begin[row] + len(head) : begin[row] + lengths[row]]
                np.testing.assert_allclose(own, want[row, len(head) : lengths[row]], atol=1e-5)


def test_gradient_caching_takes_packs_apart_as_it_does_rows():
    tokens, lengths = rows(4, 12, 9)
    params = weights(CONFIG)
    goal = jnp.asarray(np.random.default_rng(5).normal(size=(12, CONFIG.width)), jnp.float32)

    def of(chunks):
        packs, (begin,) = pack([(tokens, lengths)], length=18, shards=1, chunks=chunks)
        batch = {"begin": begin, "lengths": lengths, "packs": packs}

        def encode(params, part):
            states = packed_states(params, CONFIG, part["packs"])
            return last_vectors(states, part["begin"], part["lengths"])

        def loss(vectors):
            return ((vectors @ goal.T) ** 2).mean()

        return jax.jit(lambda p, b: grad_cache(encode, loss, p, b, chunks))(params, batch)

    (value, gradient), (want, plain) = of(3), of(1)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))
