"""How texts become vectors, directly or after a thought: the model without its weights. Evaluation and `SearchR3` read
by the same code.

Axes: Q queries, N rows, D width.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence

import jax
import numpy as np

from r3jax.model.encoder import bucket_of, encode_rows, pad
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sampler import advance, begin, sample, unstacked
from r3jax.model.sharding import batch_parts, own_rows, put_batch, to_host
from r3jax.text.prompts import ChatFormat

TEMPERATURE = 0.7  # of sampled thoughts


OnRows = Callable[[int], None]  # told how many rows each batch has done


def nobody(rows: int) -> None:
    """An `OnRows` that tells nobody."""


def unheard() -> None:
    """A sign of life that nobody waits for."""


@dataclasses.dataclass(frozen=True)
class Reasoned:
    """What came of thinking, for each of Q queries."""

    thoughts: list[list[int]]  # the first one's token ids, without the embed token
    vectors: np.ndarray  # [Q, D] unit
    emitted: np.ndarray  # [Q] share of thoughts that ended with the embed token by themselves
    tokens: np.ndarray  # [Q] of all thoughts together


@dataclasses.dataclass(frozen=True)
class Reader:
    """Sizes, chat format and limits; the weights are given with each call."""

    model: ModelConfig
    mesh: jax.sharding.Mesh
    chat: ChatFormat
    max_query: int  # tokens of a query's text
    max_new: int  # tokens of a thought, the embed token included
    batch_size: int
    thoughts: int = 0  # of the condition `averaged` of an evaluation; with 0 or 1 it is left out
    beat: Callable[[], None] = unheard  # a sign of life after each batch, for whoever watches for a hang

    def direct(self, params, texts: Sequence[str], on_rows: OnRows = nobody) -> np.ndarray:
        """Unit vectors [Q, D] of queries read without reasoning."""
        return self.encode(params, self.chat.direct_queries(texts, self.max_query), on_rows)

    def with_thoughts(
        self, params, texts: Sequence[str], thoughts: Sequence[Sequence[int]], on_rows: OnRows = nobody
    ) -> np.ndarray:
        """Unit vectors [Q, D] of queries followed by given thoughts (token ids)."""
        prompts = self.chat.reasoning_prompts(texts, self.max_query)
        end = [self.chat.tokenizer.embed_id]
        return self.encode(params, [[*p, *t, *end] for p, t in zip(prompts, thoughts, strict=True)], on_rows)

    def reason(self, params, texts: Sequence[str], count: int = 1, on_rows: OnRows = nobody) -> Reasoned:
        """`think` about queries."""
        return self.think(params, self.chat.reasoning_prompts(texts, self.max_query), count, on_rows)

    def think(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        count: int = 1,
        on_rows: OnRows = nobody,
    ) -> Reasoned:
        """The model's own thoughts and the vectors they end in: one greedy, or the mean over `count` sampled.

        A thought that does not end with the embed token within `max_new` is read as if the model had then given the
        direct answer, which does end with it.

        Args:
          prompts: token rows of at most `reasoning_extra` + `max_query` ids. They are batched by length.
          on_rows: called with the number of prompts that each batch has done.
        """
        thoughts, vectors, emitted = self._sample(params, prompts, count, on_rows)
        late = np.argwhere(~emitted)
        rows = [self.chat.direct_after([*prompts[i], *thoughts[i][g]]) for i, g in late]
        vectors[tuple(late.T)] = self.encode(params, rows)
        tokens = np.array([sum(map(len, group)) for group in thoughts], np.int64)
        return Reasoned([group[0] for group in thoughts], _unit(_unit(vectors).mean(1)), emitted.mean(1), tokens)

    def think_aloud(self, params, prompt: Sequence[int]) -> Generator[list[int], None, Reasoned]:
        """`think` about one prompt: yields the ids of the thought so far at each new one, and returns the outcome."""
        stops = (self.chat.tokenizer.im_end_id, self.chat.tokenizer.pad_id)
        rows = [prompt] * batch_parts(self.mesh)
        tokens, lengths = put_batch(self.mesh, pad(rows, self.prompt_width(len(prompt))))
        ends = {"embed_id": self.chat.tokenizer.embed_id, "stop_ids": stops}
        with jax.set_mesh(self.mesh):
            state = begin(params, tokens, lengths, config=self.model, max_new=self.max_new)
            weights = unstacked(params, self.model)
        thought: list[int] = []
        done = False
        while not done:
            with jax.set_mesh(self.mesh):  # not around the yield: the caller's own mesh must be as it was
                state = advance(weights, state, config=self.model, **ends, count=1)
                done, row, length = (
                    x[0, 0] for x in jax.device_get((state.done, state.result.tokens, state.result.lengths))
                )
            written = _thought(row[:length].tolist(), done, stops)
            if len(written) > len(thought):
                thought = written
                yield thought
        emitted = bool(jax.device_get(state.result.emitted)[0, 0])
        if emitted:
            vectors = _unit(jax.device_get(state.result.embedding)[:1, 0])
        else:
            vectors = self.encode(params, [self.chat.direct_after([*prompt, *thought])])
        return Reasoned([thought], vectors, np.array([float(emitted)]), np.array([len(thought)]))

    def _sample(self, params, prompts, count: int, on_rows):
        """Thoughts (ids, Q lists of `count`), the hidden states [Q, count, D] at their ends, and whether they ended."""
        tokenizer = self.chat.tokenizer
        stops = (tokenizer.im_end_id, tokenizer.pad_id)
        parts = batch_parts(self.mesh)
        size = -(-max(1, self.batch_size // count) // parts) * parts
        thoughts: list[list[list[int]]] = [[] for _ in prompts]
        vectors = np.empty((len(prompts), count, self.model.width), np.float32)
        emitted = np.empty((len(prompts), count), bool)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            filled = np.resize(chosen, size)  # with rows that are there: they end when they end
            batch = (
                *pad([prompts[i] for i in filled], self.prompt_width(len(prompts[chosen[-1]]))),
                filled.astype(np.int32),
            )
            tokens, ends, ids = put_batch(self.mesh, own_rows(self.mesh, batch))
            with jax.set_mesh(self.mesh):
                done = to_host(
                    sample(
                        params,
                        tokens,
                        ends,
                        ids,
                        jax.random.key(0),
                        config=self.model,
                        group=count,
                        max_new=self.max_new,
                        temperature=TEMPERATURE if count > 1 else 0.0,
                        embed_id=tokenizer.embed_id,
                        stop_ids=stops,
                    )
                )
            for i, group, lengths in zip(chosen, done.tokens, done.lengths, strict=False):
                for row, length in zip(group.tolist(), lengths, strict=True):
                    thoughts[i].append(_thought(row[:length], True, stops))
            vectors[chosen] = done.embedding[: len(chosen)]
            emitted[chosen] = done.emitted[: len(chosen)]
            on_rows(len(chosen))
            self.beat()
        return thoughts, vectors, emitted

    def encode(self, params, rows, on_rows: OnRows = nobody, keep: slice = slice(None)) -> np.ndarray:
        """Unit vectors [N, D] of token rows that end with the embed token: `encode_rows`."""

        def told(count: int) -> None:
            on_rows(count)
            self.beat()

        return encode_rows(
            params,
            self.model,
            self.mesh,
            rows,
            batch_size=self.batch_size,
            heads=self.chat.heads,
            keep=keep,
            on_rows=told,
        )

    def one_each(self, head: Sequence[int], lengths: Iterable[int]) -> list[list[int]]:
        """Rows of these lengths that begin with a head of the chat, one for each shape that `encode` compiles."""
        shapes = {(bucket_of(n), bucket_of(n - len(head))): n for n in lengths}
        return [[*head, *[self.chat.tokenizer.pad_id] * (n - len(head))] for n in shapes.values()]

    def prompt_width(self, longest: int) -> int:
        """The padded length of a batch of prompts: few, for each compiles a decoding loop."""
        widest = bucket_of(self.chat.reasoning_extra + self.max_query)
        return min(widest, max(128, 1 << (longest - 1).bit_length()))


def _thought(row: list[int], done: bool, stops: Sequence[int]) -> list[int]:
    """What a model has written, without the embed token at the end (if it is `done`) and the stop before it."""
    thought = row[:-1] if done else row
    return thought[:-1] if thought and thought[-1] in stops else thought


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
