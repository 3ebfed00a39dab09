"""BM25, the lexical baseline that every dense result is shown beside.

Lucene's variant (Kamphuis et al. 2020) with k1 = 0.9 and b = 0.4, the values of Anserini and BEIR's tables,
computed by bm25s (Lù 2024). Texts are lower-cased; words are runs of two or more word characters; Lucene's
33 English stop words (``bm25s.stopwords.STOPWORDS_EN``) are dropped and the rest is stemmed by Snowball's
English stemmer.
"""

import logging
from collections.abc import Sequence

import numpy as np
import Stemmer


def _library():
    """bm25s, imported when it is needed: that runs JAX, which must not choose its devices before an entry point has."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets DEBUG, which others' handlers then print
    return bm25s


class BM25:
    """An index over N documents.

    Args:
      doc_ids: N ids, in the order that the rows of ``search`` point into.
      doc_texts: N texts (title and text already joined where a corpus has titles).
      progress: show bm25s's bars.

    Raises:
      ValueError: if there is no document, or ids and texts differ in number.
    """

    def __init__(self, doc_ids: Sequence[str], doc_texts: Sequence[str], progress: bool = False):
        if not len(doc_ids):
            raise ValueError("doc_ids is empty: BM25 needs a document")
        if len(doc_ids) != len(doc_texts):
            raise ValueError(f"doc_ids has {len(doc_ids)} entries, doc_texts {len(doc_texts)}")
        self.doc_ids = list(doc_ids)
        self._progress = progress
        self._stemmer = Stemmer.Stemmer("english")
        self._index = _library().BM25(method="lucene", k1=0.9, b=0.4)
        tokens = self._tokenize(doc_texts)
        # A corpus of stop words alone has no vocabulary, which bm25s cannot index: nothing matches then.
        self._blank = not any(tokens)
        if not self._blank:
            self._index.index(tokens, show_progress=progress)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query.

        Returns:
          rows int32 [Q, k] into ``doc_ids`` and scores float32 [Q, k], best first. Documents that share no
          word with the query are not returned: rows are -1 and scores 0 from there on, also where k exceeds
          the number of documents.

        Raises:
          ValueError: if k < 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        rows = np.full((len(queries), k), -1, np.int32)
        scores = np.zeros((len(queries), k), np.float32)
        if self._blank or not len(queries):
            return rows, scores
        depth = min(k, len(self.doc_ids))
        # The numpy selection: "auto" would start jax, and take whatever device it finds.
        found, values = self._index.retrieve(
            self._tokenize(queries), k=depth, show_progress=self._progress, backend_selection="numpy"
        )
        rows[:, :depth], scores[:, :depth] = found, values
        rows[scores <= 0] = -1
        return rows, scores

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        return _library().tokenize(
            list(texts),
            stopwords="english",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=self._progress,
        )
