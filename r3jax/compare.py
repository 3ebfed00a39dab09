"""Compares two runs query by query: means, wins, ties, losses, and a paired randomisation test.

    r3jax compare RUN_A RUN_B [flags]

RUN_A and RUN_B are TREC run files, or the folders of two evaluations (then all conditions that both have). Judgements
are those that r3jax evaluate wrote beside RUN_A; a query that a run leaves out scores 0 there. For example:

    r3jax compare runs/a/evaluation/scifact-test runs/b/evaluation/scifact-test --queries=5
    r3jax compare runs/a/trec/seen.rl_direct.run runs/a/trec/seen.rl_reasoning.run --metric=recall@10 --json
    r3jax compare mine.run theirs.run --qrels=beir/scifact/qrels/test.tsv
"""

import json
import pathlib

from r3jax.errors import UserError
from r3jax.evaluation.head_to_head import HeadToHead, head_to_head
from r3jax.evaluation.trec import read_qrels, read_run
from r3jax.results.table import p_text
from r3jax.run import command
from r3jax.run.config import run_main

FLAGS = {
    "qrels": "judgements, as .tsv of BEIR or in TREC's form; default: those beside RUN_A",
    "metric": "ndcg@K, recall@K or mrr@K; default: ndcg@10",
    "queries": "show so many of the largest wins and losses; default: 0",
}
SWITCHES = {"json": "one JSON object for each pair of runs, each query in it"}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.compare", __doc__, ("RUN_A", "RUN_B"), FLAGS, SWITCHES)
    a, b = map(pathlib.Path, given.words)
    metric, shown = given.flags["metric"] or "ndcg@10", given.whole("queries", 0) or 0
    pairs = [(a.name, a, b)]
    if a.is_dir() and b.is_dir():
        there = {path.name for path in (b / "trec").glob("*.run")}
        pairs = [(path.stem, path, b / "trec" / path.name) for path in sorted((a / "trec").glob("*.run"))]
        pairs = [pair for pair in pairs if pair[1].name in there]
        if not pairs:
            raise UserError(f"{a} and {b} have no run in common under trec/; name the files of two runs.")
    for name, ours, theirs in pairs:
        for word, path in (("RUN_A", ours), ("RUN_B", theirs)):
            if not path.is_file():
                raise UserError(f"{word}: {path} is no file; give two TREC run files, or two evaluations' folders.")
        judged = _judgements(ours, theirs, given.flags["qrels"])
        runs = read_run(ours), read_run(theirs)
        for word, path, run in (("RUN_A", ours, runs[0]), ("RUN_B", theirs, runs[1])):
            if not judged.keys() & run.keys():
                raise UserError(f"{word}: {path} answers no judged query; give two runs of one data set and split.")
        if not any(grade > 0 for grades in judged.values() for grade in grades.values()):
            raise UserError("--qrels names no relevant document; give judgements with grades above 0.")
        try:
            found = head_to_head(*runs, judged, metric)
        except ValueError as e:
            raise UserError(f"--metric: {e}.") from None
        if given.switches["json"]:
            print(json.dumps({"name": name, "run_a": str(ours), "run_b": str(theirs)} | found.as_dict()))
        else:
            print(_text(name, found, shown))


def _judgements(ours: pathlib.Path, theirs: pathlib.Path, given: str | None) -> dict[str, dict[str, int]]:
    """Those given, or those beside the run files, of their splits; both must have the same."""
    beside, other = (run.with_name(run.name.rsplit(".", 2)[0] + ".qrels") for run in (ours, theirs))
    path = pathlib.Path(given) if given else beside
    if not path.is_file():
        raise UserError(f"--qrels: there is no {path}; name a file of judgements.")
    judged = read_qrels(path)
    if not given and other.is_file() and read_qrels(other) != judged:
        raise UserError(f"RUN_B: {other} has other judgements than {path}; compare runs of one data set and split.")
    return judged


def _text(name: str, found: HeadToHead, shown: int) -> str:
    f = found.as_dict()
    lines = [
        f"{name}: {found.metric} {f['a']:.4f} (A) against {f['b']:.4f} (B), {f['a'] - f['b']:+.4f}; "
        f"A wins {f['wins']}, ties {f['ties']}, loses {f['losses']} of {f['queries']}; two-sided {p_text(f['p'])}"
    ]
    lines += [f"  {found.differences[q]:+.4f}  {q}" for q in found.extremes(shown)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
