"""Supervised thoughts from relevant documents: a model trained from scratch must see first how to reason.

The rule knows nothing of any corpus. A document's terms are its words, flags (-x, --long) and the pieces of
its paths and identifiers. Terms that are common in the corpus (stop words, placeholders) tell nothing; rare ones
(names that a handful of documents hold) cannot be learnt from a handful of examples: with them a small model
wrote 2 % of the names right, see docs/RESULTS.md. Of those between, the `max_terms` rarest are the most telling;
they are written in document order.
"""

import collections
import json
import os
import pathlib
import re

from r3jax.data.beir import Dataset

COMMON = 0.06  # share of documents above which a term tells nothing
RARE = 0.0006  # share of documents below which a term cannot be learnt
_TERM = re.compile(r"(?<!\S)--?[^\W_]+(?:-[^\W_]+)*|[^\W_]+(?:-[^\W_]+)*")


def build(dataset: Dataset, *, max_terms: int, split: str = "train") -> dict[str, str]:
    """Writes a thought for every query of a split from its (best graded, first named) relevant document.

    Args:
      dataset: documents and judgements; idf is taken over all its documents.
      max_terms: at most so many terms per thought, at least 1.
      split: the judgements to read; held-out answers must not become training targets.

    Returns:
      Query id → terms joined by single spaces. Queries whose document has no term at all are left out.
    """
    if max_terms < 1:
        raise ValueError(f"max_terms must be at least 1, not {max_terms}.")
    frequency: collections.Counter[str] = collections.Counter()
    for text in dataset.doc_texts:
        frequency.update(_terms(text).keys())
    count = len(dataset.doc_texts)
    learnable = {term for term, n in frequency.items() if RARE * count <= n <= max(1, COMMON * count)}
    thoughts = {}
    for query, rows in dataset.positives(split).items():
        thought = _telling(dataset.doc_texts[rows[0]], frequency, learnable, max_terms)
        if thought:
            thoughts[query] = thought
    return thoughts


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


def _telling(text: str, frequency: collections.Counter[str], learnable: set[str], max_terms: int) -> str:
    terms = _terms(text)
    telling = [key for key in terms if key in learnable] or list(terms)[:1]
    keep = set(sorted(telling, key=frequency.__getitem__)[:max_terms])  # stable: ties by position
    return " ".join(form for key, form in terms.items() if key in keep)
