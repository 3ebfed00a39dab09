"""Random sequences of calls to the index, half of them hostile: python -m tests.fuzz_index FIRST COUNT

Sequence n is drawn from seed n. Beside the index goes a plain model of it, two dictionaries: what the index returns is
held against exact numpy scores of the model, and a hostile call must raise a ValueError that names the argument and
leave the index as it was. The number of each sequence is printed before it begins, so that the last line tells which
one ended the process.
"""

import io
import re
import sys

import numpy as np

from r3jax.search.index import VersionedIndex

WIDTHS = (1, 2, 8)  # few, for each compiles the exact search anew
DEPTHS = (1, 3, 10)
TREE = {"tree_above": 256, "leaves": 12}
TREE_RECALL = 0.8  # mean over all searches of trees; of one query's nearest neighbour it may be 0


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Sequence:
    """One index, its model, and the calls on them."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.kind = self.rng.choice(["exact", "brute", "brute", "tree"])
        self.width = int(self.rng.choice(WIDTHS))
        self.size = int(self.rng.choice([260, 300]) if self.kind == "tree" else self.rng.choice([1, 2, 9, 40]))
        self.options = TREE if self.kind == "tree" else {}
        self.model: dict[int, np.ndarray] = {}
        self.versions: dict[int, int] = {}
        self.recalls: list[float] = []
        self.refusals = 0

    def play(self) -> None:
        vectors = self.vectors(self.size)
        name = "exact" if self.kind == "exact" else "scann"
        if self.hostile():
            broken, arguments = self.broken_vectors(vectors)
            self.refused(arguments, lambda: VersionedIndex.build(broken, 0, name, **self.options))
            odd = self.pick([-1, 1.5, None, "1", True, 2**40, np.nan])
            self.refused("step", lambda: VersionedIndex.build(vectors, odd, name, **self.options))
            self.refused("vectors", lambda: VersionedIndex.build(vectors[:0], 0, name, **self.options))
        self.index = VersionedIndex.build(self.disguised(vectors), 0, name, **self.options)
        self.model = dict(enumerate(vectors))
        self.versions = dict.fromkeys(range(self.size), 0)
        calls = [
            self.upsert,
            self.upsert,
            self.carry,
            self.delete,
            self.search,
            self.search,
            self.save_and_load,
            self.rebuild,
        ]
        for _ in range(self.rng.integers(2, 8)):
            self.pick(calls)()
            self.same()
        self.search()

    # the calls

    def upsert(self) -> None:
        rows = self.some_rows(self.size)
        vectors = self.vectors(len(rows))
        step = int(self.rng.integers(0, 50))
        if self.hostile():
            broken, arguments = self.broken_rows(rows)
            count = np.asarray(broken, object).size  # as many, so that nothing else is wrong
            self.refused(arguments, lambda: self.index.upsert(broken, self.vectors(count), step))
            broken, arguments = self.broken_vectors(vectors if len(rows) else self.vectors(1))
            self.refused(arguments, lambda: self.index.upsert(rows if len(rows) else [0], broken, step))
            self.refused("vectors", lambda: self.index.upsert(rows, self.vectors(len(rows) + 1), step))
            self.refused("step", lambda: self.index.upsert(rows, vectors, self.pick([-1, 0.5, None, 2**31])))
        self.index.upsert(rows.tolist() if self.coin() else rows, self.disguised(vectors), step)
        for row, vector in zip(rows.tolist(), vectors, strict=True):
            self.model[row], self.versions[row] = vector, step

    def carry(self) -> None:
        matrix = np.eye(self.width) + 0.3 * self.rng.normal(size=(self.width, self.width))
        offset, step = 0.3 * self.rng.normal(size=self.width), int(self.rng.integers(0, 50))
        if self.hostile():
            wrong = self.pick([matrix * np.nan, matrix[0], np.ones((self.width + 1, self.width)), "x", None])
            self.refused("matrix", lambda: self.index.carry(wrong, offset, step))
            far = self.pick([offset * np.inf, np.ones(self.width + 1), "x", None])
            self.refused("offset", lambda: self.index.carry(matrix, far, step))
            self.refused("step", lambda: self.index.carry(matrix, offset, self.pick([-1, 0.5, None, 2**31])))
        self.index.carry(matrix, offset, step)
        for row, vector in self.model.items():
            if self.versions[row] < step:
                moved = vector @ matrix + offset
                length, found = np.linalg.norm(moved), self.index.vectors[row].copy()
                if length > 1e-3:  # shorter ones magnify rounding
                    np.testing.assert_allclose(found, moved / length, atol=1e-3)
                self.model[row] = found

    def delete(self) -> None:
        living = np.array(sorted(self.model))
        rows = self.rng.permutation(living)[: self.rng.integers(0, len(living))]
        if self.hostile():
            broken, arguments = self.broken_rows(rows)
            self.refused(arguments, lambda: self.index.delete(broken))
            self.refused("rows", lambda: self.index.delete(living))  # nothing would be left
            gone = sorted(set(range(self.size)) - set(living.tolist()))
            if gone:
                self.refused("rows", lambda: self.index.delete([*rows.tolist(), self.pick(gone)]))
        self.index.delete(rows)
        for row in rows.tolist():
            del self.model[row]

    def search(self) -> None:
        count = int(self.pick([0, 1, 5]))
        queries = self.vectors(count) * np.float32(self.pick([1, 1, 0, 1e-3, 1e6]))
        k = int(self.pick([k for k in (*DEPTHS, len(self.model)) if k <= len(self.model)]))
        if self.hostile():
            some = queries if count else self.vectors(1)
            for odd in (0, -1, len(self.model) + 1, 2**40, 1.0, None, True, "3"):
                self.refused("k", lambda odd=odd: self.index.search(some, odd))
            broken, arguments = self.broken_vectors(some, lengths=False)
            self.refused(arguments.replace("vectors", "queries"), lambda: self.index.search(broken, k))
            self.refused("queries", lambda: self.index.search(self.vectors(1) * np.float32(1e35), k))
        rows, scores = self.index.search(self.disguised(queries), k)
        assert rows.shape == scores.shape == (count, k) and rows.dtype == np.int32 and scores.dtype == np.float32
        if not count:
            return
        size = max(float(np.linalg.norm(queries, axis=1).max()), 1e-6)
        ids = np.array(sorted(self.model))
        truth = queries.astype(np.float64) @ np.stack([self.model[i] for i in ids.tolist()]).astype(np.float64).T
        best = -np.sort(-truth, axis=1)[:, :k]
        assert np.isin(rows, ids).all(), "a deleted or unknown row"
        assert all(len(set(row)) == k for row in rows.tolist()), "a row twice"
        assert (np.diff(scores, axis=1) <= 0).all()
        own = np.take_along_axis(truth, np.searchsorted(ids, rows), axis=1)
        np.testing.assert_allclose(scores / size, own / size, atol=1e-5)
        reached = (own >= best[:, -1:] - 1e-5 * size).mean()
        if self.kind == "tree" and k < len(ids):
            self.recalls.append(float(reached))
        else:
            assert reached == 1.0
            np.testing.assert_allclose(scores / size, best / size, atol=1e-5)

    def save_and_load(self) -> None:
        file = io.BytesIO()
        np.savez(file, **self.index.state())
        with np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as saved:
            state = dict(saved)
        if self.hostile():
            name = self.pick(sorted(state))
            self.refused(
                f"state lacks {name}", lambda: VersionedIndex.from_state({k: v for k, v in state.items() if k != name})
            )
            self.refused("state", lambda: VersionedIndex.from_state(None))
            broken, arguments = self.broken_vectors(state["vectors"])
            self.refused(arguments, lambda: VersionedIndex.from_state(state | {"vectors": broken}))
            odd = self.pick([state["versions"][:-1], state["versions"] + 0.5, "x", None, state["versions"] - 100])
            self.refused("versions", lambda: VersionedIndex.from_state(state | {"versions": odd}))
            odd = self.pick([[9, 300, 0], [1, 300, self.size + 1], [1, 0, 0], [1, 2], "x", [np.nan] * 3])
            self.refused("settings", lambda: VersionedIndex.from_state(state | {"settings": odd}))
            tree = state["tree"].copy()
            if self.kind == "tree":
                at = self.rng.integers(len(tree) // 2)  # past it there may be the directory, with bytes nobody reads
                torn = self.pick([tree[:at], tree[: len(tree) // 2], np.zeros_like(tree)])
                self.refused("tree", lambda: VersionedIndex.from_state(state | {"tree": torn}))
                fewer = {name: state[name][:-1] for name in ("vectors", "versions")}
                self.refused("tree", lambda: VersionedIndex.from_state(state | fewer))
            self.refused("tree", lambda: VersionedIndex.from_state(state | {"tree": self.pick([tree[:0], 1, "x"])}))
        self.index = VersionedIndex.from_state(state)

    def rebuild(self) -> None:
        self.index.rebuild()

    # hostile inputs, and the argument that a refusal must name

    def broken_rows(self, rows: np.ndarray) -> tuple[object, str]:
        rows = rows if len(rows) else np.array([0])
        odd = [
            [*rows.tolist(), self.size],
            [*rows.tolist(), -1],
            [*rows.tolist(), rows[0]],
            [*rows.tolist(), 2**63],
            [*rows.tolist(), 2**70],
            rows + 0.5,
            rows.astype(str),
            rows[None],
            [None],
            int(rows[0]),
            np.array([True]),
            [[1], [1, 2]],
        ]
        return self.pick(odd), "rows"

    def broken_vectors(self, vectors: np.ndarray, lengths: bool = True) -> tuple[object, str]:
        at = self.rng.integers(len(vectors)), self.rng.integers(self.width)

        def holding(value, dtype=np.float32):
            array = vectors.astype(dtype)
            array[at] = value
            return array

        odd = [
            holding(np.nan),
            holding(np.inf),
            holding(-np.inf, np.float16),
            holding(1e300, np.float64),  # an infinity in float32
            np.concatenate([vectors, vectors], axis=1),
            vectors[:, :0],
            vectors[0],
            vectors[None],
            vectors.astype(int),
            vectors.astype(complex),
            vectors.astype(str),
            vectors.astype(object),
            None,
            "vectors",
            [[1.0], [1.0, 2.0]],
        ]
        if lengths:
            odd += [vectors * 2, holding(1e3)]
        # One wide row may be short of nothing else: build takes any width.
        if not hasattr(self, "index"):
            del odd[4]
        return self.pick(odd), "vectors"

    def refused(self, argument: str, call) -> None:
        try:
            call()
        except ValueError as e:
            named = re.match(rf"({argument}|state\['{argument}'\])(?!\w)", str(e))
            assert named, f"{e!r} does not begin with {argument}"
            self.refusals += 1
        else:
            raise AssertionError(f"a hostile {argument} was accepted")

    # what the model knows, and draws

    def same(self) -> None:
        """The index holds what the model does, whatever was refused."""
        want = np.zeros((self.size, self.width), np.float32)
        for row, vector in self.model.items():
            want[row] = vector
        assert np.array_equal(self.index.vectors, want)
        assert self.index.versions.tolist() == [self.versions[row] for row in range(self.size)]
        assert self.index.living == len(self.model) and len(self.index) == self.size

    def vectors(self, count: int) -> np.ndarray:
        vectors = unit(self.rng.normal(size=(count, self.width)) + 1e-9)
        if count > 1 and self.coin():  # duplicates, of one another and of what is there
            vectors[self.rng.integers(count)] = vectors[self.rng.integers(count)]
        if count and self.model and self.coin():
            vectors[self.rng.integers(count)] = self.model[self.pick(sorted(self.model))]
        return vectors

    def some_rows(self, size: int) -> np.ndarray:
        return self.rng.permutation(size)[: self.rng.integers(0, min(size, 20) + 1)]

    def disguised(self, array: np.ndarray) -> np.ndarray:
        """The same numbers in another layout or type."""
        strided = np.repeat(array, 2, axis=0)[::2]
        return self.pick([array, np.asfortranarray(array), array.astype(np.float64), strided])

    def hostile(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def coin(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def pick(self, options):
        return options[self.rng.integers(len(options))]


def main(first: int, count: int) -> None:
    recalls, refusals = [], 0
    for seed in range(first, first + count):
        print(f"sequence {seed}", flush=True)
        sequence = Sequence(seed)
        sequence.play()
        recalls += sequence.recalls
        refusals += sequence.refusals
    assert np.mean(recalls) >= TREE_RECALL, f"the trees' mean recall is {np.mean(recalls)}"
    print(f"played {count}: {refusals} refusals, trees' recall {np.mean(recalls):.3f} of {len(recalls)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
