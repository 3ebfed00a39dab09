"""What the server says when it does not answer: OpenAI's error form around one sentence."""

import difflib
import http
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

SHOWN = 80  # characters of what a client sent


class Refusal(Exception):
    """An answer of 4xx or 5xx. `param` names the field that is at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """As JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = None if self.param is None else _shown(self.param)
        return {"error": {"message": _shown(self.message), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content(), self.status, headers=self.headers)

    def raw(self) -> bytes:
        """The whole answer, for a connection that ends with it."""
        answer = self.response()
        head = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}".encode(), b"connection: close"]
        return b"\r\n".join([*head, *(b": ".join(header) for header in answer.raw_headers), b"", bytes(answer.body)])


def overloaded(message: str) -> Refusal:
    """503, of what may work a little later."""
    return Refusal(503, message, code="overloaded", headers={"Retry-After": "1"})


def of_validation(errors: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> Refusal:
    """What pydantic found wrong with a body; `about`: {field: what it must be} of those that need more than its words.

    pydantic tells one error for each member of a union; the first is told, or else one that a check of ours has found.
    """
    own = [e for e in errors if e["type"] == "value_error"]
    error = (own or list(errors))[0]
    _, *place = error["loc"]
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {error['ctx']['error']} (at character {place[0]}).")
    if not place:
        return Refusal(400, "the body must be a JSON object, sent with Content-Type: application/json.")
    field = str(place[0])
    if own:
        return Refusal(400, f"{field}: {error['ctx']['error']}", field)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, about, 1)
        hint = f" (did you mean {near[0]}?)" if near else f"; the fields are {', '.join(about)}"
        return Refusal(400, f"there is no field {_short(field)}{hint}.", _short(field))
    if error["type"] == "missing":
        return Refusal(400, f"{field} is missing; it must be {about[field]}.", field)
    given = _short(repr(error["input"]))
    if error["type"] == "literal_error" and field == "model":
        return Refusal(404, f"there is no model {given}; it must be {about[field]}.", field, "model_not_found")
    return Refusal(400, f"{field} must be {about[field]}.", field)


def _shown(text: str) -> str:
    """In one line of UTF-8: a client's own words may hold anything, halves of surrogate pairs too."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
