"""TREC's files: runs, one returned document a line: ``query_id Q0 doc_id rank score tag``, and judgements."""

import math
import os
import pathlib

from r3jax.data.lines import stream
from r3jax.errors import UserError
from r3jax.evaluation.metrics import Qrels, Run, rank


def write_run(path: str | os.PathLike, run: Run, tag: str) -> pathlib.Path:
    """Writes a run, best document first; the file appears whole or not at all.

    Scores are written so that reading them gives the same number back. A query without documents has no
    line, so it does not survive the round trip.

    Args:
      path: the file; its folder must exist.
      run: ``{query_id: {doc_id: score}}``.
      tag: name of the system, the last column.

    Raises:
      UserError: if an id or the tag holds white space, which the format cannot carry.
    """
    path = pathlib.Path(path)
    lines = []
    for query_id, scored in run.items():
        for position, doc_id in enumerate(rank(scored), 1):
            for kind, word in (("query id", query_id), ("document id", doc_id), ("tag", tag)):
                if word.split() != [word]:
                    raise UserError(f"{path}: a TREC run cannot hold the {kind} {word!r}; remove its spaces.")
            lines.append(f"{query_id} Q0 {doc_id} {position} {float(scored[doc_id])!r} {tag}\n")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text("".join(lines), encoding="utf-8", newline="\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_run(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Reads a run file; the rank column is ignored, as trec_eval does.

    Raises:
      UserError: with file and line, if a line is not UTF-8 or has not six columns, its score is no number, or the
        document was there already for that query.
    """
    run: dict[str, dict[str, float]] = {}
    for line, number in stream(pathlib.Path(path)):
        columns = line.split()
        where = f"{path}:{number}"
        if len(columns) != 6:
            raise UserError(f"{where}: a TREC run has 6 columns, here are {len(columns)}; mend the line.")
        query_id, _, doc_id, _, score, _ = columns
        scored = run.setdefault(query_id, {})
        if doc_id in scored:
            raise UserError(f"{where}: document {doc_id!r} occurs twice for query {query_id!r}; remove one.")
        try:
            scored[doc_id] = float(score)
        except ValueError:
            scored[doc_id] = math.nan
        if math.isnan(scored[doc_id]):
            raise UserError(f"{where}: the score {score!r} is not a number; mend the line.")
    return run


def write_qrels(path: str | os.PathLike, qrels: Qrels) -> None:
    """Writes judgements, ``query_id 0 doc_id grade`` a line, for trec_eval and `read_qrels`; makes the folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{query} 0 {doc} {grade}\n" for query, judged in qrels.items() for doc, grade in judged.items()]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def read_qrels(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Reads judgements in TREC's form (four columns) or BEIR's (query-id, corpus-id, score, under a header line).

    Raises:
      UserError: with file and line, if a line is not UTF-8, has another number of columns, or no whole number as grade.
    """
    qrels: dict[str, dict[str, int]] = {}
    for line, number in stream(pathlib.Path(path)):
        columns = line.split()
        if number == 1 and columns[0] in ("query-id", "query_id"):
            continue
        if len(columns) not in (3, 4):
            raise UserError(f"{path}:{number}: judgements have 3 or 4 columns, here are {len(columns)}; mend the line.")
        try:
            qrels.setdefault(columns[0], {})[columns[-2]] = int(columns[-1])
        except ValueError:
            raise UserError(f"{path}:{number}: the grade {columns[-1]!r} is no whole number; mend the line.") from None
    return qrels
