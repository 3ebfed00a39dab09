"""The model that is served, and the shapes that it is read in: few, and all compiled before the first request.

Axes: D width, k hits.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from r3jax.corpus.answers import Searchable
from r3jax.reader import Reader
from r3jax.serving.batching import Read

QUERY, DIRECT, DOCUMENT = "query", "query-direct", "document"  # what follows NAME: in a model's name
BATCH = 32  # rows at most; one alone has a shape of its own


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts as the rows that the model reads."""

    rows: list[list[int]]
    tokens: int  # of the texts alone, after they were cut
    cut: int  # texts that were longer than the model reads


class Served:
    """A model under a name, and documents to search in if there are some."""

    def __init__(
        self, name: str, params: Any, reader: Reader, max_document: int, thinks: bool, found_in: Searchable | None
    ):
        """max_document: tokens of a document's text; thinks: whether the model has the head that thoughts need."""
        self.name, self.params, self.max_document, self.thinks = name, params, max_document, thinks
        self.one = dataclasses.replace(reader, batch_size=1)
        self.many = dataclasses.replace(reader, batch_size=min(BATCH, reader.batch_size))
        self.chat, self.width = reader.chat, reader.model.width
        self.found_in = found_in
        self._searching = threading.Lock()  # documents are read through one open file

    @property
    def models(self) -> dict[str, str]:
        """{name: mode}."""
        modes = [QUERY] * self.thinks + [DIRECT, DOCUMENT]
        return {f"{self.name}:{mode}": mode for mode in modes}

    def tokens(self, inputs: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Ids of texts; what are ids already stays as it is."""
        texts = [text for text in inputs if isinstance(text, str)]
        return self.chat.tokens(texts) if texts else [list(ids) for ids in inputs]  # type: ignore[arg-type]

    def rows(self, mode: str, ids: Sequence[Sequence[int]]) -> Rows:
        """What the model reads of texts given as ids, as `SearchR3` would."""
        limit = self.max_document if mode == DOCUMENT else self.one.max_query
        kept = [list(text[:limit]) for text in ids]
        chat = self.chat.to_reason if mode == QUERY else self.chat.direct
        cut = sum(len(text) > limit for text in ids)
        return Rows([chat(text) for text in kept], sum(map(len, kept)), cut)

    def read(self, think: bool, rows: list[list[int]]) -> list[Read]:
        """For `Batcher`: at most `many.batch_size` rows."""
        reader = self.one if len(rows) == 1 else self.many
        if not think:
            return [Read(vector) for vector in reader.encode(self.params, rows)]
        found = reader.think(self.params, rows)
        parts = zip(found.vectors, found.thoughts, found.emitted == 1, strict=True)
        return [Read(vector, thought, bool(emitted)) for vector, thought, emitted in parts]

    def read_aloud(self, row: Sequence[int]) -> Iterator[Read]:
        """`read` of one prompt to think about: the thought so far at each new token; the last has the vector."""
        telling = self.one.think_aloud(self.params, row)
        while True:
            try:
                yield Read(None, next(telling))
            except StopIteration as end:
                found = end.value
                break
        yield Read(found.vectors[0], found.thoughts[0], bool(found.emitted[0] == 1))

    def hits(self, vector: np.ndarray, k: int, most: int) -> list[tuple[str, float, str]]:
        """(id, score, text) of the k best documents; k is at most `most`, which alone decides what is compiled."""
        assert self.found_in is not None
        with self._searching:
            documents = self.found_in.documents
            rows, scores = self.found_in.search(vector[None], min(most, len(documents)))
            best = zip(rows[0, :k].tolist(), scores[0, :k].tolist(), strict=True)
            return [(documents[row][0], score, documents[row][1]) for row, score in best]

    def warming(self, most: int) -> list[Callable[[], Any]]:
        """What to call so that no request compiles anything, whatever its length; searches ask for `most` hits."""
        steps: list[Callable[[], Any]] = []

        def told(row: list[int]) -> None:
            for _ in self.read_aloud(row):
                pass

        chat, longest = self.chat, max(self.one.max_query, self.max_document)
        ends = [(chat.direct_head, range(chat.direct_extra, chat.direct_extra + longest + 1))]
        prompts = range(chat.reasoning_extra, chat.reasoning_extra + self.one.max_query + 1)
        if self.thinks:  # a thought that does not end in time is read with the direct answer after it
            after = len(chat.direct_after([]))
            ends.append((chat.reasoning_head, range(prompts.start + after, prompts.stop + self.one.max_new + after)))
        for reader in (self.one, self.many):
            for head, lengths in ends:
                steps += [partial(reader.encode, self.params, [row]) for row in reader.one_each(head, lengths)]
            if self.thinks:
                for n in {reader.prompt_width(n): n for n in prompts}.values():
                    prompt = chat.to_reason([chat.tokenizer.pad_id] * (n - chat.reasoning_extra))
                    steps.append(partial(reader.think, self.params, [prompt]))
                    if reader is self.one:
                        steps.append(partial(told, prompt))
        if self.found_in is not None:
            steps.append(partial(self.hits, np.eye(1, self.width, dtype=np.float32)[0], 1, most))
        return steps
