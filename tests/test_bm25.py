"""BM25 against the formula, computed by hand."""

import collections
import math

import numpy as np
import pytest

from r3jax.evaluation.bm25 import BM25

# Already stemmed and free of stop words, so that the reference needs neither.
DOCS = ["dog cat", "dog dog bird", "fish", "cat bird fish dog", "bird"]


def _reference(query, k1=0.9, b=0.4):
    """Lucene's BM25 (Kamphuis et al. 2020, table 1), float64 [N]; a repeated query word counts again."""
    bags = [collections.Counter(d.split()) for d in DOCS]
    average = sum(sum(bag.values()) for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        total = 0.0
        for word in query.split():
            holders = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
            total += idf * bag[word] / (bag[word] + k1 * (1 - b + b * sum(bag.values()) / average))
        scores.append(total)
    return np.array(scores)


@pytest.mark.parametrize("query", ["dog", "cat bird", "fish dog bird", "dog dog cat"])
def test_scores_follow_the_formula(query):
    rows, scores = BM25([f"d{i}" for i in range(5)], DOCS).search([query], 5)
    expected = _reference(query)
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    hits = rows[0] >= 0
    assert set(rows[0][hits]) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(scores[0][hits], expected[rows[0][hits]], rtol=1e-6)
    assert (np.diff(scores[0]) <= 0).all()


def test_words_are_stemmed_and_stop_words_dropped():
    index = BM25(["a", "b"], ["Listing the FILES", "removing a folder"])
    rows, scores = index.search(["lists of file", "the and of"], 2)
    assert rows.tolist() == [[0, -1], [-1, -1]]
    assert scores[0, 0] > 0 and not scores[1].any()


def test_odd_sizes():
    index = BM25(["a", "b", "c"], ["one word", "", "two words"])
    rows, scores = index.search(["word", "", "unheard"], 10)
    assert rows.shape == scores.shape == (3, 10)
    assert sorted(rows[0][:2]) == [0, 2] and (rows[0][2:] == -1).all() and (rows[1:] == -1).all()
    assert np.isfinite(scores).all()
    assert index.search([], 4)[0].shape == (0, 4)
    assert (BM25(["a"], ["the"]).search(["the word"], 2)[0] == -1).all()


def test_it_is_quiet(capfd):
    BM25(["a"], ["one word"]).search(["word"], 1)
    assert capfd.readouterr() == ("", "")


def test_misuse():
    with pytest.raises(ValueError, match="doc_ids"):
        BM25([], [])
    with pytest.raises(ValueError, match="doc_texts"):
        BM25(["a"], ["x", "y"])
    with pytest.raises(ValueError, match="k must"):
        BM25(["a"], ["word"]).search(["word"], 0)
