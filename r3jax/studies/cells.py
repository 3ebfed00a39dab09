"""The runs of a study: each is trained once, by `train.py`, into a folder of its own, and read from there.

    WORKDIR/seed-0/sft          stage 1, from which every other run of the seed starts
    WORKDIR/seed-0/default      stage 2 with the config as it is
    WORKDIR/seed-0/NAME         stage 2 with some fields changed, or both stages

A finished run is never repeated, one that was stopped goes on.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from r3jax.data.beir import Dataset
from r3jax.errors import UserError, writing
from r3jax.evaluation import metrics
from r3jax.evaluation.significance import paired_randomisation
from r3jax.evaluation.trec import read_run
from r3jax.run import config as run_config
from r3jax.run import fingerprint
from r3jax.weights import BEST_KEY, IMPORTED, last_stage

METRIC = "ndcg@10"
MODES = ("direct", "reasoning", "empty")  # how a trained model is searched with
# What may differ between two commands that share runs; each run has its own seed and start.
FREE = ("name", "seed", "init_from", "log.", "checkpoint.", "processes.", "xla_cache", "data.cache")
KEPT = "study.json"  # data, code, machine and starts of all runs in the folder
BOOTSTRAPS = 10_000
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run of stage 2 shows."""

    validation: Mapping[str, float]  # nDCG@10 of its best step, `direct` and `reasoning`
    held_out: Mapping[str, Mapping[str, float]]  # split -> mode -> nDCG@10
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]]  # split -> mode -> query -> nDCG@10
    thought_tokens: float  # mean over all held-out queries
    step_seconds: float  # median of stage 2's steps without shadows, so that compilations and probes do not count
    encoded: float  # documents per step of stage 2, those for probes and their reward errors among them


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
                self._train(seed, folder, {"rl.steps": 0})
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

    def run(self, seed: int, name: str, changes: Mapping[str, Any], train: Callable | None = None) -> pathlib.Path:
        """The folder of a seed's run of stage 2 with `changes` (field: value), trained if it is not finished."""
        folder = self._folder(seed, name)
        if not (folder / "results.json").is_file():
            self._train(seed, folder, {"init_from": self.stage_1(seed), **changes}, train)
        return folder

    def whole(self, seed: int, name: str, changes: Mapping[str, Any]) -> pathlib.Path:
        """The folder of a seed's run of both stages with `changes` (field: value), trained if it is not finished."""
        folder = self._folder(seed, name)
        if not (folder / "results.json").is_file():
            self._train(seed, folder, changes)
        return folder

    def outcome(self, folder: pathlib.Path) -> Outcome:
        """What the finished run in `folder` shows."""
        results = json.loads((folder / "results.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [x for x in lines if x["stage"] == "rl" and "time/step" in x]
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
            step_seconds=float(np.median([x["time/step"] - x.get("time/shadows", 0) for x in steps])),
            encoded=_encoded(steps, run_config.load_saved(folder / run_config.SAVED_NAME), len(self.dataset.doc_ids)),
        )

    def _folder(self, seed: int, name: str) -> pathlib.Path:
        return self.workdir / f"seed-{seed}" / name

    def _train(
        self, seed: int, folder: pathlib.Path, changes: Mapping[str, Any], train: Callable | None = None
    ) -> None:
        print(f"study: seed {seed}, {folder.name}", flush=True)
        more = [f"--config.{field}={value}" for field, value in changes.items()]
        (train or self.train)([*self.flags, f"--config.seed={seed}", *more, f"--workdir={folder}"])


def _encoded(steps: Sequence[Mapping[str, Any]], config: ConfigDict, documents: int) -> float:
    """Documents that a run encoded in a step of stage 2, all in all, by the figures of its steps."""
    whole = sum("probe/reward_error" in x for x in steps) * documents
    return (sum(x["index/reencoded"] for x in steps) + whole) / len(steps) + min(config.index.probes, documents)


def claim(
    workdir: pathlib.Path, config: ConfigDict, data: str, starts: Mapping[int, str], accept: frozenset[str]
) -> Mapping[str, Any]:
    """Keeps what all runs in `workdir` share, and returns it; UserError where runs that are there have other.

    data: the data set's hash. starts: the run that stage 1 is taken from, of each seed that has one. accept: of
    "data" and "code", what may differ. Returned: `machine` and `month`, those of the first runs.
    """
    path, kept = workdir / run_config.SAVED_NAME, workdir / KEPT
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir: {workdir} is a run's own folder; name another for the runs of the study.")
    if path.is_file():
        old, new = (dict(run_config.leaves(c)) for c in (run_config.load_saved(path), config))
        for key in sorted(old.keys() | new.keys()):
            if not key.startswith(FREE) and old.get(key) != new.get(key):
                raise UserError(
                    f"--workdir: the runs in {workdir} have config.{key}={old.get(key)!r}, not {new.get(key)!r}; "
                    "name another --workdir or remove that folder."
                )
    code = dict(fingerprint.code(config.rl.reward.name))
    found: dict[str, Any] = {
        "data": data,
        "code": code,
        "starts": {str(seed): start for seed, start in starts.items()},
        "machine": f"{jax.device_count()} device(s) of kind {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "month": f"{datetime.date.today():%B %Y}",
    }
    if kept.is_file():
        before = json.loads(kept.read_text())
        fingerprint.refuse_data(config.data.path, before["data"], data, accept)
        fingerprint.refuse_code(before["code"], code, accept)
        for seed, start in found["starts"].items():
            if before["starts"].get(seed, start) != start:
                raise UserError(
                    f"config.init_from: seed {seed} of the runs in {workdir} starts from {before['starts'][seed]}, not "
                    f"{start}; name that run or another --workdir."
                )
        found = before | {"starts": before["starts"] | found["starts"]}
    with writing("--workdir", workdir):
        run_config.save(config, path)
        draft = kept.with_name(KEPT + ".part")
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(kept)
    return found


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


def gap(ours: Sequence[Outcome], theirs: Sequence[Outcome], split: str) -> tuple[float, float, float]:
    """How much better nDCG@10 with reasoning is in `ours`, and its 95 % interval by a bootstrap over the queries.

    What another seed would change is not in it; each seed's own scores tell that.
    """
    apart = _by_query(ours, split, "reasoning") - _by_query(theirs, split, "reasoning")
    rng = np.random.default_rng(0)
    means = [apart[rng.integers(0, len(apart), len(apart))].mean() for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(apart.mean()), float(low), float(high)


def each(values: Sequence[float]) -> str:
    """The mean, and every seed's own in brackets."""
    return f"{mean(values):.4f} ({', '.join(f'{x:.4f}' for x in values)})"


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
