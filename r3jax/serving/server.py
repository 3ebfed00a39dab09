"""The process: takes connections until it is told to stop, answers what it has taken, and ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from r3jax.errors import UserError
from r3jax.serving.limits import Limits


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


class Server(uvicorn.Server):
    """uvicorn, which would end by the signal that stopped it: whoever drained has done what was asked of him."""

    def __init__(self, app, limits: Limits, on_start: Callable[[], None] = lambda: None):
        wait = int(limits.seconds) + 1
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
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
