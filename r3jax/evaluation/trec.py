"""Run files in TREC's format, one returned document a line: ``query_id Q0 doc_id rank score tag``."""

import math
import os
import pathlib

from r3jax.errors import UserError
from r3jax.evaluation.metrics import Run, rank


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
                    raise UserError(f"{path}: a TREC run cannot hold the {kind} {word!r}; remove its spaces")
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
      UserError: with file and line, if a line has not six columns, its score is no number, or the document
        was there already for that query.
    """
    run: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            columns = line.split()
            if not columns:
                continue
            where = f"{path}:{number}"
            if len(columns) != 6:
                raise UserError(f"{where}: a TREC run has 6 columns, here are {len(columns)}; mend the line")
            query_id, _, doc_id, _, score, _ = columns
            scored = run.setdefault(query_id, {})
            if doc_id in scored:
                raise UserError(f"{where}: document {doc_id!r} occurs twice for query {query_id!r}; remove one")
            try:
                scored[doc_id] = float(score)
            except ValueError:
                scored[doc_id] = math.nan
            if math.isnan(scored[doc_id]):
                raise UserError(f"{where}: the score {score!r} is not a number; mend the line")
    return run
