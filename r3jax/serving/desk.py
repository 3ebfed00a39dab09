"""Where routes bring their rows: the queue, the clock and the counters are the same for all of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from r3jax.serving.batching import Batcher, Closed, Full, Read
from r3jax.serving.limits import Limits
from r3jax.serving.metrics import Metrics
from r3jax.serving.model import QUERY, Rows, Served
from r3jax.serving.refusal import Refusal, overloaded

T = TypeVar("T")

SMALL = 4096  # characters, ids or numbers
EACH = 32  # characters that one more text costs


async def aside(size: int, work: Callable[..., T], *given) -> T:
    """What `work` returns, done on a thread unless it is small: then to change threads costs more than the work."""
    return work(*given) if size <= SMALL else await asyncio.to_thread(work, *given)


class Desk:
    """One model, its batches, and what a client may ask."""

    def __init__(self, served: Served, limits: Limits):
        self.served, self.limits = served, limits
        self.batcher = Batcher(self._read, served.many.batch_size, limits.waiting)
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.streams = 0

    def _read(self, think: bool, rows: list) -> list[Read]:
        found = self.served.read(think, rows)
        self.metrics.batches.labels("reasoning" if think else "direct").observe(len(rows))
        self.metrics.written.inc(sum(len(read.thought) for read in found))
        return found

    async def rows(self, mode: str, inputs: Sequence[str] | Sequence[Sequence[int]], param: str) -> Rows:
        """The rows of texts or ids; Refusal where they are too many tokens together."""
        ids = await aside(sum(len(text) + EACH for text in inputs), self.served.tokens, inputs)
        if (tokens := sum(map(len, ids))) > self.limits.tokens:
            said = (
                f"{param} has {tokens:,} tokens, {self.limits.tokens:,} is the most of one request; send less at once."
            )
            raise Refusal(400, said, param)
        found = self.served.rows(mode, ids)
        self.metrics.read.labels(mode).inc(found.tokens)
        self.metrics.cut.labels(mode).inc(found.cut)
        return found

    async def read(self, mode: str, rows: Sequence[Sequence[int]]) -> list[Read]:
        """What comes of rows, in their order, read together with what others ask."""
        try:
            futures = self.batcher.submit(mode == QUERY, rows)
        except Full:
            raise overloaded("too many texts are waiting; try again in a second, or send fewer.") from None
        except Closed:
            raise overloaded("the server is stopping; try again when it is back.") from None
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    @contextlib.asynccontextmanager
    async def clock(self) -> AsyncIterator[None]:
        """Refuses what takes too long."""
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise self.late() from None

    def late(self) -> Refusal:
        return overloaded(f"this was not done within {self.limits.seconds:g} s; try again later, or send less at once.")
