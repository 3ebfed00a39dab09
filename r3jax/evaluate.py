"""Evaluates a trained run or a published model on one data set or several.

    r3jax evaluate RUN [flags]
    r3jax evaluate MODEL --data=DIR --split=test [flags]

MODEL is an exported or another Hugging Face folder, or a hub id; --workdir=RUN is the same as RUN. Prints nDCG@10,
Recall@10/100 and MRR@10 without and with reasoning, with the controls and BM25 beside them, and warnings about the data
and ties; writes TREC runs and judgements, thoughts, examples.json and evaluation.json. For example:

    python -m r3jax.evaluate runs/rl-tiny
    python -m r3jax.evaluate runs/rl-tiny --data=beir/scifact,beir/nfcorpus --split=test --format=markdown
    python -m r3jax.evaluate runs/rl-tiny --conditions=direct,reasoning --budgets=0,4,8,16
    python -m r3jax.evaluate published/rl-tiny --data=beir/scifact --split=test
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from r3jax import assembly, processes, weights
from r3jax.data import beir
from r3jax.errors import UserError, writing
from r3jax.model.hub import local_folder
from r3jax.model.sharding import make_mesh
from r3jax.reader import OnRows, Reader
from r3jax.results import table
from r3jax.results.comparison import compare
from r3jax.results.conditions import BUDGET, MODEL_CONDITIONS
from r3jax.run import command, stop
from r3jax.run import config as run_config
from r3jax.run.config import run_main
from r3jax.run.log import quiet_libraries
from r3jax.run.peers import Peers
from r3jax.search_r3 import SearchR3

FLAGS = {
    "data": "folder of a data set (BEIR form), or several with commas; default: the run's own",
    "split": "split to evaluate, or several with commas; default: the run's held-out splits",
    "stage": "of a run, sft or rl; default: its last",
    "conditions": f"some of {', '.join(MODEL_CONDITIONS)}; default: all",
    "budgets": "reason also within so many tokens, such as 0,4,8,16",
    "format": "of the tables: text, markdown, json (one object for each data set) or latex; default: text",
    "out": "folder for the results; default: RUN/evaluation/DATA-SPLIT, or evaluation/MODEL/DATA-SPLIT; of several "
    "data sets each has one in it",
}
FORMATS = ("text", "markdown", "json", "latex")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, and a model to read it."""

    dataset: beir.Dataset
    source: str  # the data set's folder
    reader: Reader
    encode_corpus: Callable[[Any, OnRows], np.ndarray]


def main(argv: list[str]) -> None:
    stop.on_term()
    processes.connect()
    with Peers():  # what ends one process ends all
        if not argv or argv[0].startswith("-"):
            of_run(argv)
        elif weights.is_run(argv[0]):
            of_run([f"--workdir={argv[0]}", *argv[1:]])
        else:
            of_published(argv[0], argv[1:])


def of_run(argv: list[str]) -> None:
    """Evaluates the folder of a run."""
    parsed = run_config.parse(argv, "r3jax.evaluate", FLAGS, config_required=False, several=("data", "split"))
    config, workdir, flags = parsed.config, parsed.workdir, parsed.flags
    if flags["stage"] not in (None, "sft", "rl"):
        raise UserError(f"--stage must be sft or rl, not {flags['stage']!r}.")
    quiet_libraries()
    if not {"data", "model", "mesh", "evaluate"} <= set(config):
        raise UserError(f"--workdir: {workdir} is not the folder of a run; name one that train.py made.")
    # The rest of the config concerns training: its data set and init_from need not be there any more.
    run_config.validate(
        ConfigDict({name: config[name] for name in ("model", "lora", "mesh", "evaluate") if name in config})
    )
    stage = flags["stage"] or weights.trained_stage(workdir)
    splits = tuple(dict.fromkeys((flags["split"] or ",".join(config.data.eval_splits)).split(",")))
    check_style(flags)
    conditions = conditions_of(flags)
    command.prepare(config.xla_cache if "xla_cache" in parsed.given else "")
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        tasks = []
        for path in (flags["data"] or "").split(","):
            parts = assembly.parts(config, workdir, mesh, path)
            tasks.append(Task(parts.dataset, path or config.data.path, parts.reader, parts.encode_corpus))
        names = names_of(tasks, splits)
        params = weights.load_params(workdir, parts.model, mesh, stage)
        measure(tasks, names, splits, config.name, (stage, params), conditions, flags, workdir / "evaluation")


def of_published(source: str, argv: list[str]) -> None:
    """Evaluates a Hugging Face folder or a hub id."""
    known = {name: text for name, text in FLAGS.items() if name != "stage"}
    flags = command.read(argv, "r3jax.evaluate", __doc__, flags=known).flags
    for name in ("data", "split"):
        if not flags[name]:
            raise UserError(f"--{name} is missing: {source} is no run, which would name its own.")
    check_style(flags)
    conditions = conditions_of(flags)
    command.prepare()
    folder = local_folder(source, "MODEL")
    sets = [(path, beir.load(path)) for path in flags["data"].split(",")]
    model = SearchR3.from_pretrained(folder)
    if not model.thinks:
        if flags["conditions"] != "direct" or flags["budgets"]:
            raise UserError(f"MODEL: {source} has no lm_head.weight, which thoughts need; add --conditions=direct.")
    elif "averaged" in conditions:
        if flags["conditions"]:
            raise UserError("--conditions: averaged samples as many thoughts as a run's config says; name a run.")
        conditions.remove("averaged")

    def task(path: str, dataset: beir.Dataset) -> Task:
        rows = model.reader.chat.documents(dataset.doc_texts, model.max_document)
        share = processes.here().share(len(rows))
        encode = model.reader.encode
        return Task(dataset, path, model.reader, lambda params, on_rows: encode(params, rows, on_rows, share))

    tasks = [task(*given) for given in sets]
    splits = tuple(dict.fromkeys(flags["split"].split(",")))
    name = pathlib.Path(source).resolve().name
    out = pathlib.Path("evaluation") / name
    measure(tasks, names_of(tasks, splits), splits, name, ("", model.params), conditions, flags, out)


def names_of(tasks: list[Task], splits: tuple[str, ...]) -> list[str]:
    """What to call the results of each task; UserError for a split that is not there, or two of one name."""
    for task in tasks:
        known = task.dataset.qrels
        for split in splits:
            if split not in known:
                raise UserError(f"--split: {task.dataset.name} has no {split!r}; it has {', '.join(known)}.")
    names = [f"{task.dataset.name}-{'-'.join(splits)}" for task in tasks]
    if len(set(names)) < len(names):
        raise UserError("--data names two folders of one name; evaluate them one by one, each with its --out.")
    return names


def measure(
    tasks: list[Task],
    names: list[str],
    splits: tuple[str, ...],
    title: str,
    model: tuple[str, Any],
    conditions: list[str],
    flags: dict[str, str | None],
    default: pathlib.Path,
) -> None:
    """Evaluates one model (stage, weights) on every task, and writes and prints what was found."""
    style = flags["format"] or "text"
    for task, name in zip(tasks, names, strict=True):
        out = pathlib.Path(flags["out"] or default / name)
        if flags["out"] and len(tasks) > 1:
            out = out / name
        with writing("--out", out):
            out.mkdir(parents=True, exist_ok=True)
        found = compare(task.dataset, splits, [model], task.reader, task.encode_corpus, out, conditions)
        results = {"name": title, "data": task.dataset.name, "source": str(pathlib.Path(task.source).absolute())}
        results |= found
        if not processes.leads():
            continue
        (out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
        show(results, style, several=len(tasks) > 1)
        print(f"results: {out}", file=sys.stdout if style == "text" else sys.stderr)


def check_style(flags: dict[str, str | None]) -> None:
    """UserError for an unknown --format."""
    if flags["format"] not in (None, *FORMATS):
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not {flags['format']!r}.")


def conditions_of(flags: dict[str, str | None]) -> list[str]:
    """What --conditions and --budgets ask for."""
    conditions = (flags["conditions"] or ",".join(MODEL_CONDITIONS)).split(",")
    unknown = [name for name in conditions if name not in MODEL_CONDITIONS]
    if unknown:
        raise UserError(f"--conditions: there is no {unknown[0]!r}; choose some of {', '.join(MODEL_CONDITIONS)}.")
    budgets = (flags["budgets"] or "").split(",") if flags["budgets"] else []
    if not all(budget.isdecimal() for budget in budgets):
        raise UserError(f"--budgets must be whole numbers with commas, such as 0,4,8,16, not {flags['budgets']!r}.")
    return [*dict.fromkeys(conditions), *(f"{BUDGET}{int(budget)}" for budget in dict.fromkeys(budgets))]


def show(results: dict, style: str, several: bool) -> None:
    """Prints the tables of one data set."""
    if style == "json":
        print(json.dumps(results))
    elif style == "latex":
        print(f"% {results['data']}\n{table.latex(results)}")
    else:
        if several:
            print(f"### {results['data']}\n" if style == "markdown" else f"{results['data']}\n")
        if style == "markdown":
            print(table.markdown(results))
        else:
            table.show(results)


if __name__ == "__main__":
    run_main(main)
