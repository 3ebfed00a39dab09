"""Evaluates a trained run on one data set or several.

    python -m r3jax.evaluate --workdir=RUN [flags]

Prints nDCG@10, Recall@10/100 and MRR@10 without and with reasoning, with the controls and BM25 beside them, and
warnings about the data and ties; writes TREC runs and judgements, examples.json and evaluation.json. For example:

    python -m r3jax.evaluate --workdir=runs/rl-tiny
    python -m r3jax.evaluate --workdir=runs/rl-tiny --data=beir/scifact,beir/nfcorpus --split=test --format=markdown
    python -m r3jax.evaluate --workdir=runs/rl-tiny --conditions=direct,reasoning --budgets=0,4,8,16
"""

import json
import pathlib
import sys

import jax
from ml_collections import ConfigDict

from r3jax import assembly, processes, weights
from r3jax.errors import UserError
from r3jax.model.sharding import make_mesh
from r3jax.results import table
from r3jax.results.comparison import compare
from r3jax.results.conditions import BUDGET, MODEL_CONDITIONS
from r3jax.run import config as run_config
from r3jax.run.config import run_main
from r3jax.run.log import quiet_libraries

FLAGS = {
    "data": "folder of a data set (BEIR form), or several with commas; default: the run's own",
    "split": "split to evaluate, or several with commas; default: the run's held-out splits",
    "stage": "sft or rl; default: the run's last",
    "conditions": f"some of {', '.join(MODEL_CONDITIONS)}; default: all",
    "budgets": "reason also within so many tokens, such as 0,4,8,16",
    "format": "of the tables: text, markdown, json (one object for each data set) or latex; default: text",
    "out": "folder for the results; default: WORKDIR/evaluation/DATA-SPLIT; of several data sets each has one in it",
}
FORMATS = ("text", "markdown", "json", "latex")


def main(argv: list[str]) -> None:
    parsed = run_config.parse(argv, "r3jax.evaluate", FLAGS, config_required=False, several=("data", "split"))
    processes.connect()
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
    conditions = conditions_of(flags)
    style = flags["format"] or "text"
    if style not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not {style!r}.")
    jax.config.update("jax_compilation_cache_dir", config.xla_cache)
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        sets = [assembly.parts(config, workdir, mesh, path) for path in (flags["data"] or "").split(",")]
        for parts in sets:
            known = parts.dataset.qrels
            for split in splits:
                if split not in known:
                    raise UserError(f"--split: {parts.dataset.name} has no {split!r}; it has {', '.join(known)}.")
        names = [f"{parts.dataset.name}-{'-'.join(splits)}" for parts in sets]
        if len(set(names)) < len(names):
            raise UserError("--data names two folders of one name; evaluate them one by one, each with its --out.")
        params = weights.load_params(workdir, sets[0].model, mesh, stage)
        for parts, name in zip(sets, names, strict=True):
            out = pathlib.Path(flags["out"] or workdir / "evaluation" / name)
            if flags["out"] and len(sets) > 1:
                out = out / name
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"--out: cannot write to {out}: {e.strerror}; name another folder.") from None
            models = [(stage, params)]
            found = compare(parts.dataset, splits, models, parts.reader, parts.encode_corpus, out, conditions)
            results = {"name": config.name, "data": parts.dataset.name} | found
            if not processes.leads():
                continue
            (out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
            show(results, style, several=len(sets) > 1)
            print(f"results: {out}", file=sys.stdout if style == "text" else sys.stderr)


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
