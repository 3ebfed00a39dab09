"""Several processes as one job: when one ends early, all end within seconds, and say which it was.

By itself JAX notices a lost peer after a minute or so, and one that hangs never: its heartbeat comes from a thread of
its own. Here each process keeps a socket to process 0 and tells it every second which step it is at. A process that
dies loses its socket at once; one that fails says why before; when no process has come further for `hang` seconds, all
print their stacks, and process 0 names those that are behind. With one process all of this does nothing.
"""

import contextlib
import faulthandler
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordinator's address; there is no public name for it
from jax.experimental import multihost_utils

from r3jax import processes
from r3jax.errors import UserError
from r3jax.run.stop import AGAIN, INTERRUPTED, Alone, when_stuck
from r3jax.run.verify import first_line

TICK = 1.0  # seconds between signs of life
MUTE = 5.0  # seconds without one, by which a process that does nothing at all is told from one that waits
GRACE = 2.0  # seconds that a failing process waits to hear whether a peer was the cause
_OPEN = "open TCP ports between the machines of the job"
LATE = 10.0  # seconds after `hang` until a process whose Python is stuck too ends itself


class Peers:
    """A context for the whole job. hang: seconds without a step or batch after which it ends; 0: never."""

    def __init__(self, hang: float = 0.0):
        several = jax.distributed.is_initialized()  # else nothing need be known of devices
        self.rank = processes.rank()
        self.count = jax.process_count() if several else 1
        self.hang = hang
        self._step, self._over = 0, threading.Lock()
        self._lines: dict[int, socket.socket] = {}  # to each peer, of process 0; to process 0, of the others
        self._names: dict[int, str] = {}
        self._seen: dict[int, tuple[int, float]] = {}  # process -> its step, and when it came there
        self._heard: dict[int, float] = {}  # process -> when it last said anything
        self._left: set[int] = set()  # who said goodbye

    def beat(self) -> None:
        """To be called after each step, or batch of an evaluation: this process has come further."""
        self._step += 1
        if self.count > 1 and self.hang:
            faulthandler.dump_traceback_later(self.hang + LATE, exit=True)

    def __enter__(self) -> "Peers":
        if self.count == 1:
            return self
        host = (distributed.global_state.coordinator_address or "localhost").rpartition(":")[0].strip("[]")
        server = socket.create_server(("", 0)) if self.rank == 0 else None
        secret = np.frombuffer(secrets.token_bytes(16), np.uint8).astype(np.int32)  # strangers cannot end the job
        mine = np.append(secret, server.getsockname()[1] if server else 0)
        *found, port = np.asarray(multihost_utils.broadcast_one_to_all(mine, is_source=self.rank == 0)).tolist()
        token = bytes(found).hex()
        if server is not None:
            self._names[0] = socket.gethostname()
            server.settimeout(60)
            while len(self._lines) < self.count - 1:
                try:
                    self._admit(server.accept()[0], token)
                except TimeoutError:
                    raise UserError(f"process 0 waited a minute for the others at port {port}; {_OPEN}.") from None
            server.close()
        else:
            try:
                line = _alive(socket.create_connection((host, port), timeout=60))
            except OSError as e:
                raise UserError(
                    f"process {self.rank} cannot reach process 0 at {host}:{port} ({e}); {_OPEN}."
                ) from None
            self._lines[0], self._names[0] = line, host
            self._send(0, {"token": token, "rank": self.rank, "name": socket.gethostname()})
            line.settimeout(self.hang or None)
        for rank, line in self._lines.items():
            self._spawn(self._listen, rank, line)
        self._seen = {rank: (0, time.monotonic()) for rank in range(self.count)}
        self._spawn(self._tick)
        when_stuck(self._stopped)
        self.beat()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.count == 1:
            return
        if isinstance(error, Alone):
            self._stopped()
        if isinstance(error, KeyboardInterrupt):
            self._end(f"{self._called(self.rank)} was interrupted", code=INTERRUPTED)
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0, AGAIN)):
            self._left.update(self._lines)
            self._tell({"bye": True})
            return
        time.sleep(GRACE)  # a lost peer shows as an error here too: then a listener ends this process meanwhile
        with self._over:
            self._tell({"over": f"{self._called(self.rank)} failed: {type(error).__name__}: {first_line(error)}"})
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exception(kind, error, trace)
            self._quit(2 if isinstance(error, UserError) else 1)

    def _admit(self, line: socket.socket, token: str) -> None:
        line = _alive(line)
        line.settimeout(10)
        try:
            hello = json.loads(line.makefile("rb").readline(1000))
            rank, name = int(hello["rank"]), str(hello["name"])
            known = hmac.compare_digest(str(hello["token"]), token)
        except (OSError, ValueError, LookupError, TypeError):
            known = False
        if not known:
            return line.close()
        line.settimeout(None)
        self._lines[rank], self._names[rank] = line, name

    def _listen(self, rank: int, line: socket.socket) -> None:
        try:
            for text in line.makefile("rb"):
                said = json.loads(text)
                self._heard[rank] = time.monotonic()
                if "step" in said and said["step"] != self._seen[rank][0]:
                    self._seen[rank] = said["step"], time.monotonic()
                if "bye" in said:
                    self._left.add(rank)
                if "over" in said:
                    self._end(said["over"], said.get("stacks", False), said.get("code", 1))
        except TimeoutError:
            self._end(f"{self._called(rank)} has been silent for {self.hang:g} s", stacks=True)
        except (OSError, ValueError):
            pass
        if rank not in self._left:
            self._end(f"{self._called(rank)} has ended")

    def _tick(self) -> None:
        while True:
            time.sleep(TICK)
            self._tell({"step": self._step})
            if self._step != self._seen[self.rank][0]:
                self._seen[self.rank] = self._step, time.monotonic()
            # Only process 0 sees all of them.
            if self.rank == 0 and self.hang and not self._left:
                if time.monotonic() - max(when for _, when in self._seen.values()) < self.hang:
                    continue
                least = min(step for step, _ in self._seen.values())
                slow = [rank for rank, (step, _) in self._seen.items() if step == least]
                mute = [rank for rank, when in self._heard.items() if time.monotonic() - when > MUTE]
                behind = ", ".join(map(self._called, mute or slow))
                self._end(f"no step was done for {self.hang:g} s; behind is {behind}", stacks=True)

    def _stopped(self) -> None:
        self._end(f"{self._called(self.rank)} was told to stop", code=AGAIN)

    def _end(self, why: str, stacks: bool = False, code: int = 1) -> None:
        """Ends this process for another's sake, or with all others for its own, once; process 0 tells the rest."""
        with self._over:
            if self.rank == 0 or code in (AGAIN, INTERRUPTED):
                self._tell({"over": why, "stacks": stacks, "code": code})
            told = "" if code == AGAIN else "error: "
            print(f"{told}{why}; process {self.rank} ends with it", file=sys.stderr, flush=True)
            if stacks:
                faulthandler.dump_traceback(all_threads=True)
            self._quit(code)

    def _quit(self, code: int) -> None:
        """Ends at once: a regular exit would wait minutes for the peers. Process 0 gives them time to hear why: JAX's
        service ends with it, and aborts those that are left."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(GRACE)
        os._exit(code)

    def _called(self, rank: int) -> str:
        return f"process {rank} of {self.count} ({self._names.get(rank, socket.gethostname())})"

    def _tell(self, what: dict[str, Any]) -> None:
        for rank in self._lines:
            self._send(rank, what)

    def _send(self, rank: int, what: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its listener knows
            self._lines[rank].sendall(json.dumps(what).encode() + b"\n")

    def _spawn(self, work, *given) -> None:
        threading.Thread(target=work, args=given, daemon=True).start()


def _alive(line: socket.socket) -> socket.socket:
    """A line that ends within half a minute when the machine at its other end is gone without a word."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line
