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


class Guard:
    """Checks the key, reads the body within the limits, and counts."""

    def __init__(self, app, limits: Limits, key: str | None, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.key = None if key is None else f"Bearer {key}".encode()
        self.active = 0  # requests
        self.begun = 0  # whose heads are read, and that are not called yet
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
        begin, status = time.perf_counter(), 500
        self.active += 1

        async def watched(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        finally:
            self.active -= 1
            route = scope.get("route")
            path = "other" if route is None else route.path  # a client's own paths would fill the memory
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)

    async def _answer(self, scope, receive, send) -> None:
        try:
            self._admit(scope)
            if self.active > self.limits.requests and scope["path"] not in LIGHT:
                raise overloaded(TOO_MANY)
            body = await self._body(scope, receive)
        except Refusal as refusal:
            # What is left of the body is not read: the connection cannot go on.
            refusal.headers["Connection"] = "close"
            await refusal.response()(scope, receive, send)
            return
        if body is None:
            return
        told = False

        async def replay():
            nonlocal told
            if told:
                return await receive()  # the client's going away
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

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

    async def _body(self, scope, receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        most = self.limits.body_bytes
        large = Refusal(413, f"the body is larger than {most:,} bytes; send fewer texts at once.", None, "too_large")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > most:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.limits.seconds:g} s; send it faster.") from None
