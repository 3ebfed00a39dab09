"""One process of a job of two, that counts together with the other: python -m tests.chaos.peer RANK PORT HANG FATE

FATE befalls it in step 3: none, raise, mistake, hang, or linger (it goes on until something else ends it).
"""

import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from r3jax.errors import UserError
from r3jax.run.peers import Peers
from r3jax.run.stop import Stop


def main(rank: int, port: int, hang: float, fate: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    with Peers(hang) as peers, Stop() as stop:
        stop.stepping = True
        for step in range(1, 10_000 if fate == "linger" else 6):
            if step == 3 and fate == "raise":
                raise RuntimeError("a fault of its own")
            if step == 3 and fate == "mistake":
                raise UserError("config.x: a mistake of the user's.")
            if step == 3 and fate == "hang":
                time.sleep(1000)
            peers.beat()
            multihost_utils.process_allgather(np.int32(step))
            if step == 2:
                print("at step 2", flush=True)
            if stop.due():
                print(f"stopping at step {step}", flush=True)
                stop.end()
            if fate == "linger":
                time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
