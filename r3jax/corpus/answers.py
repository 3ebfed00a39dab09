"""A query's way to its hits: read it with or without a thought, search, fetch the texts; each step timed.

Axes: D width, k hits.
"""

import dataclasses
import json
import time
from typing import Any, Protocol

import numpy as np

from r3jax.corpus.documents import StoredDocuments
from r3jax.reader import Reader

SHOWN = 160  # characters of a document on a terminal


class Searchable(Protocol):
    """An `Encoding` or a `SavedIndex`."""

    @property
    def documents(self) -> StoredDocuments: ...

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one query. Times are milliseconds."""

    query: str
    thought: str | None  # None without reasoning
    emitted: bool  # whether the thought ended with the embed token in time
    tokens: int  # of the thought
    hits: list[tuple[str, float, str]]  # id, score, text; best first
    read_ms: float
    search_ms: float
    cut: bool  # whether the query is longer than the model reads, so that its end was not read

    @property
    def ms_per_token(self) -> float | None:
        """Of reading the query and thinking; the embed token counts too."""
        return None if self.thought is None else self.read_ms / (self.tokens + self.emitted or 1)

    def as_json(self) -> str:
        """One line."""
        found: dict[str, Any] = {"query": self.query, "cut": self.cut, "thought": self.thought}
        if self.thought is not None:
            found |= {"emitted": self.emitted, "tokens": self.tokens, "ms_per_token": round(self.ms_per_token, 3)}
        found |= {"read_ms": round(self.read_ms, 3), "search_ms": round(self.search_ms, 3)}
        found["hits"] = [{"id": name, "score": round(score, 6), "text": text} for name, score, text in self.hits]
        return json.dumps(found, ensure_ascii=False)

    def as_text(self) -> str:
        """For people: the thought, a line for each hit, and the times."""
        lines = ["note: the query is longer than the model reads; its end was not read"] if self.cut else []
        cost = f"{self.read_ms:.1f} ms to read"
        if self.thought is not None:
            lines.append(f"thought: {self.thought or '(empty)'}" + ("" if self.emitted else "  (cut, did not end)"))
            cost += f" and think ({self.tokens} tokens, {self.ms_per_token:.2f} ms per token)"
        for place, (name, score, text) in enumerate(self.hits, 1):
            line = " ".join(text.split())
            line = line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
            lines.append(f"{place:>3}  {score:.4f}  {name}  {line}")
        return "\n".join([*lines, f"{cost}, {self.search_ms:.1f} ms to search"])


@dataclasses.dataclass(frozen=True)
class Searcher:
    """A model and documents that it has encoded."""

    params: Any
    reader: Reader
    found_in: Searchable

    def warm(self, k: int, reasoning: bool) -> None:
        """Compiles what queries of any length need, and searches for k once, so that none waits for it.

        But one whose thought does not end in time may: it is read anew, and how long it is then is not known.
        """
        reader, chat = self.reader, self.reader.chat
        if reasoning:
            texts = [[chat.tokenizer.pad_id] * n for n in range(reader.max_query + 1)]
            widths = {reader.prompt_width(chat.reasoning_extra + len(text)): text for text in texts}
            for text in widths.values():
                reader.think(self.params, [chat.to_reason(text)])
        else:
            lengths = range(chat.direct_extra, chat.direct_extra + reader.max_query + 1)
            for row in reader.one_each(chat.direct_head, lengths):
                reader.encode(self.params, [row])
        self.answer("a", k, reasoning)

    def answer(self, query: str, k: int, reasoning: bool) -> Answer:
        """The best k documents (all, where there are fewer) for a query."""
        begin = time.perf_counter()
        cut = len(self.reader.chat.tokens([query])[0]) > self.reader.max_query
        thought, emitted, tokens = None, True, 0
        if reasoning:
            found = self.reader.reason(self.params, [query])
            vectors, tokens, emitted = found.vectors, int(found.tokens[0]), bool(found.emitted[0] == 1)
            thought = self.reader.chat.tokenizer.decode(found.thoughts[0])
        else:
            vectors = self.reader.direct(self.params, [query])
        read = time.perf_counter()
        documents = self.found_in.documents
        rows, scores = self.found_in.search(vectors, min(k, len(documents)))
        hits = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            name, text = documents[row]
            hits.append((name, score, text))
        done = time.perf_counter()
        return Answer(query, thought, emitted, tokens, hits, 1000 * (read - begin), 1000 * (done - read), cut)
