"""What stands before the routes: whoever may not ask, or sends too much, is told before his body is read.

Pure ASGI: no framework's request is made yet.
"""

import asyncio
import hmac
import time

from r3jax.serving.limits import Limits
from r3jax.serving.metrics import Metrics
from r3jax.serving.refusal import Refusal, overloaded

OPEN = ("/", "/healthz", "/openapi.json")  # without a key: nothing of the model or the documents
LIGHT = (*OPEN, "/metrics")  # answered however busy the server is
TOO_MANY = "too many requests are being answered; try again in a second."
TOO_MUCH = "too much is being sent at the same time; try again in a second, or send fewer texts at once."
SMALL = 1 << 16  # bytes, which may lie in any connection's buffer anyway


class Guard:
    """Checks the key, reads the body within the limits, and counts."""

    def __init__(self, app, limits: Limits, key: str | None, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.key = None if key is None else f"Bearer {key}".encode()
        self.active = 0  # requests whose bodies are there: whoever only begins to ask keeps nobody out
        self.begun = 0  # whose heads are read, and that are not called yet
        self.held = 0  # bytes of bodies, of those that are still coming too
        self._turned_away = overloaded(TOO_MANY).raw()

    def at_the_door(self, data: bytes) -> bytes | None:
        """The answer to a request that begins with `data` and will not be read further; None: it may go on.

        To parse a head costs a full server more than it can spare: unread connections would pile up, until those that
        it could answer wait too long.
        """
        path = data.split(b" ", 2)[1:2]
        if self.active + self.begun < self.limits.requests or (
            path and path[0].split(b"?")[0].decode("latin-1") in LIGHT
        ):
            return None
        self.metrics.requests.labels("other", 503).inc()
        return self._turned_away

    def let_in(self) -> None:
        """A head was read; the request's call will follow. In one round of the loop hundreds may come."""
        self.begun += 1

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.begun = max(0, self.begun - 1)  # other servers do not tell of heads
        begin, status, body = time.perf_counter(), 500, bytearray()

        async def watched(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, watched, body)
        finally:
            self.held -= len(body)
            route = scope.get("route")
            path = "other" if route is None else route.path  # a client's own paths would fill the memory
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)

    async def _answer(self, scope, receive, send, body: bytearray) -> None:
        try:
            self._admit(scope)
            self._refuse_if_full(scope)
            if not await self._read(scope, receive, body):
                return
            self._refuse_if_full(scope)
        except Refusal as refusal:
            # What is left of the body is not read: the connection cannot go on.
            refusal.headers["Connection"] = "close"
            await refusal.response()(scope, receive, send)
            return
        told = False

        async def replay():
            nonlocal told
            if told:
                return await receive()  # the client's going away
            told = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        self.active += 1
        try:
            await self.app(scope, replay, send)
        finally:
            self.active -= 1

    def _refuse_if_full(self, scope) -> None:
        if self.active >= self.limits.requests and scope["path"] not in LIGHT:
            raise overloaded(TOO_MANY)

    def _admit(self, scope) -> None:
        if self.key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self.key):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refusal(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY.",
                None,
                "invalid_api_key",
                challenge,
            )

    async def _read(self, scope, receive, body: bytearray) -> bool:
        """Fills the body; False if the client has gone."""
        limits, most = self.limits, self.limits.body_bytes
        large = Refusal(413, f"the body is larger than {most:,} bytes; send fewer texts at once.", None, "too_large")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > most:
            raise large
        try:
            async with asyncio.timeout(limits.seconds):
                while True:
                    async with asyncio.timeout(limits.body_seconds):
                        message = await receive()
                    if message["type"] != "http.request":
                        return False
                    piece = message.get("body", b"")
                    body += piece
                    self.held += len(piece)
                    if len(body) > most:
                        raise large
                    if len(body) > SMALL and self.held > limits.bodies_bytes:
                        raise overloaded(TOO_MUCH)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            late = f"the body did not arrive within {limits.seconds:g} s, or none of it for {limits.body_seconds:g} s"
            raise Refusal(408, f"{late}; send it faster.") from None
