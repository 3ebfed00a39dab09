"""A training run that gets a signal amid something: python -m tests.chaos.victim WHAT NTH DELAY SIGNAL argv…

The signal comes DELAY seconds after the NTH call of one of `MOMENTS` has begun; if there are fewer calls, never. Since
when the run could have ended is told on stdout: `CLOCK` and a reading of the system's monotonic clock; the last counts.
"""

import os
import signal
import sys
import threading
import time

from r3jax import loop, train
from r3jax.rl.environment import Environment
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.config import run_main
from r3jax.run.stop import Stop
from r3jax.stages.rollouts import Collector
from r3jax.stages.sft import SFT

# Within `report` of a step's figures the next step's update is being computed.
MOMENTS = {
    "batch": (SFT, "next_batch"),
    "rollout": (Collector, "_sample"),
    "refresh": (Environment, "_write_back"),
    "update": (loop, "report"),
    "save": (Checkpointer, "save"),
    "amend": (Checkpointer, "amend"),
    "validation": (loop, "validate"),
    "evaluation": (train, "compare"),
}


CLOCK = "victim: could end at"


def tell_time() -> None:
    print(f"\n{CLOCK} {time.monotonic()}", flush=True)


def arm(what: str, nth: int, delay: float, number: int) -> None:
    """Wraps the function so that its nth call starts the clock."""
    owner, name = MOMENTS[what]
    real, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            threading.Timer(delay, strike, (number,)).start()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def strike(number: int) -> None:
    tell_time()
    os.kill(os.getpid(), number)


def watch() -> None:
    """Tells the time when a step has ended after which the run ends."""
    real = Stop.due

    def due(self):
        if asked := real(self):
            tell_time()
        return asked

    Stop.due = due


if __name__ == "__main__":
    what, nth, delay, name = sys.argv[1:5]
    sys.argv[1:] = sys.argv[5:]
    arm(what, int(nth), float(delay), signal.Signals[name])
    watch()
    run_main(train.main)
