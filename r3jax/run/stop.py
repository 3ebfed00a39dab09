"""How a run ends early and loses nothing: SIGTERM and Ctrl-C wait for the step and its save, then exit 75.

Several processes agree on the step for a SIGTERM; a Ctrl-C ends them at once, unsaved.

75 is what sysexits.h calls a temporary failure: schedulers that requeue on it start the same command again. Between
the stages' loops nothing is held that is not on disk, so the run ends at once there. A second Ctrl-C always does.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

AGAIN = 75  # EX_TEMPFAIL
INTERRUPTED = 130
STUCK = 10.0  # seconds after a SIGTERM until a process whose Python has not heard it ends too


class Alone(SystemExit):
    """One process of several was told to stop, outside of a stage's loop: the others may not have been."""


def on_term() -> None:
    """For verbs without a loop that saves: a SIGTERM ends this process at once, with 75, and its peers.

    Python hears a signal between two of its instructions: not while a program compiles, or waits for a peer's part.
    There a thread does it after STUCK seconds.
    """
    _take_term()


def when_stuck(end: Callable[[], object]) -> None:
    """What ends this process and its peers with 75 where `on_term` holds and its main thread does not come back."""
    global _end_stuck
    _end_stuck = end


def _exit_again() -> None:
    os._exit(AGAIN)


_end_stuck: Callable[[], object] = _exit_again
_python_heard = threading.Event()  # a handler has run


def _take_term() -> object:
    """Makes `on_term` hold; what held before."""
    _watch()
    return signal.signal(signal.SIGTERM, _end_alone)


@functools.cache
def _watch() -> None:
    """Starts, once, the thread that hears signals when the main thread does not."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while True:
            if os.read(heard, 1) == bytes([signal.SIGTERM]) and not _python_heard.wait(STUCK):
                _end_stuck()

    threading.Thread(target=listen, daemon=True).start()


def _end_alone(number: int, frame: FrameType | None) -> None:
    _python_heard.set()
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
        """After the last step: from here on a SIGTERM ends a process of several at once too.

        One that came since the last look, in a save or a validation, ends them here.
        """
        if jax.process_count() > 1:
            if self.due():
                self.end()
            self._before[signal.SIGTERM] = _take_term()

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
        _python_heard.set()
        if jax.process_count() > 1 or (self.asked and number == signal.SIGINT):
            os._exit(INTERRUPTED)
        if not self.stepping:
            self.end()
        if not self.asked:
            self.asked = True
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            print(f"\nstopping after this step and its save{again}", file=sys.stderr, flush=True)
