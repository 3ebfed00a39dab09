"""Documents to encode, one at a time: of a BEIR folder, a .jsonl file or plain text.

    FOLDER          its corpus.jsonl (`data/beir`)
    FILE.jsonl      {"_id": str, "title": str, "text": str}, or a JSON string; without an id the line's number is it
    any other FILE  one document per line, its number the id; what only looks like it (OTHERS) is refused

A corpus is never held in memory: files are read anew by each pass.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

from r3jax.data.lines import BadLine, decode, identifier, parse, string
from r3jax.errors import UserError

IDS = ("_id", "id", "docid", "doc_id")  # BEIR's, and what others call it
BLOCK = 1 << 20
TABLE = "pandas: read_{}(FILE).to_json('FILE.jsonl', orient='records', lines=True), the columns named _id and text"
OTHERS = {  # files that are no documents line by line, and how to make lines of them
    ".json": "jq -c '.[]' FILE > FILE.jsonl makes lines of a list",
    ".csv": TABLE.format("csv"),
    ".tsv": TABLE.format("table"),
    ".parquet": TABLE.format("parquet"),
    ".gz": "unpack it",
    ".zip": "unpack it",
}


class Documents:
    """The documents at `path`; UserError where there is nothing that can be read.

    After a pass `skipped` says how many lines on_error="skip" has dropped, and `first_skipped` why the first was.
    """

    def __init__(self, path: str | pathlib.Path, field: str = "DATA", on_error: str = "strict"):
        """field: what to call the path in a UserError; on_error: strict or skip, as of `data/beir.load`."""
        path = pathlib.Path(path)
        self.strict = on_error == "strict"
        self.skipped, self.first_skipped = 0, ""
        self.path = path / "corpus.jsonl" if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(
                f"{field}: {self.path} does not exist; give a BEIR folder, a .jsonl file, or plain text with one "
                "document per line."
            )
        if fix := OTHERS.get(self.path.suffix.lower()):
            raise UserError(f"{field}: {self.path} is neither .jsonl nor plain text with one document per line; {fix}.")
        self._read = _json_line if self.path.suffix == ".jsonl" else _plain_line

    def fingerprint(self) -> str:
        """sha256 (hex) of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(id, text) of each document, in order; ids may still occur twice.

        UserError with file:line for a bad one, or it is dropped. Blank lines are none.
        """
        self.skipped, self.first_skipped = 0, ""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = decode(raw, number)
                    if not line.strip():
                        continue
                    name, text = self._read(line, number)
                    if not text:
                        raise BadLine(f"document {name!r} has an empty text; write one or delete the line")
                except BadLine as bad:
                    message = f"{self.path}:{number}: {bad}."
                    if self.strict:
                        raise UserError(message) from None
                    self.first_skipped = self.first_skipped or message
                    self.skipped += 1
                    continue
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
