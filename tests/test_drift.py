"""The common part of what documents have moved: fitted to some, applied to all others."""

import numpy as np
import pytest

from r3jax.search.drift import common_drift
from r3jax.search.index import VersionedIndex
from tests.test_environment import DOCUMENTS, World, environment, play, unit

N, D = 300, 12


@pytest.fixture
def moved():
    """Vectors, and where a shift and a linear map have taken them."""
    rng = np.random.default_rng(0)
    old = unit(rng.normal(size=(N, D)))
    return old, unit(old @ (np.eye(D) + 0.1 * rng.normal(size=(D, D))) + 0.3 * rng.normal(size=D))


def test_it_is_ridge_regression_of_the_movement(moved):
    old, new = (x[:40].astype(np.float64) for x in moved)
    matrix, offset = common_drift(old, new, stiffness=2.0)
    shift = (new - old).sum(0) / 42
    around = old - old.mean(0)
    # The same minimum, found by least squares on rows that pull towards standing still.
    rows = np.concatenate([around, np.sqrt(2.0) * np.eye(D)])
    slope = np.linalg.lstsq(rows, np.concatenate([new - old - shift, np.zeros((D, D))]), rcond=None)[0]
    np.testing.assert_allclose(matrix, np.eye(D) + slope, atol=1e-10)
    np.testing.assert_allclose(old @ matrix + offset, old + shift + around @ slope, atol=1e-10)


def test_few_documents_hardly_move_the_others(moved):
    old, new = moved
    ways = [np.linalg.norm(old @ m + b - old) for m, b in (common_drift(old[:n], new[:n]) for n in (1, 3, 30, 200))]
    assert ways == sorted(ways) and ways[0] < 0.35 * ways[-1]
    matrix, offset = common_drift(old, old)
    np.testing.assert_allclose(matrix, np.eye(D), atol=1e-12)
    np.testing.assert_allclose(offset, 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_what_was_not_encoded_follows_and_all_else_stays(moved, kind):
    old, new = moved
    index = VersionedIndex.build(old, 0, kind)
    index.upsert(np.arange(100), new[:100], 5)
    index.delete([200])
    index.search(new[:1], 3)  # the searcher has seen the old ones
    index.carry(*common_drift(old[:100], new[:100]), 5)
    np.testing.assert_array_equal(index.vectors[:100], new[:100])
    assert not index.vectors[200].any() and index.living == N - 1
    assert (index.versions[:100] == 5).all() and not index.versions[100:].any()
    stale = np.delete(np.arange(100, N), 100)
    np.testing.assert_allclose(np.linalg.norm(index.vectors[stale], axis=1), 1, atol=1e-6)
    away = [1 - (new[stale] * x[stale]).sum(1).mean() for x in (old, index.vectors)]
    assert away[0] > 0.03 and away[1] < 0.1 * away[0]
    # A search knows where they are now, and an upsert after it takes effect.
    index.upsert([250], new[:1], 6)
    rows, scores = index.search(new[:20], 5)
    want = VersionedIndex.from_state(index.state()).search(new[:20], 5)
    np.testing.assert_array_equal(rows, want[0])
    np.testing.assert_allclose(scores, np.take_along_axis(new[:20] @ index.vectors.T, rows, 1), atol=1e-6)
    assert rows[0].tolist()[:2] == [0, 250]


def test_a_tree_scores_its_proposals_by_where_they_are(moved):
    old, _ = moved
    index = VersionedIndex.build(old, 0, "scann", tree_above=256)
    index.carry(np.eye(D), 0.5 * np.ones(D), 1)
    rows, scores = index.search(old[:10], 3)
    np.testing.assert_allclose(scores, np.take_along_axis(old[:10] @ index.vectors.T, rows, 1), atol=1e-6)
    before = index.recall_probe(old[:50], 10)
    index.rebuild()
    assert index.recall_probe(old[:50], 10) > before


def test_a_map_that_no_vector_can_follow_leaves_it(moved):
    old, _ = moved
    index = VersionedIndex.build(old, 0, "exact")
    index.carry(np.zeros((D, D)), np.zeros(D), 1)
    np.testing.assert_array_equal(index.vectors, old)


@pytest.mark.parametrize(
    "words, call",
    [
        ("old and new", lambda i, x: common_drift(x, x[:2])),
        ("old and new", lambda i, x: common_drift(x[:0], x[:0])),
        ("old and new must be finite", lambda i, x: common_drift(x * np.nan, x)),
        ("stiffness", lambda i, x: common_drift(x, x, 0.0)),
        ("matrix", lambda i, x: i.carry(np.eye(D + 1), np.zeros(D), 1)),
        ("matrix", lambda i, x: i.carry(np.eye(D)[:3], np.zeros(D), 1)),
        ("matrix", lambda i, x: i.carry(np.full((D, D), np.nan), np.zeros(D), 1)),
        ("offset", lambda i, x: i.carry(np.eye(D), np.zeros(D - 1), 1)),
        ("offset", lambda i, x: i.carry(np.eye(D), "far", 1)),
        ("step", lambda i, x: i.carry(np.eye(D), np.zeros(D), -1)),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(moved, words, call):
    index = VersionedIndex.build(moved[0], 0, "scann")
    with pytest.raises(ValueError, match=words):
        call(index, moved[0])
    np.testing.assert_array_equal(index.vectors, moved[0])


class Drifting(World):
    """A world that shifts and turns as a whole; each document wanders a little besides."""

    def __init__(self):
        super().__init__(drift=0.02)
        self.shift = 0.06 * self.rng.normal(size=self.vectors.shape[1])
        self.turn = np.eye(len(self.shift)) + 0.02 * self.rng.normal(size=(len(self.shift), len(self.shift)))

    def move(self):
        super().move()
        self.vectors = unit(self.vectors @ self.turn + self.shift)


def test_carrying_keeps_the_rewards_near_those_of_a_fresh_corpus():
    errors, drifts = {}, {}
    for carry in (False, True):
        env = environment(Drifting(), policy="hybrid", budget=30, carry=carry, probes=50)
        world = Drifting()
        played = list(play(env, world, 15))
        errors[carry] = np.mean([np.abs(r - e).mean() for r, e, _ in played[3:]])
        drifts[carry] = np.mean([stats["index/probe_drift"] for *_, stats in played[3:]])
        assert all(stats["index/reencoded"] <= 30 < DOCUMENTS / 10 for *_, stats in played)
    assert errors[True] < 0.35 * errors[False] and errors[False] > 0.02
    assert drifts[True] < 0.2 * drifts[False]
