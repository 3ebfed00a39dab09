"""Documents to encode, one at a time: of a BEIR folder, a .jsonl file or plain text.

    FOLDER          its corpus.jsonl (`data/beir`)
    FILE.jsonl      {"_id": str, "title": str, "text": str}, or a JSON string; without an id the line's number is it
    any other FILE  one document per line, its number the id

A corpus is never held in memory: files are read anew by each pass.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

from r3jax.data.lines import BadLine, identifier, parse, stream, string
from r3jax.errors import UserError

IDS = ("_id", "id", "docid", "doc_id")  # BEIR's, and what others call it
BLOCK = 1 << 20


class Documents:
    """The documents at `path`; UserError where there is nothing that can be read."""

    def __init__(self, path: str | pathlib.Path, field: str = "DATA"):
        """field: what to call the path in a UserError."""
        path = pathlib.Path(path)
        self.path = path / "corpus.jsonl" if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(
                f"{field}: {self.path} does not exist; give a BEIR folder, a .jsonl file, or plain text with one "
                "document per line."
            )
        self._read = _json_line if self.path.suffix == ".jsonl" else _plain_line

    def fingerprint(self) -> str:
        """sha256 (hex) of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(id, text) of each document, in order; ids may still occur twice. UserError with file:line for a bad one."""
        for line, number in stream(self.path):
            try:
                name, text = self._read(line, number)
                if not text:
                    raise BadLine(f"document {name!r} has an empty text; write one or delete the line")
            except BadLine as bad:
                raise UserError(f"{self.path}:{number}: {bad}.") from None
            yield name, text


def _plain_line(line: str, number: int) -> tuple[str, str]:
    return str(number), line.strip()


def _json_line(line: str, number: int) -> tuple[str, str]:
    if line.lstrip().startswith('"'):
        return str(number), string(parse(f'{{"text": {line}}}'), "text").strip()
    row = parse(line)
    field = next((name for name in IDS if name in row), None)
    if field is not None and isinstance(row[field], int) and not isinstance(row[field], bool):
        row[field] = str(row[field])
    name = identifier(row, field) if field else str(number)
    text = string(row, "contents" if "text" not in row and "contents" in row else "text")
    return name, (f"{string(row, 'title')} {text}" if "title" in row else text).strip()


def to_line(name: str, text: str) -> bytes:
    """A document as a line of a .jsonl file that this room reads."""
    return (json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n").encode()
