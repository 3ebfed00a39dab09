"""How a run ends early and loses nothing: SIGTERM and Ctrl-C wait for the step and its save, then exit 75.

75 is what sysexits.h calls a temporary failure: schedulers that requeue on it start the same command again. Between
the stages' loops nothing is held that is not on disk, so the run ends at once there. A second Ctrl-C always does.
"""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

AGAIN = 75  # EX_TEMPFAIL
_INTERRUPTED = 130


class Alone(SystemExit):
    """One process of several was told to stop, outside of a stage's loop: the others may not have been."""


def on_term() -> None:
    """For verbs without a loop that saves: a SIGTERM ends this process at once, with 75, and its peers."""
    signal.signal(signal.SIGTERM, _end_alone)


def _end_alone(number: int, frame: FrameType | None) -> None:
    print("stopped; give the same command again", file=sys.stderr, flush=True)
    raise Alone(AGAIN)


class Stop:
    """A context in which the signals are ours; `asked` says that one has come."""

    def __init__(self) -> None:
        self.asked = False
        self._looks = 0
        self.stepping = False  # inside a stage's loop, which looks at `due`
        self._before: dict[int, object] = {}

    def due(self) -> bool:
        """Whether to save after this step and end; every process of a job gets the same answer at the same step."""
        if jax.process_count() > 1:  # there JAX takes the SIGTERM, and all agree on the next look to come
            self._looks += 1  # it wants numbers without a gap, which steps over stages and resumed runs are not
            return multihost_utils.reached_preemption_sync_point(self._looks)
        return self.asked

    def release(self) -> None:
        """After the last step: from here on a SIGTERM ends a process of several at once too."""
        if jax.process_count() > 1:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _end_alone)

    def end(self) -> None:
        """Ends the process, from its main thread; finally clauses run."""
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(AGAIN)

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if jax.process_count() > 1 or (self.asked and number == signal.SIGINT):
            os._exit(_INTERRUPTED)
        if not self.stepping:
            self.end()
        if not self.asked:
            self.asked = True
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            print(f"\nstopping after this step and its save{again}", file=sys.stderr, flush=True)
