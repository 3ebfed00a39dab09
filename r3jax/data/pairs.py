"""Training data of other tools as a folder in BEIR form: Tevatron's and FlagEmbedding's .jsonl.

    Tevatron        {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages"}
    FlagEmbedding   {"query", "pos": [str], "neg": [str]}; if there are, "query_id", "pos_id", "neg_id" (`r3jax mine`)

Documents with the same title and text are one document, under the first id it had. A query's negatives are judged 0.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from r3jax.data.lines import BadLine, identifier, parse, stream, string
from r3jax.errors import UserError

Passage = tuple[str | None, str, str]  # id (None: any will do), title, text


def write_beir(sources: Sequence[pathlib.Path], folder: pathlib.Path) -> dict[str, int]:
    """Writes an (empty) folder of `sources`, each a split named as its file; returns how many of what it holds.

    Raises UserError for a line in neither form, an id with two texts, two files of one name, or no line at all.
    """
    stems = [path.stem for path in sources]
    if len(set(stems)) < len(stems):
        raise UserError(f"SRC names two files {max(stems, key=stems.count)!r}; a split has the name of its file.")
    ids: dict[tuple[str, str], str] = {}  # (title, text) → id
    texts: dict[str, tuple[str, str]] = {}
    queries: dict[str, str] = {}
    counts = {"documents": 0, "queries": 0, "judgements": 0}
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("wb") as corpus, (folder / "queries.jsonl").open("wb") as asked:
        for path in sources:
            judged: dict[str, dict[str, int]] = {}
            for number, query, text, passages in _read(path):
                name = query or f"{path.stem}-{number}"
                if queries.setdefault(name, text) != text:
                    raise UserError(f"{path}:{number}: query {name!r} has two texts; give every query its own id.")
                if name not in judged:
                    judged[name] = {}
                    asked.write(_line({"_id": name, "text": text}))
                for (own, title, body), grade in passages:
                    known = ids.get((title, body))
                    if known is None:
                        known = own or next(f"p{i}" for i in itertools.count(len(ids)) if f"p{i}" not in texts)
                        if known in texts:
                            raise UserError(f"{path}:{number}: passage {known!r} has two texts; give each its own id.")
                        ids[title, body] = known
                        texts[known] = (title, body)
                        corpus.write(_line({"_id": known, "title": title, "text": body}))
                    judged[name][known] = max(grade, judged[name].get(known, 0))
            if not any(grade for grades in judged.values() for grade in grades.values()):
                raise UserError(f"{path} names no positive passage; give a file that does.")
            lines = [f"{q}\t{d}\t{grade}\n" for q, grades in judged.items() for d, grade in grades.items()]
            qrels = folder / "qrels" / f"{path.stem}.tsv"
            qrels.write_text("".join(["query-id\tcorpus-id\tscore\n", *lines]), encoding="utf-8")
            counts["judgements"] += len(lines)
    return counts | {"documents": len(ids), "queries": len(queries)}


def _read(path: pathlib.Path) -> Iterator[tuple[int, str | None, str, list[tuple[Passage, int]]]]:
    """(line number, query id, query, (passage, grade)…) of each line."""
    if not path.is_file():
        raise UserError(f"SRC: {path} does not exist; give a .jsonl file of Tevatron or FlagEmbedding.")
    for line, number in stream(path):
        try:
            row = parse(line)
            tevatron = "positive_passages" in row
            if not tevatron and "pos" not in row:
                raise BadLine('neither "positive_passages" (Tevatron) nor "pos" (FlagEmbedding); add one of them')
            text = string(row, "query").strip()
            if not text:
                raise BadLine('"query" is empty; write one or delete the line')
            name = _name(row, "query_id")
            read = _tevatron if tevatron else _flag_embedding
            passages = [(passage, grade) for grade in (1, 0) for passage in read(row, grade)]
        except BadLine as bad:
            raise UserError(f"{path}:{number}: {bad}.") from None
        yield number, name, text, passages


def _tevatron(row: dict[str, Any], grade: int) -> list[Passage]:
    field = "positive_passages" if grade else "negative_passages"
    found = []
    for passage in _list(row, field):
        if not isinstance(passage, dict):
            raise BadLine(f'"{field}" holds a JSON {type(passage).__name__}; write objects with docid and text')
        title = string(passage, "title") if passage.get("title") is not None else ""
        found.append(_passage(_name(passage, "docid"), title, string(passage, "text"), field))
    return found


def _flag_embedding(row: dict[str, Any], grade: int) -> list[Passage]:
    field = "pos" if grade else "neg"
    texts, names = _list(row, field), _list(row, f"{field}_id")
    if names and len(names) != len(texts):
        raise BadLine(f'"{field}_id" has {len(names)} ids for {len(texts)} texts; give each text one')
    return [
        _passage(_name({field: name}, field), "", string({field: text}, field), field)
        for name, text in zip(names or [None] * len(texts), texts, strict=True)
    ]


def _passage(name: str | None, title: str, text: str, field: str) -> Passage:
    if not (title + text).strip():
        raise BadLine(f'"{field}" holds an empty text; write one or delete it')
    return name, title.strip(), text.strip()


def _list(row: dict[str, Any], field: str) -> list[Any]:
    found = row.get(field) or []
    if not isinstance(found, list):
        raise BadLine(f'"{field}" is a JSON {type(found).__name__}, not a list; put it in brackets')
    return found


def _name(row: dict[str, Any], field: str) -> str | None:
    """An id, which may be missing or a number."""
    value = row.get(field)
    if value is None:
        return None
    return identifier({field: str(value) if isinstance(value, int) else value}, field)


def _line(row: dict[str, str]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
