"""A sharded index answers as one index does. Its processes are threads here, which gather at a barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from r3jax.errors import UserError
from r3jax.processes import Processes
from r3jax.search.index import VersionedIndex
from r3jax.search.sharded import ShardedIndex
from tests.test_environment import DOCUMENTS, World, environment

N, WIDTH, COUNT = 1003, 16, 4  # the last process keeps fewer rows


def unit(x):
    x = np.asarray(x, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def vectors():
    found = unit(np.random.default_rng(0).normal(size=(N, WIDTH)))
    found[[5, 300, 900]] = found[700]  # ties, within and across shares
    return found


@pytest.fixture
def queries(vectors):
    near = vectors[[700, 3, 500]] + 0.1 * np.random.default_rng(1).normal(size=(3, WIDTH))
    return unit(np.concatenate([vectors[[700]], near]))


def together(work, count=COUNT):
    """`work(job)` of `count` processes at once; what each returned."""
    barrier, board = threading.Barrier(count), [None] * count

    def job(rank):
        def gather(x):
            board[rank] = np.array(x)
            barrier.wait(60)
            found = np.stack(board)
            barrier.wait(60)
            return found

        return Processes(rank, count, lambda what: None, gather)

    def one(rank):
        try:
            return work(job(rank))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def sharded(job, vectors, **kind) -> ShardedIndex:
    local = VersionedIndex.build(vectors[job.share(len(vectors))], 0, **kind)
    return ShardedIndex(local, np.zeros(len(vectors), np.int32), job)


def same(found, want):
    """The same rows and counts, and scores to the last bits: a matrix product's depend on the matrix's height."""
    for process in found:
        for a, b in zip(process, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-7 if np.asarray(a).dtype.kind == "f" else 0)


@pytest.mark.parametrize("kind", ("exact", "scann"))
def test_it_returns_exactly_what_one_index_returns(vectors, queries, kind):
    whole = VersionedIndex.build(vectors, 0, kind)
    for k in (1, 10, 400):  # the last is more than a share holds
        same(together(lambda job, k=k: sharded(job, vectors, kind=kind).search(queries, k)), whole.search(queries, k))
    assert whole.search(queries[:1], 4)[0].tolist() == [[5, 300, 700, 900]]  # ties went to the lower row


def test_scores_counts_and_upserts_are_those_of_one_index(vectors, queries):
    rng = np.random.default_rng(2)
    whole, rows = VersionedIndex.build(vectors, 0, "exact"), rng.permutation(N)[:200]
    fresh = unit(rng.normal(size=(200, WIDTH)))
    asked = np.concatenate([rng.integers(0, N, (len(queries), 30)), np.full((len(queries), 1), -1)], 1)
    least, never = np.full(len(queries), 0.3), rng.random(N) < 0.1

    def ask(index, share=slice(None)):
        index.upsert(rows, fresh, 3)
        index.upsert(rows[:0], fresh[:0], 4)
        return (
            index.scores(queries, asked),
            index.above(queries, least, asked),
            index.above(queries[:2], least[:2], asked[:2], never),
            index.above(queries[:0], least[:0], asked[:0]),
            index.versions,
            *index.search(queries, 7),
            *index.like(vectors[::-1][share]).search(queries, 7),
            index.recall_probe(queries, 7),
        )

    want = ask(whole)
    same(together(lambda job: ask(sharded(job, vectors, kind="exact"), job.share(N))), want)
    assert want[2].min() > 0 and want[1].max() < N


def test_trees_of_shares_find_as_much_as_their_bound(vectors):
    rng = np.random.default_rng(3)
    centres = unit(rng.normal(size=(40, WIDTH)))
    vectors = unit(centres[rng.integers(0, 40, 4000)] + 0.4 * unit(rng.normal(size=(4000, WIDTH))))
    queries = unit(vectors[rng.integers(0, 4000, 50)] + 0.2 * unit(rng.normal(size=(50, WIDTH))))

    def ask(job):
        index = sharded(job, vectors, kind="scann", tree_above=256)
        before = index.recall_probe(queries, 10)
        index.rebuild()
        return before, index.recall_probe(queries, 10), *index.search(queries, 10)

    found = together(ask)
    one = VersionedIndex.build(vectors, 0, "scann", tree_above=256).recall_probe(queries, 10)
    same(found, found[0])  # all processes get one answer
    assert min(found[0][:2]) >= min(0.95, one)
    exact = VersionedIndex.build(vectors, 0, "exact").search(queries, 10)[0]
    hits = np.mean([len(set(a) & set(b)) for a, b in zip(found[0][2], exact, strict=True)]) / 10
    assert hits >= 0.95


def test_rewards_and_refreshes_are_those_of_one_index():
    def steps(build, share=slice(None)):
        """Rewards, versions and figures of three steps of a drifting world."""
        world = World()
        env = environment(world, build(world.vectors.astype(np.float32)), probes=8, policy="hybrid", max_age=2)
        found = []
        for step in range(1, 4):
            world.move()
            rollouts = world.rollouts()
            rewards, stats = env.score(rollouts, world.encode, step)
            stats |= env.probe(rollouts, rewards, world.vectors[share])
            figures = [value for name, value in stats.items() if "time" not in name]
            found += [rewards, env.index.versions.copy(), *figures]
        return found

    want = steps(lambda vectors: VersionedIndex.build(vectors, 0, "exact"))
    everyone = together(lambda job: steps(lambda vectors: sharded(job, vectors, kind="exact"), job.share(DOCUMENTS)), 3)
    for found in everyone:
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shares_are_blocks_and_none_is_empty():
    blocks = [Processes(i, 4).share(10) for i in range(4)]
    assert [list(range(10))[b] for b in blocks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    with pytest.raises(UserError, match="9 documents are too few for 4 processes"):
        Processes(0, 4).share(9)


def test_a_local_part_of_another_share_is_refused(vectors):
    local = VersionedIndex.build(vectors[:10], 0, "exact")
    with pytest.raises(ValueError, match="share is 251"):
        ShardedIndex(local, np.zeros(N, np.int32), Processes(0, COUNT))


def test_a_state_without_its_tree_is_given_a_new_one(vectors):
    index = VersionedIndex.build(vectors, 0, "scann", tree_above=256)
    state = index.state() | {"tree": np.zeros(1, np.uint8)}
    state["settings"][2] = 0
    again = VersionedIndex.from_state(state)
    assert again.settings[2] == index.settings[2] > 0
    assert again.recall_probe(vectors[:50], 10) > index.recall_probe(vectors[:50], 10) - 0.1
