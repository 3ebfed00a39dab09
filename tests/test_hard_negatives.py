"""Mined negatives: brute force over all documents, the filter, copies, ids, turns."""

import json

import numpy as np
import pytest

from r3jax.corpus.mining import Mined, mine, sentence, summary, to_line
from r3jax.data.beir import Dataset

N, Q, D = 30, 8, 6


@pytest.fixture
def dataset():
    texts = [f"text {i}" for i in range(N)]
    texts[5] = texts[0]  # a copy of a positive of q0
    texts[6] = "query 0"  # a query's own text
    texts[8] = texts[7]  # two copies
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 20}": 0, f"d{i + 10}": 2} for i in range(Q)}
    ids = [f"d{i}" for i in range(N)]
    ids[9] = "q1"  # q1 is a document too
    qrels["q3"].pop("d13")
    return Dataset("x", ids, texts, [f"q{i}" for i in range(Q)], [f"query {i}" for i in range(Q)], {"train": qrels}, *(
        {}, [], ""))  # fmt: skip


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(Q, D)), rng.normal(size=(N, D))
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in draws]


@pytest.mark.parametrize("margin, above", [(1.0, None), (0.9, None), (0.9, 0.3)])
def test_negatives_are_the_best_below_the_limit(dataset, vectors, margin, above):
    queries, documents = vectors
    scores = queries @ documents.T
    everything = np.argsort(-scores, axis=1)
    found = mine(dataset, "train", queries, documents, {"model": everything}, count=5, margin=margin, above=above)
    dropped = 0
    for q, m in enumerate(found):
        positives = [q, q + 10] if q != 3 else [3]
        best = scores[q, positives].max()
        limit = best - (1 - margin) * abs(best)
        limit = limit if above is None else min(limit, above)
        own = {dataset.doc_texts[p] for p in positives} | {dataset.query_texts[q]}
        can = [c for c in everything[q] if c not in positives and dataset.doc_texts[c] not in own]
        can = [c for c in can if dataset.doc_ids[c] != f"q{q}"]
        wanted = []
        for c in can:
            if scores[q, c] <= limit and dataset.doc_texts[c] not in {dataset.doc_texts[w] for w in wanted}:
                wanted.append(c)
        assert (
            m.negatives == wanted[:5] and sorted(m.positives) == positives and m.sources == ["model"] * len(wanted[:5])
        )
        assert m.dropped == sum(scores[q, c] > limit for c in can)
        assert all(abs(score - scores[q, row]) < 1e-6 for row, score in m.scores.items())
        dropped += m.dropped
    assert dropped > 0


def test_sources_take_turns_and_lines_are_flag_embeddings(dataset, vectors):
    documents = vectors[1]
    queries = documents[:Q]  # their positives: nothing scores higher
    dense = np.array([[c for c in range(14, 20)]] * Q)
    lexical = np.array([[14, 15, 29, -1, -1, -1]] * Q)
    both = {"model": dense, "bm25": lexical}
    found = mine(dataset, "train", queries, documents, both, count=4, margin=1.0, above=None)
    free = [m for m in found if m.dropped == 0 and not {14, 15, 16, 17, 29} & set(m.positives)]
    assert free
    for m in free:
        assert m.negatives == [14, 15, 16, 29] and m.sources == ["model", "bm25", "model", "bm25"]
    line = json.loads(to_line(dataset, free[0]))
    assert line["neg"] == ["text 14", "text 15", "text 16", "text 29"] and line["neg_id"][-1] == "d29"
    assert line["query"] == dataset.query_texts[free[0].query] and len(line["neg_scores"]) == 4
    assert line["pos_id"] == [dataset.doc_ids[p] for p in free[0].positives]
    empty = Mined(0, [0], [], [], {0: 0.5}, 3)
    assert "1 queries without a negative left out" in sentence(summary([*free, empty]))
