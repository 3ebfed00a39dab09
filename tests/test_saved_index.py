"""An index on disk: what was built is what is found, after additions, replacements, deletions and kills too."""

import json

import numpy as np
import pytest

from r3jax.corpus import saved_index
from r3jax.corpus.encoding import open_encoding
from r3jax.errors import UserError
from r3jax.search.index import KINDS
from tests.test_encoding import WIDTH, run, vector

IDENTITY = {"compute_dtype": "float32"}


def encoded(folder, documents, **identity):
    """An encoding of {id: text}."""
    folder.mkdir()
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in documents.items()))
    run(source, folder / "out", **IDENTITY | identity)
    return open_encoding(folder / "out")


def nearest(documents, query, k):
    """{id: text} → ids and scores by plain numpy."""
    vectors = np.stack([vector(text) for text in documents.values()]).astype(np.float32)
    scores = vectors @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return [list(documents)[i] for i in order], scores[order]


def check(searchable, documents, queries, k=5):
    rows, scores = searchable.search(queries, k)
    for i, query in enumerate(queries):
        names, wanted = nearest(documents, query, k)
        assert [searchable.documents[row] for row in rows[i]] == [(name, documents[name]) for name in names]
        np.testing.assert_allclose(scores[i], wanted, atol=1e-6)


@pytest.fixture
def queries():
    draw = np.random.default_rng(0).normal(size=(7, WIDTH)).astype(np.float32)
    return draw / np.linalg.norm(draw, axis=1, keepdims=True)


FIRST = {f"a{i}": f"first {i}" for i in range(50)}


@pytest.mark.parametrize("kind", KINDS)
def test_build_add_replace_delete(tmp_path, queries, kind):
    folder = tmp_path / "index"
    saved_index.build_index(encoded(tmp_path / "one", FIRST), folder, kind)
    check(saved_index.open_index(folder), FIRST, queries)
    more = {"b0": "new", "a3": "changed", "b1": "newer", "a40": "changed too"}
    assert saved_index.add(folder, encoded(tmp_path / "two", more)) == (2, 2)
    now = FIRST | more
    check(saved_index.open_index(folder), now, queries)
    gone = [nearest(now, queries[0], 1)[0][0], "b1"]
    assert saved_index.delete(folder, gone) == 50
    now = {name: text for name, text in now.items() if name not in gone}
    check(saved_index.open_index(folder), now, queries)
    assert len(list(folder.iterdir())) == 3  # the manifest, one generation, the lock
    assert b"newer" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_an_encoding_is_searched_as_it_is(tmp_path, queries, monkeypatch):
    """Exactly and in blocks; ties go to the lower row."""
    monkeypatch.setattr("r3jax.corpus.encoding.BLOCK", 16)
    encoding = encoded(tmp_path / "one", FIRST)
    check(encoding, FIRST, queries, 20)
    alike = encoded(tmp_path / "two", {f"c{i}": "the same" for i in range(40)})
    rows, scores = alike.search(queries, 20)
    assert (rows == np.arange(20)).all() and (scores == scores[:, :1]).all()
    whole, _ = alike.search(queries[:1], 40)
    assert whole[0].tolist() == list(range(40))


def test_a_kill_leaves_the_old_index(tmp_path, queries, monkeypatch):
    folder = tmp_path / "index"
    saved_index.build_index(encoded(tmp_path / "one", FIRST), folder, "exact")
    two = encoded(tmp_path / "two", {"b0": "new"})
    for name in ("stored.write", "manifest.write", "np.savez"):
        with monkeypatch.context() as patch:
            patch.setattr(f"r3jax.corpus.saved_index.{name}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                saved_index.add(folder, two)
        check(saved_index.open_index(folder), FIRST, queries)
    saved_index.add(folder, two)
    check(saved_index.open_index(folder), FIRST | {"b0": "new"}, queries)


def test_a_build_that_was_killed_is_begun_anew(tmp_path, queries, monkeypatch):
    folder, one = tmp_path / "index", encoded(tmp_path / "one", FIRST)
    for name in ("stored.write", "np.savez", "manifest.write"):
        with monkeypatch.context() as patch:
            patch.setattr(f"r3jax.corpus.saved_index.{name}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                saved_index.build_index(one, folder, "exact")
    saved_index.build_index(one, folder, "exact")
    check(saved_index.open_index(folder), FIRST, queries)
    (tmp_path / "other" / "1").mkdir(parents=True)
    (tmp_path / "other" / "1" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="where something is already"):
        saved_index.build_index(one, tmp_path / "other", "exact")


def test_of_two_changes_at_once_the_second_is_refused(tmp_path, queries, monkeypatch):
    folder, one = tmp_path / "index", encoded(tmp_path / "one", FIRST)
    said = []

    def meanwhile(write):
        def wrapped(*given):
            for change in (
                lambda: saved_index.delete(folder, ["a2"]),
                lambda: saved_index.add(folder, one),
                lambda: saved_index.build_index(one, folder, "exact"),
            ):
                with pytest.raises(UserError, match="being changed by another process|something is already") as refused:
                    change()
                said.append(str(refused.value))
            return write(*given)

        return wrapped

    saved_index.build_index(one, folder, "exact")
    monkeypatch.setattr(saved_index.stored, "write", meanwhile(saved_index.stored.write))
    saved_index.delete(folder, ["a1"])
    assert len(said) == 3 and said[0].startswith(f"INDEX: {folder} is being changed")
    monkeypatch.undo()
    saved_index.delete(folder, ["a2"])  # the lock is free again
    check(saved_index.open_index(folder), {n: t for n, t in FIRST.items() if n not in ("a1", "a2")}, queries)


def test_mistakes(tmp_path):
    one = encoded(tmp_path / "one", FIRST)
    folder = tmp_path / "index"
    saved_index.build_index(one, folder, "exact")
    for what, complaint in (
        (lambda: saved_index.build_index(one, folder, "exact"), "where something is already"),
        (lambda: saved_index.delete(folder, ["a1", "zz"]), "no document 'zz'; nothing was deleted"),
        (lambda: saved_index.delete(folder, list(FIRST)), "left without a document"),
        (lambda: saved_index.open_index(tmp_path), "holds no index"),
        (lambda: saved_index.open_index(one.folder), "holds no index"),
        (lambda: saved_index.add(folder, encoded(tmp_path / "x", FIRST, model="m")), "encoded with another model"),
        (lambda: saved_index.add(folder, encoded(tmp_path / "y", FIRST, system="s")), "encoded with another prompt"),
    ):
        with pytest.raises(UserError, match=complaint):
            what()
    assert len(saved_index.open_index(folder).documents) == 50
    assert saved_index.is_index(folder) and not saved_index.is_index(one.folder)
    whole = (folder / "1" / "index.npz").read_bytes()
    for damaged in (b"", b"PK", whole[:900]):
        (folder / "1" / "index.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="holds no index"):
            saved_index.open_index(folder)
