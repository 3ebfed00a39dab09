"""A data set is a folder in BEIR form; this room reads it and checks every line.

    corpus.jsonl      {"_id": str, "title": str (optional), "text": str}    one document per line
    queries.jsonl     {"_id": str, "text": str}                             one query per line
    qrels/SPLIT.tsv   query-id <tab> corpus-id <tab> grade                  header line optional
       or .jsonl      {"query-id": str, "corpus-id": str, "score": int}
    thoughts.jsonl    {"query_id": str, "text": str}                        optional: supervised reasoning

The form is that of BEIR (Thakur et al., 2021, arXiv 2104.08663). Other fields in a line are ignored.
"""

import dataclasses
import functools
import pathlib

from r3jax.data.lines import BadLine, LineReader, identifier, parse, string
from r3jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Documents, queries and judgements; row i of the lists is document (or query) i everywhere else.

    Attributes:
      name: the folder's name.
      doc_ids, doc_texts: one entry per document; a text is title and text joined by a space, stripped.
      query_ids, query_texts: one entry per query, stripped.
      qrels: split → query id → document id → grade as written; only grades > 0 mean relevant.
      thoughts: query id → supervised reasoning text; empty when the folder has no thoughts.jsonl.
      skipped: one message per line dropped under on_error="skip".
      fingerprint: sha256 (hex) over the names and contents of all files read.
    """

    name: str
    doc_ids: list[str]
    doc_texts: list[str]
    query_ids: list[str]
    query_texts: list[str]
    qrels: dict[str, dict[str, dict[str, int]]]
    thoughts: dict[str, str]
    skipped: list[str]
    fingerprint: str

    @functools.cached_property
    def doc_row(self) -> dict[str, int]:
        """Document id → its row in doc_ids and doc_texts."""
        return {name: row for row, name in enumerate(self.doc_ids)}

    @functools.cached_property
    def query_row(self) -> dict[str, int]:
        """Query id → its row in query_ids and query_texts."""
        return {name: row for row, name in enumerate(self.query_ids)}

    def positives(self, split: str) -> dict[str, list[int]]:
        """Query id → rows of its relevant documents, best grade first; queries without any are left out.

        Queries come in the order of queries.jsonl. Raises UserError for an unknown split.
        """
        return {query: [self.doc_row[doc] for doc, _ in judged] for query, judged in self._relevant(split).items()}

    def grades(self, split: str) -> dict[str, list[int]]:
        """Query id → grades of its `positives`, in their order."""
        return {query: [grade for _, grade in judged] for query, judged in self._relevant(split).items()}

    def _relevant(self, split: str) -> dict[str, list[tuple[str, int]]]:
        if split not in self.qrels:
            raise UserError(f"split {split!r} is not in data set {self.name!r}; use one of: {', '.join(self.qrels)}.")
        judged, found = self.qrels[split], {}
        for query in self.query_ids:
            grades = sorted(judged.get(query, {}).items(), key=lambda pair: -pair[1])  # stable: file order
            relevant = [(doc, grade) for doc, grade in grades if grade > 0]
            if relevant:
                found[query] = relevant
        return found


def load(folder: str | pathlib.Path, *, on_error: str = "strict") -> Dataset:
    """Reads a BEIR folder into memory.

    Args:
      folder: the folder described at the top of this file.
      on_error: "strict" raises at the first bad line; "skip" drops bad lines and lists them in `skipped`
        (judgements that name a dropped line are dropped, and listed, too).

    Raises:
      UserError: bad line (with file:line and the fix), missing file, or nothing left to use.
    """
    if on_error not in ("strict", "skip"):
        raise UserError(f'on_error must be "strict" or "skip", not {on_error!r}.')
    folder = pathlib.Path(folder)
    corpus, queries = _existing(folder, "corpus.jsonl"), _existing(folder, "queries.jsonl")
    qrel_files = sorted(path for kind in ("tsv", "jsonl") for path in (folder / "qrels").glob(f"*.{kind}"))
    if not qrel_files:
        raise UserError(f"{folder / 'qrels'} holds no .tsv file; add qrels/train.tsv (query-id, corpus-id, score).")
    for path in qrel_files:
        if path.suffix == ".jsonl" and path.with_suffix(".tsv") in qrel_files:
            raise UserError(f"{path} and the .tsv beside it are one split; remove one of them.")

    reader = LineReader(strict=on_error == "strict")
    docs = _read_texts(reader, corpus, "document", titled=True)
    asked = _read_texts(reader, queries, "query", titled=False)
    for what, found, file in (("document", docs, corpus), ("query", asked, queries)):
        if not found:
            raise UserError(f"{file} holds no usable {what}; add at least one line.")
    qrels = {path.stem: _read_qrels(reader, path, docs, asked) for path in qrel_files}
    thoughts_file = folder / "thoughts.jsonl"
    thoughts = _read_thoughts(reader, thoughts_file, asked) if thoughts_file.exists() else {}

    for split, path in zip(qrels, qrel_files, strict=True):
        if not any(grade > 0 for judged in qrels[split].values() for grade in judged.values()):
            raise UserError(f"{path} names no relevant document (score > 0); add judgements or delete the file.")
    return Dataset(
        name=folder.resolve().name,
        doc_ids=list(docs),
        doc_texts=list(docs.values()),
        query_ids=list(asked),
        query_texts=list(asked.values()),
        qrels=qrels,
        thoughts=thoughts,
        skipped=reader.skipped,
        fingerprint=reader.hash.hexdigest(),
    )


def read_thoughts(path: str | pathlib.Path, query_ids: list[str]) -> dict[str, str]:
    """Reads a thoughts.jsonl ({query_id, text} per line) for known queries; UserError on any bad line."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a thoughts.jsonl.")
    return _read_thoughts(LineReader(strict=True), path, dict.fromkeys(query_ids, ""))


def _existing(folder: pathlib.Path, name: str) -> pathlib.Path:
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; give the path of a folder in BEIR form.")
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/.")
    return folder / name


def _read_texts(reader: LineReader, path: pathlib.Path, what: str, titled: bool) -> dict[str, str]:
    texts: dict[str, str] = {}

    def use(line: str, number: int) -> None:
        row = parse(line)
        name, text = identifier(row, "_id"), string(row, "text")
        if titled and "title" in row:
            text = f"{string(row, 'title')} {text}"
        text = text.strip()
        if not text:
            raise BadLine(f"{what} {name!r} has an empty text; write one or delete the line")
        if name in texts:
            raise BadLine(f"duplicate _id {name!r}; give every {what} its own id")
        texts[name] = text

    reader.each(path, path.name, use)
    return texts


def _read_qrels(
    reader: LineReader, path: pathlib.Path, docs: dict[str, str], queries: dict[str, str]
) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}

    def use(line: str, number: int) -> None:
        if path.suffix == ".jsonl":
            row = parse(line)
            query, doc = (identifier(row, field) for field in ("query-id", "corpus-id"))
            grade = row.get("score", 1)
        else:
            cells = line.split("\t")
            if len(cells) != 3:
                raise BadLine(f"{len(cells)} tab-separated columns; write query-id, corpus-id, score")
            query, doc, grade = (cell.strip() for cell in cells)
            if number == 1 and query in ("query-id", "query_id"):
                return
        try:
            value = int(grade)
            if isinstance(grade, float) and value != grade:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise BadLine(f"bad score {grade!r}; write a whole number such as 1") from None
        if query not in queries:
            raise BadLine(f"unknown query {query!r}; add it to queries.jsonl or delete the line")
        if doc not in docs:
            raise BadLine(f"unknown document {doc!r}; add it to corpus.jsonl or delete the line")
        judged = qrels.setdefault(query, {})
        if doc in judged:
            raise BadLine(f"query {query!r} and document {doc!r} are judged twice; delete one line")
        judged[doc] = value

    reader.each(path, f"qrels/{path.name}", use)
    return qrels


def _read_thoughts(reader: LineReader, path: pathlib.Path, queries: dict[str, str]) -> dict[str, str]:
    thoughts: dict[str, str] = {}

    def use(line: str, number: int) -> None:
        row = parse(line)
        query, text = identifier(row, "query_id"), string(row, "text").strip()
        if query not in queries:
            raise BadLine(f"unknown query {query!r}; add it to queries.jsonl or delete the line")
        if not text:
            raise BadLine(f"the thought of query {query!r} is empty; write one or delete the line")
        if query in thoughts:
            raise BadLine(f"query {query!r} has two thoughts; delete one line")
        thoughts[query] = text

    reader.each(path, path.name, use)
    return thoughts
