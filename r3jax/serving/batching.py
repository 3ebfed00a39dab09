"""Requests that wait at the same time are read together: one thread owns the batches, whoever waits fills the next.

A batch takes one row of each request in turn, so that a question is not kept waiting behind a corpus.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

LINGER = 0.003  # seconds that an idle batcher waits for company before it begins


@dataclasses.dataclass(frozen=True)
class Read:
    """What came of one row: its unit vector [D] (None while the thought is being written), and the thought's ids."""

    vector: np.ndarray | None
    thought: list[int] = dataclasses.field(default_factory=list)
    emitted: bool = True  # whether the thought ended with the embed token


class Full(Exception):
    """There is no room for that many rows now."""


class Closed(Exception):
    """The batcher takes nothing any more."""


Job = deque[tuple[Sequence[int], Future]]


class Batcher:
    """Collects rows of ids, of prompts to think about and of chats to read directly, into batches of `size`."""

    def __init__(self, read: Callable[[bool, list], list[Read]], size: int, room: int):
        """`read(think, rows)` is called on one thread, with at most `size` rows. `room`: rows that may wait."""
        self._read, self._size, self._room = read, size, room
        self._jobs: dict[bool, deque[Job]] = {False: deque(), True: deque()}
        self._waiting = 0
        self._thinks_next = True
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._waiting

    def submit(self, think: bool, rows: Sequence[Sequence[int]]) -> list[Future]:
        """A future `Read` for each row. One that is cancelled before its turn is left out.

        Raises:
          Full: more rows would wait than there is room for; none was taken.
          Closed: `close` was called.
        """
        futures: list[Future] = [Future() for _ in rows]
        with self._changed:
            if self._closing:
                raise Closed
            if self._waiting + len(rows) > self._room:
                raise Full
            self._waiting += len(rows)
            if rows:
                self._jobs[think].append(deque(zip(rows, futures, strict=True)))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Reads what waits, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            think, rows, futures = batch
            try:
                found = self._read(think, rows)
            except Exception as error:  # whoever waits for it is told; the next batch may go well
                for future in futures:
                    future.set_exception(error)
                continue
            for future, read in zip(futures, found, strict=True):
                future.set_result(read)

    def _next(self) -> tuple[bool, list, list[Future]] | None:
        """The next batch; None when there is none and will be none."""
        with self._changed:
            while True:
                if not self._waiting and not self._closing:
                    self._changed.wait_for(lambda: self._waiting or self._closing)
                    self._changed.wait_for(lambda: self._waiting >= self._size or self._closing, LINGER)
                if not self._waiting:
                    return None
                think = self._thinks_next if self._jobs[self._thinks_next] else not self._thinks_next
                self._thinks_next = not think
                taken = self._take(self._jobs[think])
                if taken:
                    return think, [row for row, _ in taken], [future for _, future in taken]

    def _take(self, jobs: deque[Job]) -> list[tuple[Sequence[int], Future]]:
        taken: list[tuple[Sequence[int], Future]] = []
        while jobs and len(taken) < self._size:
            job = jobs.popleft()
            row, future = job.popleft()
            self._waiting -= 1
            if future.set_running_or_notify_cancel():
                taken.append((row, future))
            if job:
                jobs.append(job)
        return taken
