"""Nothing that ends ScaNN's process, or misleads it, reaches it: each known case by hand, then thousands at random."""

import numpy as np
import pytest

from r3jax.search import scann_backend
from r3jax.search.index import VersionedIndex
from tests import fixtures
from tests.fuzz_index import unit

N, D = 300, 8
VECTORS = unit(np.random.default_rng(0).normal(size=(N, D)))
KINDS = {"brute": {}, "tree": {"tree_above": 256, "leaves": 12}}


def holding(value, rows=VECTORS):
    rows = rows.copy()
    rows[1, 2] = value
    return rows


class Untouchable:
    """Stands where ScaNN was; whoever reaches for it has not checked."""

    def __getattr__(self, name):
        raise AssertionError(f"ScaNN's {name} was reached")


@pytest.fixture(params=KINDS)
def guarded(request, monkeypatch):
    """An index, two rows of it deleted, that must not reach ScaNN any more, and the options to build its like."""
    index = VersionedIndex.build(VECTORS, 0, **KINDS[request.param])
    index.delete([7, 8])
    index._scann._searcher = Untouchable()
    monkeypatch.setattr(scann_backend, "scann_ops_pybind", Untouchable())
    return index, KINDS[request.param]


# What ScaNN 1.4 does with each, unchecked.
KNOWN = {
    "upsert of NaN: ends the process (tree)": ("vectors", lambda i, o: i.upsert([0, 1], holding(np.nan)[:2], 1)),
    "upsert of infinity: ends the process (tree)": ("vectors", lambda i, o: i.upsert([0, 1], holding(np.inf)[:2], 1)),
    "build with NaN: ends the process (tree)": ("vectors", lambda i, o: VersionedIndex.build(holding(np.nan), 0, **o)),
    "build without documents: raises (tree)": ("vectors", lambda i, o: VersionedIndex.build(VECTORS[:0], 0, **o)),
    "more leaves than documents: raises (tree)": (
        "leaves",
        lambda i, o: VersionedIndex.build(VECTORS, 0, **(o | {"leaves": N + 1})),
    ),
    "NaN among queries: scores of NaN": ("queries", lambda i, o: i.search(holding(np.nan)[:4], 3)),
    "k above the size: rows of 0 with scores of NaN": ("k must", lambda i, o: i.search(VECTORS[:4], N + 1)),
    "k above what is not deleted: the same": ("k must", lambda i, o: i.search(VECTORS[:4], N - 1)),
    "k of 0": ("k must", lambda i, o: i.search(VECTORS[:4], 0)),
    "upsert of another width: raises, but knows the id from then on": (
        "vectors",
        lambda i, o: i.upsert([3], VECTORS[:1, :5], 1),
    ),
    "upsert of an unknown row: would grow": ("rows", lambda i, o: i.upsert([N], VECTORS[:1], 1)),
    "a row twice in an upsert: stored twice": ("rows", lambda i, o: i.upsert([3, 3], VECTORS[:2], 1)),
    "an unknown id to delete: its two halves disagree from then on": ("rows", lambda i, o: i.delete([3, N])),
    "a deleted id to delete: the same": ("rows", lambda i, o: i.delete([3, 7])),
    "a row twice to delete": ("rows", lambda i, o: i.delete([3, 3])),
    "nothing left": ("rows", lambda i, o: i.delete([r for r in range(N) if r not in (7, 8)])),
}


def damaged() -> dict:
    """The state of a tree of which a byte has changed."""
    state = VersionedIndex.build(VECTORS, 0, **KINDS["tree"]).state()
    state["tree"][len(state["tree"]) // 3] ^= 8
    return state


@pytest.mark.parametrize("case", KNOWN)
def test_it_is_caught_before_it_reaches_the_library(guarded, case):
    argument, call = KNOWN[case]
    with pytest.raises(ValueError, match=argument):
        call(*guarded)


def test_a_damaged_tree_never_reaches_the_library(monkeypatch):
    state = damaged()
    monkeypatch.setattr(scann_backend, "scann_ops_pybind", Untouchable())
    with pytest.raises(ValueError, match="tree'] cannot be restored: it is damaged"):
        VersionedIndex.from_state(state)


def test_batches_of_nothing_never_reach_the_library(guarded):
    """A batch size of 0 ends the process, in upsert as in search."""
    index, _ = guarded
    rows, scores = index.search(np.zeros((0, D), np.float32), 3)
    assert rows.shape == scores.shape == (0, 3)
    index.upsert([], np.zeros((0, D), np.float32), 5)
    index.delete([])
    assert index.living == N - 2 and index.versions.max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_upserts_are_safe(kind):
    """SOAR's spilled partitions are not: trees are built without."""
    index = VersionedIndex.build(VECTORS, 0, **KINDS[kind])
    rng = np.random.default_rng(1)
    for step in range(1, 30):
        rows = rng.permutation(N)[:100]
        index.upsert(rows, unit(rng.normal(size=(100, D))), step)
    assert index.recall_probe(unit(rng.normal(size=(20, D))), 5) > 0.5
    assert index.search(index.vectors[:5], 1)[0].ravel().tolist() == [0, 1, 2, 3, 4] or kind == "tree"


# Deleted documents.


@pytest.mark.parametrize("kind", ["exact", *KINDS])
def test_the_deleted_are_never_found_and_others_keep_their_row(kind):
    options = KINDS.get(kind, {})
    index = VersionedIndex.build(VECTORS, 0, "exact" if kind == "exact" else "scann", **options)
    rng = np.random.default_rng(2)
    gone = rng.permutation(N)[:120]
    index.delete(gone[:60])
    index.delete(gone[60:].tolist())
    left = np.setdiff1d(np.arange(N), gone)
    queries = unit(rng.normal(size=(6, D)))
    want = left[np.argsort(-(queries @ VECTORS[left].T), axis=1, kind="stable")]

    def held(index):
        assert index.living == len(left) == 180 and len(index) == N
        for k in (1, 10, 180):  # 180: those of negative score too, which a deleted one's 0 would pass
            rows, scores = index.search(queries, k)
            assert not np.isin(rows, gone).any()
            if kind != "tree" or k == 180:
                np.testing.assert_array_equal(rows, want[:, :k])
                np.testing.assert_allclose(scores, np.take_along_axis(queries @ VECTORS.T, want[:, :k], 1), atol=1e-6)
        with pytest.raises(ValueError, match="k must be between 1 and 180"):
            index.search(queries, 181)

    held(index)
    held(VersionedIndex.from_state(index.state()))
    index.rebuild()
    held(index)
    index.upsert(gone[:1], VECTORS[gone[:1]], 9)  # back again
    assert index.search(VECTORS[gone[:1]], 1)[0].tolist() == [[gone[0]]] and index.living == 181


# At random.


def fuzz(first: int, count: int) -> str:
    process = fixtures.run_python("-m", "tests.fuzz_index", str(first), str(count))
    said, errors = process.communicate(timeout=7200)
    assert process.returncode == 0, f"exit {process.returncode} in {said.splitlines()[-1:]}\n{errors[-2000:]}"
    return said.splitlines()[-1]


def test_random_sequences_of_calls_neither_crash_nor_mislead():
    assert fuzz(0, 200).startswith("played 200")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_random_sequences(part):
    assert fuzz(1000 + 2500 * part, 2500).startswith("played 2500")
