"""Evaluates a trained run.

    python -m r3jax.evaluate --workdir=runs/rl-tiny [--data=DIR] [--split=NAME] [--stage=sft|rl] [--out=DIR]

Prints nDCG@10, Recall@10/100 and MRR@10 without and with reasoning, with the controls and BM25 beside them;
writes TREC runs, examples.json and evaluation.json to --out (default WORKDIR/evaluation/DATA-SPLIT).
"""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from r3jax import assembly, weights
from r3jax.errors import UserError
from r3jax.model.sharding import make_mesh
from r3jax.results import table
from r3jax.results.comparison import compare
from r3jax.run import config as run_config
from r3jax.run.config import run_main
from r3jax.run.log import quiet_libraries

FLAGS = {
    "data": "folder of the data set (BEIR form); default: the run's own",
    "split": "split to evaluate, or several with commas; default: the run's held-out splits",
    "stage": "sft or rl; default: the run's last",
    "out": "folder for the results; default: WORKDIR/evaluation/DATA-SPLIT",
}


def main(argv: list[str]) -> None:
    parsed = run_config.parse(argv, "r3jax.evaluate", FLAGS, config_required=False)
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
    splits = tuple((flags["split"] or ",".join(config.data.eval_splits)).split(","))
    jax.config.update("jax_compilation_cache_dir", config.xla_cache)
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        parts = assembly.parts(config, workdir, mesh, flags["data"])
        known = parts.dataset.qrels
        for split in splits:
            if split not in known:
                raise UserError(f"--split: {parts.dataset.name} has no {split!r}; it has {', '.join(known)}.")
        params = weights.load_params(workdir, parts.model, mesh, stage)
        out = pathlib.Path(flags["out"] or workdir / "evaluation" / f"{parts.dataset.name}-{'-'.join(splits)}")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out: cannot write to {out}: {e.strerror}; name another folder.") from None
        results = compare(parts.dataset, splits, [(stage, params)], parts.reader, parts.encode_corpus, out)
    results = {"name": config.name, "data": parts.dataset.name} | results
    (out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    table.show(results)
    print(f"results: {out}")


if __name__ == "__main__":
    run_main(main)
