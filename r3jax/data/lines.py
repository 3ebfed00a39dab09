"""Files of one thing a line, mostly JSON: what every reader of them checks, and how it complains."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from r3jax.errors import UserError


class BadLine(Exception):
    """What is wrong with one line, and the fix."""


class LineReader:
    """Reads files line by line, hashes what it reads, and raises or collects complaints."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.skipped: list[str] = []
        self.hash = hashlib.sha256()

    def each(self, path: pathlib.Path, label: str, use: Callable[[str, int], None]) -> None:
        """Calls use(line, number) on every line that is not blank; use raises BadLine to refuse one."""
        self.hash.update(f"{label}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                self.hash.update(raw)
                try:
                    line = decode(raw, number)
                    if line.strip():
                        use(line, number)
                except BadLine as bad:
                    message = f"{path}:{number}: {bad}."
                    if self.strict:
                        raise UserError(message) from None
                    self.skipped.append(message)


def decode(raw: bytes, number: int) -> str:
    """A line's text without its end; `number` counts from 1, where a byte order mark may stand."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise BadLine("not UTF-8 text; save the file as UTF-8") from None


def stream(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(line, number) of every line that is not blank, one at a time; UserError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = decode(raw, number)
            except BadLine as bad:
                raise UserError(f"{path}:{number}: {bad}.") from None
            if line.strip():
                yield line, number


def parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(f"malformed JSON ({error.msg} at column {error.colno}); write one JSON object") from None
    except (ValueError, RecursionError):
        raise BadLine("a number too long or brackets too deep to read; write one JSON object") from None
    if not isinstance(row, dict):
        raise BadLine(f"a JSON {type(row).__name__} where an object is needed; write one object per line")
    return row


def string(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise BadLine(f'no "{field}"; add it as a string')
    value = row[field]
    if not isinstance(value, str):
        raise BadLine(f'"{field}" is {json.dumps(value)[:40]}, not a string; put it in quotes')
    try:
        value.encode()  # JSON can escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        raise BadLine(f'"{field}" holds half a surrogate pair; write the character itself') from None
    return value


def identifier(row: dict[str, Any], field: str) -> str:
    value = string(row, field)
    if value.split() != [value]:  # run files are split at white space, of whatever kind
        raise BadLine(f'"{field}" is {value!r}; use an id that is not empty and has no white space')
    return value
