"""Hard negatives before there is a model: documents that BM25 finds alike."""

import numpy as np

from r3jax.data.beir import Dataset
from r3jax.evaluation.bm25 import BM25

NEIGHBOURS = 16


def bm25_neighbours(dataset: Dataset, split: str) -> np.ndarray:
    """Rows [N, NEIGHBOURS] of the documents most like each relevant document of a split.

    -1 stands where there are none, as in the rows of all other documents. The document itself is left out;
    which neighbours are relevant to a query is the caller's to check.
    """
    relevant = sorted({row for rows in dataset.positives(split).values() for row in rows})
    table = np.full((len(dataset.doc_ids), NEIGHBOURS), -1, np.int32)
    searcher = BM25(dataset.doc_ids, dataset.doc_texts)
    depth = min(NEIGHBOURS + 1, len(dataset.doc_ids))
    rows, _ = searcher.search([dataset.doc_texts[row] for row in relevant], depth)
    for document, found in zip(relevant, rows, strict=True):
        others = [row for row in found if row >= 0 and row != document][:NEIGHBOURS]
        table[document, : len(others)] = others
    return table
