"""Micro runs of both stages that are stopped, and what must be the same about them in the end."""

import json
import pathlib
import random
import time

from r3jax.run.log import LEDGER
from tests import fixtures
from tests.chaos.victim import CLOCK, MOMENTS
from tests.test_train import lines, same_run

STEPS = {"sft": 16, "rl": 8}
CHANGES = {
    "sft__steps": STEPS["sft"],
    "rl__steps": STEPS["rl"],
    "rl__dynamic_sampling": 1,
    "checkpoint__every": 3,
    "evaluate__every": 8,
    "evaluate__batch_size": 64,
}
# How often each moment comes in an uninterrupted run, about.
TIMES = {
    "batch": 16,
    "rollout": 12,
    "refresh": 20,
    "update": 20,
    "save": 9,
    "amend": 3,
    "validation": 3,
    "evaluation": 1,
}
assert TIMES.keys() == MOMENTS.keys()


def command(folder: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    return [*fixtures.flags(folder, **CHANGES), f"--workdir={workdir}"]


def finish(folder: pathlib.Path, workdir: pathlib.Path) -> str:
    """Runs to the end; what it printed."""
    process = fixtures.run_python("-m", "r3jax.train", *command(folder, workdir))
    said, errors = process.communicate(timeout=1200)
    assert process.returncode == 0 and errors == "", errors
    return said


def struck(
    folder: pathlib.Path, workdir: pathlib.Path, moment: random.Random, number: str
) -> tuple[int, str, float, str]:
    """Runs until a signal comes at a random moment.

    Exit code, which moment it was, seconds to end once the step that the signal came in was over, what stderr says.
    """
    what = moment.choice(sorted(MOMENTS))
    nth, delay = moment.randint(1, TIMES[what]), moment.uniform(0, 0.15)
    words = ["-m", "tests.chaos.victim", what, str(nth), str(delay), number]
    process = fixtures.run_python(*words, *command(folder, workdir))
    said, errors = process.communicate(timeout=1200)
    end, told = time.monotonic(), [line.removeprefix(CLOCK) for line in said.splitlines() if line.startswith(CLOCK)]
    took = end - float(told[-1]) if told else 0.0
    return process.returncode, f"{what} {nth} after {delay:.3f} s", took, errors


def consumed(workdir: pathlib.Path, stage: str) -> list[int]:
    """Query rows of all training records that a stage has taken, in their order; each step is there once."""
    rows = [row for row in lines(workdir / LEDGER) if row["stage"] == stage]
    assert [row["step"] for row in rows] == list(range(1, STEPS[stage] + 1))
    return [query for row in rows for query in row["rows"]]


def each_once(rows: list[int], size: int) -> None:
    """In every epoch each of `size` records comes once; in the one that is not over, none twice."""
    epochs = [rows[i : i + size] for i in range(0, len(rows), size)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(epochs[0])


def same(folder: pathlib.Path, stopped: pathlib.Path, whole: pathlib.Path) -> None:
    """Weights, optimiser, index, iterator, figures and ledger of two finished runs, bit for bit."""
    same_run(folder, stopped, whole)
    for stage in STEPS:
        each_once(consumed(stopped, stage), 120)
    splits = [json.loads((run / "results.json").read_text())["splits"] for run in (stopped, whole)]
    for figures in (f for split in splits for f in split.values()):
        for condition in figures.values():
            condition.pop("ms_per_query", None)
    assert splits[0] == splits[1]
