"""The runs of a study: each is trained once, by `train.py`, into a folder of its own, and read from there.

    WORKDIR/seed-0/sft          stage 1, from which every other run of the seed starts
    WORKDIR/seed-0/default      stage 2 with the config as it is
    WORKDIR/seed-0/NAME         stage 2 with some fields changed, or both stages

A finished run is never repeated, one that was stopped goes on.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from r3jax.data.beir import Dataset
from r3jax.errors import UserError
from r3jax.evaluation import metrics
from r3jax.evaluation.significance import paired_randomisation
from r3jax.evaluation.trec import read_run
from r3jax.run import config as run_config
from r3jax.weights import BEST_KEY, IMPORTED, last_stage

METRIC = "ndcg@10"
MODES = ("direct", "reasoning", "empty")  # how a trained model is searched with
# What may differ between two commands that share runs; each run has its own seed.
FREE = ("name", "seed", "log.", "checkpoint.", "processes.", "xla_cache", "data.cache")
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run of stage 2 shows."""

    validation: Mapping[str, float]  # nDCG@10 of its best step, `direct` and `reasoning`
    held_out: Mapping[str, Mapping[str, float]]  # split -> mode -> nDCG@10
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]]  # split -> mode -> query -> nDCG@10
    thought_tokens: float  # mean over all held-out queries
    seconds: float  # of stage 2's steps


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where the runs of a study lie, and how they are made.

    train: runs `train.py` on a command line. flags: the config and its overrides, without seed and init_from.
    starts: trained runs to take stage 1 from, one or one per seed; none to train it.
    """

    train: Callable[[list[str]], None]
    flags: tuple[str, ...]
    workdir: pathlib.Path
    seeds: tuple[int, ...]
    starts: tuple[str, ...]
    dataset: Dataset

    def stage_1(self, seed: int) -> pathlib.Path:
        """The folder of a seed's run of stage 1, trained if it is not there."""
        folder = self._folder(seed, "sft")
        if not self.starts:
            if not (folder / "results.json").is_file():
                self._train(seed, folder, ["--config.rl.steps=0"])
            return folder
        given = pathlib.Path(self.starts[self.seeds.index(seed) % len(self.starts)])
        if last_stage(given) != "rl" or not (given / "checkpoints" / "sft").is_dir():
            return given
        # A run starts from another's last stage; here is that run as it was after its first.
        if not (folder / "checkpoints" / "sft").is_dir():
            draft = folder.with_name("sft.part")
            shutil.rmtree(draft, ignore_errors=True)
            for name in ("checkpoints/sft", "checkpoints/base", "tokenizer"):
                if (given / name).is_dir():  # only an adapter has a base
                    shutil.copytree(given / name, draft / name)
            shutil.copy(given / "config.json", draft)
            draft.rename(folder)
        return folder

    def run(self, seed: int, name: str, changes: Sequence[str], train: Callable | None = None) -> pathlib.Path:
        """The folder of a seed's run of stage 2 with `changes` (flags), trained if it is not finished."""
        folder = self._folder(seed, name)
        if not (folder / "results.json").is_file():
            self._train(seed, folder, [f"--config.init_from={self.stage_1(seed)}", *changes], train)
        return folder

    def whole(self, seed: int, name: str, changes: Sequence[str]) -> pathlib.Path:
        """The folder of a seed's run of both stages with `changes` (flags), trained if it is not finished."""
        folder = self._folder(seed, name)
        if not (folder / "results.json").is_file():
            self._train(seed, folder, changes)
        return folder

    def outcome(self, folder: pathlib.Path) -> Outcome:
        """What the finished run in `folder` shows."""
        results = json.loads((folder / "results.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        measured = [x for x in lines if x["stage"] == "rl" and x.get(f"eval/{BEST_KEY}") is not None]
        best = max(measured, key=lambda x: x[f"eval/{BEST_KEY}"])
        held_out, per_query, tokens, queries = {}, {}, 0.0, 0
        for split, conditions in results["splits"].items():
            held_out[split] = {mode: conditions[f"rl_{mode}"][METRIC] for mode in MODES}
            judged = {q: self.dataset.qrels[split][q] for q in self.dataset.positives(split)}
            runs = {mode: read_run(folder / "trec" / f"{split}.rl_{mode}.run") for mode in MODES}
            per_query[split] = {mode: metrics.per_query(run, judged, (METRIC,))[METRIC] for mode, run in runs.items()}
            count = conditions["rl_reasoning"]["queries"]
            tokens, queries = tokens + count * conditions["rl_reasoning"]["thought_tokens"], queries + count
        return Outcome(
            validation={mode: best[f"eval/{METRIC}/{mode}"] for mode in ("direct", "reasoning")},
            held_out=held_out,
            per_query=per_query,
            thought_tokens=tokens / queries,
            seconds=results["stage_seconds"]["rl"],
        )

    def _folder(self, seed: int, name: str) -> pathlib.Path:
        return self.workdir / f"seed-{seed}" / name

    def _train(self, seed: int, folder: pathlib.Path, more: Sequence[str], train: Callable | None = None) -> None:
        print(f"study: seed {seed}, {folder.name}", flush=True)
        (train or self.train)([*self.flags, f"--config.seed={seed}", *more, f"--workdir={folder}"])


def claim(workdir: pathlib.Path, config: ConfigDict, starts: str) -> None:
    """Keeps the config that all runs in `workdir` vary; UserError where they vary another."""
    config = ConfigDict(config)
    config.init_from = starts
    path = workdir / run_config.SAVED_NAME
    if path.is_file():
        old, new = (dict(run_config.leaves(c)) for c in (run_config.load_saved(path), config))
        for key in sorted(old.keys() | new.keys()):
            if not key.startswith(FREE) and old.get(key) != new.get(key):
                raise UserError(
                    f"--workdir: the runs in {workdir} have config.{key}={old.get(key)!r}, not {new.get(key)!r}; "
                    "name another --workdir or remove that folder."
                )
    try:
        run_config.save(config, path)
    except OSError as e:
        raise UserError(f"--workdir: cannot write to {workdir}: {e.strerror}; name another folder.") from None


def starts_of(init_from: str, seeds: Sequence[int]) -> tuple[str, ...]:
    """The runs that config.init_from names, separated by commas; UserError if they cannot serve the seeds."""
    starts = tuple(path for path in init_from.split(",") if path)
    if len(starts) not in (0, 1, len(seeds)):
        raise UserError(f"config.init_from names {len(starts)} runs for {len(seeds)} seeds; name one, or one per seed.")
    for path in starts:
        if last_stage(pathlib.Path(path)) in (None, IMPORTED):
            raise UserError(
                f"config.init_from: {path} holds no checkpoint of a stage; name the folder of a trained run."
            )
    return starts


def p_better(ours: Sequence[Outcome], theirs: Sequence[Outcome], split: str) -> float:
    """One-sided p that `ours` (one per seed) has the higher nDCG@10 with reasoning; paired by query."""
    return paired_randomisation(_by_query(ours, split, "reasoning"), _by_query(theirs, split, "reasoning"))


def p_mode(found: Sequence[Outcome], split: str, mode: str, other: str) -> float:
    """One-sided p that runs (one per seed) have the higher nDCG@10 with `mode` than with `other`; paired by query."""
    return paired_randomisation(_by_query(found, split, mode), _by_query(found, split, other))


def _by_query(found: Sequence[Outcome], split: str, mode: str) -> np.ndarray:
    """[Q] means over the seeds: the same query under two seeds is no new evidence."""
    queries = list(found[0].per_query[split][mode])
    return np.mean([[o.per_query[split][mode][q] for q in queries] for o in found], axis=0)


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are set right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
