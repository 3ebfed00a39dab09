"""What must hold for any input: packing, bucketing, chunked losses, refresh decisions, the ledger of consumed ids."""

import collections
import functools
import json
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3jax.data.stream import stream
from r3jax.losses import grad_cache, in_chunks, token_terms
from r3jax.model.encoder import bucket_of, pad
from r3jax.model.packing import pack, pack_after, pack_length
from r3jax.rl.algorithms import kl
from r3jax.run.log import LEDGER, RunLog
from r3jax.search import refresh

settings.register_profile("steady", derandomize=True, deadline=None, database=None)  # the same inputs every time
settings.load_profile("steady")

seeds = st.integers(0, 2**32 - 1)


# --- packing and bucketing


@st.composite
def batches(draw):
    """(lengths of one or two kinds of rows, shards, chunks)."""
    shards, chunks, each = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    count = shards * chunks * each
    lengths = st.lists(st.integers(1, 40), min_size=count, max_size=count)
    return draw(st.lists(lengths, min_size=1, max_size=2)), shards, chunks


def group_of(row: int, count: int, shards: int, chunks: int) -> int:
    """A shard's rows in turn go to its chunks."""
    each = count // shards
    return row // each * chunks + row % each % chunks


def at(packs, group: int, places) -> list[list[int]]:
    """Tokens, positions, segments at some places of a group, and which text of their pack's beginning they follow."""
    places = np.asarray(places) - packs.before.tokens[0].size
    assert (places >= 0).all()
    return [x.reshape(len(x), -1)[group, places].tolist() for x in (*packs[:3], packs.before.follows)]


@given(batches(), st.integers(0, 30))
def test_packing_loses_doubles_and_mixes_nothing(batch, spare):
    kinds, shards, chunks = batch
    length = max(map(max, kinds)) + spare
    ids = iter(range(1, 10**6))  # every token is another
    rows = [[[next(ids) for _ in range(n)] for n in lengths] for lengths in kinds]
    used: list[int] = []
    packs, begins = pack(
        [pad(kind, max(map(len, kind))) for kind in rows],
        length=length,
        shards=shards,
        chunks=chunks,
        agree=lambda most: used.append(most) or most,
    )
    count, most, width = packs.tokens.shape
    assert (count, width) == (shards * chunks, length) and used[0] <= most <= used[0] + max(1, used[0] // 3)
    seen = np.zeros((count, most * length), bool)
    for kind, begin in zip(rows, begins, strict=True):
        for row, (tokens, start) in enumerate(zip(kind, begin, strict=True)):
            group = group_of(row, len(kind), shards, chunks)
            assert start // length == (start + len(tokens) - 1) // length  # whole in one pack
            place = np.arange(start, start + len(tokens))
            assert packs.tokens.reshape(count, -1)[group, place].tolist() == tokens
            assert packs.positions.reshape(count, -1)[group, place].tolist() == list(range(len(tokens)))
            numbers = packs.segments[group, start // length]
            assert (numbers == numbers[start % length]).sum() == len(tokens) and numbers[start % length] > 0
            assert not seen[group, place].any()
            seen[group, place] = True
    assert not packs.tokens.reshape(count, -1)[~seen].any() and not packs.segments.reshape(count, -1)[~seen].any()


@given(batches(), st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_what_rows_begin_with_stands_once_before_their_packs(batch, spare, common, apart):
    """All kinds with one head, or each with a head of its own."""
    lengths, shards, chunks = batch
    ids = iter(range(1, 10**6))
    heads = [[next(ids) for _ in range(common + kind * apart)] for kind in range(len(lengths))]
    heads = heads if apart else heads[:1] * len(heads)
    # A row of one token, as `pad` makes of one that is missing, is shorter than its head.
    rows = [
        [head + [next(ids) for _ in range(n - 1)] if n > 1 else [0] for n in kind]
        for head, kind in zip(heads, lengths, strict=True)
    ]
    longest = max(len(row) - len(head) for head, kind in zip(heads, rows, strict=True) for row in kind)
    length = max(1, longest) + spare
    padded = [pad(kind, max(map(len, kind))) for kind in rows]
    packs, begins = pack(padded, length=length, shards=shards, chunks=chunks, heads=heads, agree=lambda most: most)
    count, first = shards * chunks, packs.before.tokens.shape[2]
    texts = heads if apart else heads[:1]
    end = sum(map(len, texts))
    assert packs.before.tokens.shape[:2] == (count, 1) and not packs.before.after.any()
    assert first - end < max(8, end / 4)
    tokens, positions, segments = (x[:, 0] for x in packs.before[:3])
    assert (tokens[:, :end] == np.concatenate(texts)).all()
    assert (positions[:, :end] == np.concatenate([np.arange(len(text)) for text in texts])).all()
    numbers = np.repeat(1 + np.arange(len(texts)), [len(text) for text in texts])
    assert (segments[:, :end] == numbers).all() and not segments[:, end:].any()
    taken = np.zeros((count, packs.tokens[0].size), int)
    for i, (kind, head, begin) in enumerate(zip(rows, heads, begins, strict=True)):
        for row, (tokens, start) in enumerate(zip(kind, begin, strict=True)):
            group, many = group_of(row, len(kind), shards, chunks), len(head)
            own = np.arange(start + many, start + max(len(tokens), many + 1))
            pack_of_row = (own[0] - first) // length
            assert pack_of_row == (own[-1] - first) // length
            found = at(packs, group, own)
            assert found[:2] == [tokens[many:] or [0], list(range(many, many + len(own)))]
            assert found[3] == [1 + i * apart] * len(own)
            assert found[2][0] > 0 and (packs.segments[group, pack_of_row] == found[2][0]).sum() == len(own)
            taken[group, own - first] += 1
    assert (taken == (packs.segments.reshape(count, -1) > 0)).all()
    assert not packs.tokens[packs.segments == 0].any() and not packs.before.follows[packs.segments == 0].any()


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(0, 30), st.integers(0, 20))
def test_texts_stand_whole_and_alone_behind_their_prompt(data, each, group, spare, wider):
    shards, chunks = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    count, ids = shards * chunks * each, iter(range(1, 10**6))
    starts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    more = data.draw(st.lists(st.integers(0, 9), min_size=count * group, max_size=count * group))
    prompts, texts = ([[next(ids) for _ in range(n)] for n in sizes] for sizes in (starts, more))
    length, room = max(max(more), 1) + spare, max(starts) + wider
    packs, ends, begins = pack_after(
        pad(prompts, max(starts) + 1),
        (pad(texts, length)[0].reshape(count, group, -1), np.array(more).reshape(count, group)),
        room=room,
        length=length,
        shards=shards,
        chunks=chunks,
        agree=lambda most: most,
    )
    before = packs.before
    groups, beginnings, width = before.tokens.shape
    assert (groups, width) == (shards * chunks, room) and beginnings <= each and packs.tokens.shape[1] <= each * group
    begun = np.zeros((groups, beginnings * room), int)
    taken = np.zeros((groups, packs.tokens[0].size), int)
    for row, prompt in enumerate(prompts):
        mine = group_of(row, count, shards, chunks)
        places = np.arange(ends[row] + 1 - len(prompt), ends[row] + 1)
        which = places[0] // room
        tokens, positions, segments = (x[mine].ravel()[places].tolist() for x in before[:3])
        assert tokens == prompt and positions == list(range(len(prompt))) and which == places[-1] // room
        assert set(segments) == {segments[0]} and segments[0] > 0
        assert (before.segments[mine, which] == segments[0]).sum() == len(prompt)
        begun[mine, places] += 1
        for text, begin in zip(texts[row * group : (row + 1) * group], begins[row], strict=True):
            own = begin + len(prompt) + np.arange(len(text))
            found, places = at(packs, mine, own), own - beginnings * room
            assert found[:2] == [text, list(range(len(prompt), len(prompt) + len(text)))]
            assert found[3] == segments[:1] * len(text)
            if text:
                of_text = places[0] // length
                assert before.after[mine, of_text] == which and of_text == places[-1] // length
                assert (packs.segments[mine, of_text] == found[2][0]).sum() == len(text)
            taken[mine, places] += 1
    assert (begun == (before.segments.reshape(groups, -1) > 0)).all()
    assert (taken == (packs.segments.reshape(groups, -1) > 0)).all()


@given(st.integers(1, 40_000), st.integers(0, 500))
def test_buckets_hold_their_rows_and_waste_little(length, more):
    bucket = bucket_of(length)
    assert length <= bucket < length + max(8, length / 4) and bucket % 8 == 0
    assert bucket_of(bucket) == bucket <= bucket_of(length + more)
    assert length <= pack_length(length) < 1.25 * (length + length // 4) + 8


def test_buckets_are_few():
    """Each is a shape to compile."""
    assert len({bucket_of(length) for length in range(1, 32_769)}) < 50


# --- chunked losses


def reference_terms(hidden, table, targets, ref_hidden):
    """numpy in float64, all logits at once: log-probability, entropy, KL(reference || policy)."""

    def log_softmax(x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    hidden, table, ref_hidden = (np.asarray(x, np.float64) for x in (hidden, table, ref_hidden))
    logp, ref = log_softmax(hidden @ table.T), log_softmax(ref_hidden @ table.T)
    picked = logp[np.arange(len(targets)), targets]
    return picked, -(np.exp(logp) * logp).sum(axis=-1), (np.exp(ref) * (ref - logp)).sum(axis=-1)


@functools.partial(jax.jit, static_argnames="chunk")
def terms_and_gradient(hidden, table, targets, ref_hidden, weights, used=None, *, chunk):
    """`token_terms`, and the gradient in hidden states and table of their sum with `weights` [3, N]."""

    def total(hidden, table):
        terms = token_terms(hidden, table, targets, ref_hidden=ref_hidden, used=used, chunk=chunk)
        return sum((w * term).sum() for w, term in zip(weights, terms, strict=True)), terms

    (_, terms), gradient = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table)
    return terms, gradient


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 5, 20]), st.floats(0.1, 20), seeds)
def test_token_terms_depend_neither_on_the_chunk_nor_on_what_does_not_count(chunk, scale, seed):
    rng = np.random.default_rng(seed)
    hidden, ref_hidden = (scale * rng.normal(size=(7, 4)).astype(np.float32) for _ in range(2))
    table, targets = rng.normal(size=(11, 4)).astype(np.float32), rng.integers(0, 11, 7)
    given = hidden, table, targets, ref_hidden, rng.normal(size=(3, 7)).astype(np.float32)
    terms, gradient = terms_and_gradient(*given, chunk=chunk)
    for found, right in zip(terms, reference_terms(hidden, table, targets, ref_hidden), strict=True):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-5 * scale)
    for found, right in zip(gradient, terms_and_gradient(*given, chunk=20)[1], strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4 * scale)
    used = rng.random(7) < 0.5
    given = *given[:-1], given[-1] * used
    terms, gradient = terms_and_gradient(*given, used, chunk=chunk)
    for found, right in zip(terms, reference_terms(hidden, table, targets, ref_hidden), strict=True):
        np.testing.assert_allclose(found[used], right[used], rtol=2e-5, atol=2e-5 * scale)
    for found, right in zip(gradient, terms_and_gradient(*given, chunk=20)[1], strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4 * scale)


def tanh_and_sum(params, part):
    return {"vector": jnp.tanh(part @ params["w"] + params["b"]), "sum": part.sum(axis=1)}


def everyone_with_everyone(encoded):
    """A loss in which every row meets every other."""
    return jax.nn.logsumexp(encoded["vector"] @ encoded["vector"].T * encoded["sum"]), encoded["sum"]


@functools.partial(jax.jit, static_argnames="chunks")
def cached(params, batch, chunks):
    found = grad_cache(tanh_and_sum, everyone_with_everyone, params, batch, chunks, has_aux=True)
    return found, in_chunks(tanh_and_sum, params, batch, chunks)


@jax.jit
def uncached(params, batch):
    def loss(params):
        return everyone_with_everyone(tanh_and_sum(params, batch))

    return jax.value_and_grad(loss, has_aux=True)(params), tanh_and_sum(params, batch)


@settings(max_examples=25)
@given(st.sampled_from([1, 3, 4, 12]), seeds)
def test_gradient_caching_is_the_gradient_of_the_whole_batch(chunks, seed):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    batch = rng.normal(size=(12, 5)).astype(np.float32)
    for found, right in zip(
        *map(jax.tree.leaves, (cached(params, batch, chunks), uncached(params, batch))), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


# --- the KL penalty

LOG_PROB = st.floats(-30, 0, width=32)


@given(st.lists(st.tuples(LOG_PROB, LOG_PROB, st.booleans()), min_size=1, max_size=8))
def test_k3_is_never_negative_and_pulls_towards_the_reference(tokens):
    logp, ref, mask = (np.array([column], np.float32) for column in zip(*tokens, strict=True))
    penalty, pull = jax.value_and_grad(lambda x: kl(x, ref, "k3", mask).sum())(logp)
    values = np.asarray(kl(logp, ref, "k3", mask))
    assert (values >= 0).all() and float(penalty) == pytest.approx(values.sum(), rel=1e-5)
    assert (values[mask == 0] == 0).all() and (np.asarray(pull)[mask == 0] == 0).all()
    # Its slope has the sign of the gap: a step down brings the policy back to the reference.
    assert (np.sign(pull) * np.sign(logp - ref) >= 0).all()


# --- refresh decisions


@st.composite
def decisions(draw):
    """Arguments of `refresh.choose`, some of them awkward: repeats, padding, ties, a budget of nothing or of all."""
    size, step = draw(st.integers(1, 30)), draw(st.integers(0, 9))
    rows = st.lists(st.integers(-1, size - 1), max_size=8)
    rollouts, found = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(seeds))
    return {
        "versions": np.array(draw(st.lists(st.integers(0, step), min_size=size, max_size=size))),
        "step": step,
        "budget": draw(st.integers(0, size + 3)),
        "positives": np.array(draw(rows), np.int64),
        "negatives": np.array(draw(rows), np.int64),
        "candidates": rng.integers(-1, size, (rollouts, found)),
        "scores": rng.integers(-3, 4, (rollouts, found)) / 4,
        "theta": rng.integers(-3, 4, rollouts) / 4,
        "ranks": rng.integers(1, 20, rollouts),
        "sigma": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "max_age": draw(st.none() | st.integers(0, 9)),
        "share": draw(st.sampled_from([0.0, 0.25, 1.0])),
    }


def urgent(d) -> list[int]:
    """What every policy that looks at searches must take first, by the words of `choose`'s docstring."""
    ages = d["step"] - d["versions"]
    oldest = sorted((row for row in range(len(ages)) if ages[row] > 0), key=lambda row: (-ages[row], row))
    overdue = [row for row in oldest if d["max_age"] is not None and ages[row] > d["max_age"]]
    due = oldest[: math.ceil(len(ages) / d["max_age"])] if d["max_age"] else []  # so that none grows older than that
    returned = set(d["candidates"].ravel().tolist())
    order = [row for row in overdue if row in returned] + overdue + due + [*d["positives"], *d["negatives"]]
    return [row for row in dict.fromkeys(map(int, order)) if row >= 0 and ages[row] > 0]


@settings(max_examples=200)
@given(decisions(), st.sampled_from(refresh.POLICIES))
def test_a_refresh_keeps_to_its_budget_and_its_order(d, policy):
    ages, before = d["step"] - d["versions"], {name: np.copy(value) for name, value in d.items()}
    chosen = refresh.choose(policy, **d).tolist()
    assert len(set(chosen)) == len(chosen) and all(ages[row] > 0 for row in chosen)
    assert chosen == refresh.choose(policy, **d).tolist()
    assert all(np.array_equal(value, before[name]) for name, value in d.items())  # given arrays stay as they are
    stale, returned = int((ages > 0).sum()), set(d["candidates"].ravel().tolist())
    if policy == "full":
        assert len(chosen) == stale and np.all(np.diff(ages[chosen]) <= 0)
        return
    assert len(chosen) <= d["budget"]
    if policy == "none":
        assert chosen == []
    elif policy == "round_robin":
        assert (
            len(chosen) == min(d["budget"], stale) and sorted(ages[chosen]) == sorted(ages)[len(ages) - len(chosen) :]
        )
    else:
        first = urgent(d)[: d["budget"]]
        assert chosen[: len(first)] == first
        if policy == "hybrid":
            assert len(chosen) == min(d["budget"], stale)  # what is left over goes to the oldest
        else:
            assert set(chosen[len(first) :]) <= returned
            more = refresh.choose(policy, **d | {"budget": d["budget"] + 1}).tolist()
            assert more[: len(chosen)] == chosen  # a larger budget takes the same, and one more


# --- the ledger


class Numbers:
    """Records that are their own ids."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


def identify(record, rng):
    return {"id": np.int64(record)}


def consume(workdir: pathlib.Path, records: int, batch: int, seed: int, ends: list[tuple[int, int]]) -> list[list[int]]:
    """The ledger of a run that is killed at each (step, steps since its last checkpoint) and goes on from there."""
    saved = (0, None, None)  # step, the iterator's state, where the log's files ended
    for end, lost in ends:
        step, state, offset = saved
        batches = stream(Numbers(records), transform=identify, batch_size=batch, seed=seed)
        if state is not None:
            batches.set_state(state)
        with RunLog(workdir, resume_offset=offset, quiet=True) as log:
            while step < end:
                step += 1
                log.consumed("sft", step, next(batches)["id"].tolist(), skipped=False)
                if step == max(saved[0], end - lost):
                    saved = (step, batches.get_state(), log.offset)
    lines = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, ends[-1][0] + 1))
    return [line["rows"] for line in lines]


@settings(max_examples=12)
@given(
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_kills_leave_a_ledger_without_lost_or_doubled_ids(records, batch, seed, kills):
    ends = [*sorted(kills), (10, 0)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        killed = consume(pathlib.Path(one), records, batch, seed, ends)
        assert killed == consume(pathlib.Path(other), records, batch, seed, [(10, 0)])
    ids = sum(killed, [])
    for epoch in (ids[i : i + records] for i in range(0, len(ids), records)):
        assert max(collections.Counter(epoch).values()) == 1 and set(epoch) <= set(range(records))
    assert len(ids) == 10 * batch
