"""The process: takes connections until it is told to stop, answers what it has taken, and ends."""

import asyncio
import contextlib
import functools
import gc
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from r3jax.errors import UserError
from r3jax.serving.guard import Guard
from r3jax.serving.refusal import Refusal


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as e:
        found.close()
        why = getattr(e, "strerror", None) or e
        raise UserError(f"--host={host} --port={port} cannot be bound ({why}); name another port or host.") from None
    return found


class Connection(H11Protocol):
    """uvicorn's, which waits without end for a request's head, and for a client to take its answer."""

    def __init__(self, guard: Guard, **given):
        super().__init__(**given)
        self._limits, self._guard = guard.limits, guard
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and (answer := self._guard.at_the_door(data)) is not None:
            self._end(answer)
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the head is there
            self._cancel()
        elif self._late is None:
            self._expect_head()

    def handle_events(self) -> None:
        last = self.cycle
        super().handle_events()
        if self.cycle is not last:  # the application is called in the loop's next round
            self._guard.let_in()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._limits.seconds, self.transport.abort)

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self._limits.head_seconds, self._refuse)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self) -> None:
        said = f"the request's head did not arrive within {self._limits.head_seconds:g} s; send it faster."
        self._end(Refusal(408, said).raw())

    def _end(self, answer: bytes) -> None:
        self._cancel()
        self.transport.write(answer)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which would end by the signal that stopped it: whoever drained has done what was asked of him."""

    def __init__(self, guard: Guard, on_start: Callable[[], None] = lambda: None):
        wait = int(guard.limits.seconds) + 1
        connection: Any = functools.partial(Connection, guard)
        super().__init__(
            uvicorn.Config(
                guard,
                http=connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=wait,
            )
        )
        self._on_start = on_start

    async def startup(self, sockets=None) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Shells allow so few connections that slow clients would take all of them.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # What was loaded stays: to look through all of it for garbage stops a busy server for 0.2 s, every second.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        if self.started:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
        try:
            for s in signals:
                loop.add_signal_handler(s, self.handle_exit, s, None)
        except (RuntimeError, ValueError):  # not on the main thread, where nobody gets signals
            signals = ()
        try:
            yield
        finally:
            for s in signals:
                loop.remove_signal_handler(s)
