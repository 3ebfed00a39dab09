"""The versioned index: against plain numpy, through upserts and restores, and before ScaNN can crash."""

import jax
import numpy as np
import pytest

from r3jax.search.index import VersionedIndex
from r3jax.search.scann_backend import ScannBackend, rescore

N, D = 1200, 16
BACKENDS = {
    "exact": {"kind": "exact"},
    "brute": {"kind": "scann"},
    "tree": {"kind": "scann", "tree_above": 1000, "leaves": 20},
}


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, D))
    vectors = unit(centres[rng.integers(0, 30, N)] + 0.5 * rng.normal(size=(N, D)))
    queries = unit(vectors[:40] + 0.1 * rng.normal(size=(40, D)))
    return vectors, queries


def drifted(vectors, seed, count=150):
    """Rows and their new vectors."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(vectors), count, replace=False)
    return rows, unit(vectors[rows] + 0.1 * rng.normal(size=(count, vectors.shape[1])))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["exact", "brute"])
@pytest.mark.parametrize("k", [1, 10, N])
def test_search_equals_numpy_after_upserts(data, backend, k):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    rows, new = drifted(vectors, 1)
    index.upsert(rows, new, 3)
    current = vectors.copy()
    current[rows] = new
    found, scores = index.search(queries, k)
    truth = queries.astype(np.float64) @ current.T.astype(np.float64)
    assert found.dtype == np.int32 and scores.dtype == np.float32 and found.shape == (40, k)
    assert np.array_equal(found, np.argsort(-truth, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(scores, np.take_along_axis(truth, found.astype(int), 1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert np.array_equal(np.flatnonzero(index.versions == 3), np.sort(rows))
    assert np.array_equal(index.vectors, current)


def test_tree_finds_most_and_scores_exactly(data):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS["tree"])
    assert index._leaves == 20
    found, scores = index.search(queries, 10)
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[found]), atol=1e-6)
    assert index.recall_probe(queries, 10) > 0.8
    exact, _ = VersionedIndex.build(vectors, 0, "exact").search(queries, 10)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert index.recall_probe(queries, 10) == pytest.approx(overlap, abs=1e-6)


def test_a_tree_answers_in_full_when_its_partitions_are_too_small(data):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS["tree"])
    assert not index._scann.search(queries, 900)[2].all()  # else the case does not arise
    found, scores = index.search(queries, 900)
    assert np.isfinite(scores).all() and all(len(set(row)) == 900 for row in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restored_index_goes_on_bit_for_bit(data, backend):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    for step in (1, 2):
        index.upsert(*drifted(vectors, step), step)
    state = index.state()
    assert all(isinstance(a, np.ndarray) and a.dtype != object for a in state.values())
    twin = VersionedIndex.from_state({name: array.copy() for name, array in state.items()})
    for step in (3, 4, 5):
        assert same(index.search(queries, 50), twin.search(queries, 50))
        for each in (index, twin):
            each.upsert(*drifted(vectors, step), step)
    assert same(index.search(queries, 50), twin.search(queries, 50))
    first, second = index.state(), twin.state()
    assert np.array_equal(first["vectors"], second["vectors"])
    assert np.array_equal(first["versions"], second["versions"])
    assert np.array_equal(first["tree"], second["tree"])


def test_the_state_is_a_snapshot(data):
    index = VersionedIndex.build(data[0], 0)
    state = index.state()
    index.upsert([0], data[0][5:6], 9)
    assert np.array_equal(state["vectors"], data[0]) and state["versions"].max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_does_not_depend_on_the_batch(data, backend):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    rows, scores = index.search(queries, 20)
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert same(index.search(queries[part], 20), (rows[part], scores[part]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_vectors_come_in_row_order(backend, data):
    vectors = data[0].copy()
    vectors[[40, 7, 900]] = vectors[100]
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    assert index.search(vectors[100:101], 4)[0].tolist() == [[7, 40, 100, 900]]


@pytest.mark.parametrize("backend", ["brute", "tree"])
def test_upserts_reach_the_backend(data, backend):
    vectors, _ = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    target = unit(np.ones((1, D)))
    index.upsert([17], target, 4)
    assert index.search(target, 1)[0].tolist() == [[17]]


def test_rebuild_keeps_vectors_and_versions_and_recall(data):
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS["tree"])
    rng = np.random.default_rng(5)
    new = unit(rng.normal(size=(N, D)))
    index.upsert(np.arange(N), new, 6)
    before = index.recall_probe(unit(rng.normal(size=(100, D))), 10)
    index.rebuild()
    assert index.recall_probe(unit(rng.normal(size=(100, D))), 10) > before - 0.1
    assert np.array_equal(index.vectors, new) and (index.versions == 6).all()


def test_the_callers_arrays_are_copied_and_views_are_read_only(data):
    mine = data[0].copy()
    index = VersionedIndex.build(mine, 0, "exact")
    mine[:] = 0
    assert np.array_equal(index.vectors, data[0])
    with pytest.raises(ValueError):
        index.vectors[0] = 0
    with pytest.raises(ValueError):
        index.versions[0] = 1


def test_other_layouts_and_types_are_accepted(data):
    vectors, queries = data
    want = VersionedIndex.build(vectors, 0).search(queries, 5)[0]
    index = VersionedIndex.build(np.asfortranarray(vectors.astype(np.float64)), np.int32(0))
    assert index.vectors.dtype == np.float32 and index.vectors.flags.c_contiguous
    assert np.array_equal(index.search(np.asfortranarray(queries.astype(np.float64)), 5)[0], want)


def test_empty_batches(data):
    for options in BACKENDS.values():
        index = VersionedIndex.build(data[0], 0, **options)
        index.upsert([], np.zeros((0, D), np.float32), 1)
        rows, scores = index.search(np.zeros((0, D), np.float32), 7)
        assert rows.shape == scores.shape == (0, 7) and index.versions.max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_searches_inside_a_training_loop(data, backend):
    """Under an Explicit mesh and with implicit transfers forbidden, as the trainer's loop runs."""
    vectors, queries = data
    index = VersionedIndex.build(vectors, 0, **BACKENDS[backend])
    want = index.search(queries, 900)  # so many that a tree falls back on exact search
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        index.upsert([3], vectors[3:4], 1)
        assert same(index.search(queries, 900), want)
        index.recall_probe(queries, 10)
        index.state()


def bad(array, value):
    array = array.copy()
    array[1, 2] = value
    return array


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_would_crash_or_mislead_scann_is_refused(data, backend):
    vectors, queries = data
    options = BACKENDS[backend]
    index = VersionedIndex.build(vectors, 0, **options)
    two = vectors[:2]
    cases = [
        ("vectors .* row 1", lambda: VersionedIndex.build(bad(vectors, np.nan), 0, **options)),
        ("vectors .* row 1", lambda: VersionedIndex.build(bad(vectors, np.inf), 0, **options)),
        ("vectors .* matrix", lambda: VersionedIndex.build(vectors[0], 0, **options)),
        ("vectors .* floating", lambda: VersionedIndex.build(vectors.astype(int), 0, **options)),
        ("vectors .* at least one", lambda: VersionedIndex.build(vectors[:0], 0, **options)),
        ("vectors .* L2-normalised", lambda: VersionedIndex.build(vectors * 2, 0, **options)),
        ("step", lambda: VersionedIndex.build(vectors, -1, **options)),
        ("kind", lambda: VersionedIndex.build(vectors, 0, "hnsw")),
        ("leaves", lambda: VersionedIndex.build(vectors, 0, leaves=N + 1)),
        ("tree_above", lambda: VersionedIndex.build(vectors, 0, tree_above=0)),
        ("queries .* row 1", lambda: index.search(bad(queries, np.nan), 5)),
        ("queries .* width", lambda: index.search(queries[:, :5], 5)),
        ("k must", lambda: index.search(queries, 0)),
        ("k must", lambda: index.search(queries, N + 1)),
        ("k must", lambda: index.search(queries, 2.0)),
        ("vectors .* row 1", lambda: index.upsert([1, 2], bad(two, np.nan), 1)),
        ("vectors .* width", lambda: index.upsert([1, 2], two[:, :7], 1)),
        ("vectors has 2 rows", lambda: index.upsert([1], two, 1)),
        ("rows .* twice", lambda: index.upsert([3, 3], two, 1)),
        ("rows names row 1200", lambda: index.upsert([3, N], two, 1)),
        ("rows names row -1", lambda: index.upsert([3, -1], two, 1)),
        ("rows must hold integers", lambda: index.upsert([1.0, 2.0], two, 1)),
        ("step", lambda: index.upsert([1, 2], two, 2**40)),
        ("queries", lambda: index.recall_probe(queries[:0], 5)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    # Nothing of the refused reached the index.
    assert np.array_equal(index.vectors, vectors) and index.versions.max() == 0
    assert same(index.search(queries, 5), VersionedIndex.from_state(index.state()).search(queries, 5))


def test_a_broken_state_is_refused(data):
    state = VersionedIndex.build(data[0], 0).state()
    with pytest.raises(ValueError, match="lacks versions"):
        VersionedIndex.from_state({k: v for k, v in state.items() if k != "versions"})
    with pytest.raises(ValueError, match="versions"):
        VersionedIndex.from_state(state | {"versions": state["versions"][:-1]})
    with pytest.raises(ValueError, match="vectors.* NaN"):
        VersionedIndex.from_state(state | {"vectors": bad(state["vectors"], np.nan)})


def test_no_pickle_is_written(data):
    blob = ScannBackend(data[0].copy(), 20).assets().tobytes()
    assert b"docids" not in blob and b".pkl" not in blob


def test_rescore_does_not_depend_on_the_candidates_order():
    rng = np.random.default_rng(2)
    vectors, queries = unit(rng.normal(size=(50, D))), unit(rng.normal(size=(70, D)))
    rows = np.argsort(rng.random((70, 50)), axis=1).astype(np.int32)
    assert same(rescore(vectors, queries, rows, 9), rescore(vectors, queries, np.sort(rows, axis=1), 9))
