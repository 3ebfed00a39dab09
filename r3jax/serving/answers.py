"""The route that searches: the hits of a query, and the thought before them as it is written."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from r3jax.corpus.answers import Answer
from r3jax.serving import schema
from r3jax.serving.batching import Read
from r3jax.serving.desk import Desk
from r3jax.serving.model import DIRECT, QUERY
from r3jax.serving.refusal import Refusal, overloaded

log = logging.getLogger("r3jax")
HALF = "\ufffd"  # how a character looks whose last bytes are not written yet


def router(desk: Desk, problems: dict) -> APIRouter:
    """POST /search."""
    routes = APIRouter()
    body_type: Any = schema.search_request(desk.served, desk.limits)[0]
    names = {"type": "string", "enum": ["thought", "answer", "error"]}
    event = {"event": names, "data": {"type": "string", "description": "JSON."}}
    events = {"schema": {"description": "One event.", "type": "object", "properties": event, "required": [*event]}}
    good = {"model": schema.Answer, "content": {"text/event-stream": events}}

    @routes.post("/search", responses={200: good, **problems})
    async def search(body: body_type) -> Response:
        """The best documents for a query, read after the model's thought about it or without one."""
        begin = time.perf_counter()
        mode = QUERY if body.reasoning else DIRECT
        async with desk.clock():
            rows = await desk.rows(mode, [body.query], "query")
            row, cut = rows.rows[0], rows.cut > 0
            if body.stream and body.reasoning:
                if desk.streams >= desk.limits.streams:
                    raise overloaded("too many thoughts are being told; try again in a second, or without stream.")
                return _events(_aloud(desk, body, row, cut, begin))
            read = (await desk.read(mode, [row]))[0]
            found = await _answer(desk, body, read, cut, begin)
        if body.stream:
            return _events(_once(_event("answer", found.as_json())))
        return Response(found.as_json().encode("utf-8", "replace"), media_type="application/json")

    return routes


async def _answer(desk: Desk, body, read: Read, cut: bool, begin: float) -> Answer:
    """The hits of a query that was read."""
    done = time.perf_counter()
    hits = await asyncio.to_thread(desk.served.hits, read.vector, body.k, desk.limits.hits)
    thought = desk.served.chat.tokenizer.decode(read.thought) if body.reasoning else None
    times = 1000 * (done - begin), 1000 * (time.perf_counter() - done)
    return Answer(body.query, thought, read.emitted, len(read.thought), hits, *times, cut)


async def _aloud(desk: Desk, body, row: list[int], cut: bool, begin: float) -> AsyncIterator[bytes]:
    """Events of one query: the thought, piece by piece, then the answer."""
    desk.streams += 1
    try:
        told = ""
        reads: Iterator[Read] = desk.served.read_aloud(row)
        async for read in iterate_in_threadpool(reads):
            if time.perf_counter() - begin > desk.limits.seconds:
                raise desk.late()
            text = desk.served.chat.tokenizer.decode(read.thought)
            if text.startswith(told) and len(text) > len(told) and not text.endswith(HALF):
                yield _event("thought", json.dumps({"text": text[len(told) :]}))
                told = text
            if read.vector is not None:
                desk.metrics.written.inc(len(read.thought))
                yield _event("answer", (await _answer(desk, body, read, cut, begin)).as_json())
    except Refusal as refusal:
        yield _event("error", json.dumps(refusal.content()))
    except Exception:  # the status has been sent: the client can only be told in an event
        log.exception("a thought could not be told")
        sorry = Refusal(500, "the server has failed at this; its log says why.")
        yield _event("error", json.dumps(sorry.content()))
    finally:
        desk.streams -= 1


async def _once(event: bytes) -> AsyncIterator[bytes]:
    yield event


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode("utf-8", "replace")


def _events(events: AsyncIterator[bytes]) -> StreamingResponse:
    # A proxy that collects what it passes on would undo the stream.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
