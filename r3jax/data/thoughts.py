"""Supervised thoughts for a model trained from scratch: it must see first how to reason.

A thought is what the reasoning prompt of an Instruct model asks for, in its shortest form: the core concepts of the
query (its rarest words, in its order), then key terms of its relevant document that the query does not have (its
most telling ones, in its order): "about clipboard history xclip". The rule knows nothing of any corpus. A document's
terms are its words, flags (-x, --long) and the pieces of its paths and identifiers. Terms that are common in the
corpus (stop words, placeholders) tell nothing; rare ones (names that a handful of documents hold) cannot be learnt
from a handful of examples; the rarest of those between are the most telling. Terms that the tokenizer would have to
spell are left out too: a small model learns to choose words long before it learns to spell (what it can copy from the
query it may spell).
"""

import collections
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable

from r3jax.data.beir import Dataset

COMMON_QUERY = 0.1  # share of queries above which a word is no concept: "the", "file"
COMMON = 0.06  # share of documents above which a term tells nothing
RARE = 0.0006  # share of documents below which a term cannot be learnt
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_TERM = re.compile(r"(?<!\S)--?[^\W_]+(?:-[^\W_]+)*|" + _WORD.pattern)


class Thinker:
    """Writes thoughts: (query, relevant document) -> text. Counts words once, over a data set.

    Args:
      dataset: documents, and queries of `split`, over which frequencies are taken.
      query_terms, document_terms: at most so many of each, at least 0 and not both 0.
      split: the judgements whose queries count; held-out queries must not be looked at.
      is_word: whether the tokenizer has a document term as one token.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        query_terms: int,
        document_terms: int,
        split: str = "train",
        is_word: Callable[[str], bool] = lambda term: True,
    ):
        if min(query_terms, document_terms) < 0 or query_terms + document_terms == 0:
            raise ValueError(
                f"query_terms and document_terms must not be negative or both 0: {query_terms}, {document_terms}."
            )
        self.query_terms, self.document_terms = query_terms, document_terms
        asked = [dataset.query_texts[dataset.query_row[q]] for q in dataset.positives(split)]
        self._asked = _count(word.casefold() for text in asked for word in set(_WORD.findall(text)))
        self._written = _count(term for text in dataset.doc_texts for term in _terms(text))
        most = max(1, COMMON_QUERY * len(asked))
        self._concepts = {w for w, n in self._asked.items() if n <= most}
        size = len(dataset.doc_texts)
        least, most = RARE * size, max(1, COMMON * size)
        self._learnable = {t for t, n in self._written.items() if least <= n <= most and is_word(t)}

    def __call__(self, query: str, document: str) -> str:
        """`about`, concepts of the query, telling terms of the document, joined by single spaces; may be empty."""
        words = [w for w in dict.fromkeys(w.casefold() for w in _WORD.findall(query))]
        concepts = [w for w in words if w in self._concepts]
        rarest = set(sorted(concepts, key=self._asked.__getitem__)[: self.query_terms])  # stable: by position
        thought = [w for w in concepts if w in rarest]
        terms = _terms(document)
        telling = [t for t in terms if t in self._learnable and t not in rarest]
        keep = set(sorted(telling, key=self._written.__getitem__)[: self.document_terms])
        thought += [term for term in terms if term in keep]
        return " ".join(["about", *thought]) if thought else ""


def build(dataset: Dataset, thinker: Thinker, split: str = "train") -> dict[str, str]:
    """A thought for every query of a split, from its (best graded, first named) relevant document.

    Query id -> text; queries for which there is nothing to say are left out.
    """
    found = {}
    for query, rows in dataset.positives(split).items():
        thought = thinker(dataset.query_texts[dataset.query_row[query]], dataset.doc_texts[rows[0]])
        if thought:
            found[query] = thought
    return found


def write(thoughts: dict[str, str], path: str | pathlib.Path) -> None:
    """Writes thoughts as a thoughts.jsonl ({query_id, text} per line), replacing it in one step.

    `r3jax.data.beir.read_thoughts` reads it back; lying in a BEIR folder it is read with the data set.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        for query, text in thoughts.items():
            file.write(json.dumps({"query_id": query, "text": text}, ensure_ascii=False) + "\n")
    part.replace(path)


def _terms(text: str) -> dict[str, str]:
    """Terms in document order: what counts as the same term → how it first occurs (flags keep their case)."""
    found: dict[str, str] = {}
    for term in _TERM.findall(text):
        found.setdefault(term if term.startswith("-") else term.casefold(), term)
    return found


def _count(items: Iterable[str]) -> collections.Counter[str]:
    return collections.Counter(items)
