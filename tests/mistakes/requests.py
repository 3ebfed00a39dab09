"""Requests that the server refuses: 4xx and one sentence in OpenAI's form, before the model is asked."""

import asyncio
import json
from typing import Any

import httpx2

from tests.mistakes.world import Mistake, World, code

EMBED = "/v1/embeddings"
GOOD = {"model": "tiny:document", "input": "text"}
JSON = {"Content-Type": "application/json"}
_MISTAKES: list[tuple[str, Any, int, str]] = [
    (EMBED, b"{", 400, "the body is not JSON"),
    (EMBED, b'{"input": "\xff"}', 400, "the body cannot be read as JSON in UTF-8"),
    (EMBED, b"[" * 19_000, 400, "the body cannot be read as JSON"),
    (EMBED, b'{"input": ' + b"1" * 5000 + b"}", 400, "the body cannot be read as JSON"),
    (EMBED, b"", 400, "the body must be a JSON object"),
    (EMBED, [1], 400, "the body must be a JSON object"),
    (EMBED, {"input": "text"}, 400, "model is missing; it must be one of tiny:query, tiny:query-direct"),
    (EMBED, GOOD | {"model": "gpt"}, 404, "there is no model 'gpt'; it must be one of tiny:query"),
    (EMBED, GOOD | {"model": None}, 404, "there is no model None"),
    (EMBED, GOOD | {"model": "../../etc/passwd"}, 404, "there is no model '../../etc/passwd'; it must be one of"),
    (EMBED, GOOD | {"dimension": 3}, 400, "there is no field dimension (did you mean dimensions?"),
    (EMBED, GOOD | {"a\nb": 3}, 400, "there is no field a\ufffdb; the fields are input, model"),
    (EMBED, GOOD | {"\ud800": 3}, 400, "the body must be a JSON object"),
    (EMBED, GOOD | {"dimensions": 2.5}, 400, "dimensions must be a whole number from 1 to 32"),
    (EMBED, GOOD | {"dimensions": 0}, 400, "dimensions must be a whole number from 1 to 32"),
    (EMBED, GOOD | {"dimensions": "3"}, 400, "dimensions must be a whole number"),
    (EMBED, GOOD | {"dimensions": 33}, 400, "dimensions must be a whole number"),
    (EMBED, GOOD | {"encoding_format": "int8"}, 400, "encoding_format must be float or base64"),
    (EMBED, GOOD | {"input": []}, 400, "input must be a string, a list of 1 to 40 strings"),
    (EMBED, GOOD | {"input": ["x"] * 41}, 400, "input must be a string, a list of 1 to 40 strings"),
    (EMBED, GOOD | {"input": ["x", 1]}, 400, "input must be a string"),
    (EMBED, GOOD | {"input": [[]]}, 400, "input must be a string"),
    (EMBED, GOOD | {"input": [512]}, 400, "a list of token ids from 0 to 511"),
    (EMBED, GOOD | {"input": [True]}, 400, "input must be a string"),
    (EMBED, GOOD | {"input": [[5, 511]]}, 400, "input: token 511 is a control token"),
    (EMBED, GOOD | {"input": ["ok", "\udc00"]}, 400, "input: a text holds half of a surrogate pair"),
    (EMBED, GOOD | {"input": "list " * 1001}, 400, " tokens, 1,000 is the most of one request"),
    (EMBED, GOOD | {"input": "x" * 20_000}, 413, "the body is larger than 20,000 bytes"),
    ("/search", {"query": "  "}, 400, "query must be a string with a letter in it"),
    ("/search", {"query": "x", "k": 8}, 400, "k must be a whole number from 1 to 7"),
    ("/search", {"query": "x", "reasonning": True}, 400, "did you mean reasoning?"),
    ("/search", {"query": "x", "reasoning": "yes"}, 400, "reasoning must be true or false"),
    ("/search", {"query": "x", "stream": "yes"}, 400, "stream must be true or false"),
    ("/nothing", {}, 404, "there is no /nothing; /openapi.json says what there is"),
    ("/v1/models", {}, 405, "/v1/models does not take POST"),
]


def _request(path: str, body: Any, status: int, says: str, headers: dict[str, str] = JSON, locked: bool = False):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    shown = raw.decode(errors="backslashreplace")

    def answer(world: World) -> tuple[int, str]:
        found = asyncio.run(_post(world.apps[locked], path, raw, headers))
        problem = found.json()["error"]
        assert set(problem) == {"message", "type", "param", "code"} and problem["type"] == "invalid_request_error"
        return found.status_code, problem["message"]

    more = "".join(f", {name}: {value}" for name, value in headers.items() if headers is not JSON)
    more += ", to a server with a key" * locked
    body_shown = code(shown if len(shown) < 120 else f"{shown[:50]}…") if raw else "no body"
    return Mistake(f"POST {path} {body_shown}{more}", says, answer, status)


async def _post(app, path: str, body: bytes, headers: dict[str, str]) -> httpx2.Response:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
        return await client.post(path, content=body, headers=headers)


MISTAKES = [
    *(_request(*row) for row in _MISTAKES),
    # A page of another origin could send this without asking.
    _request(
        "/search", {"query": "x"}, 400, "sent with Content-Type: application/json", {"Content-Type": "text/plain"}
    ),
    _request(EMBED, GOOD, 401, "the API key is missing or wrong; send Authorization: Bearer KEY", JSON, True),
    _request(EMBED, GOOD, 401, "the API key is missing or wrong", {"Authorization": "Bearer guess"}, True),
]
