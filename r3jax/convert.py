"""Published checkpoints in, published checkpoints out; training data in.

    python -m r3jax.convert import SRC DST [--config=FILE[:SIZE]] [--config.KEY=VALUE ...]
    python -m r3jax.convert export RUN DST [--stage=sft|rl] [--shard-size=MIB] [--merge-lora]
    python -m r3jax.convert data FILE[,FILE...] DST

`import` makes a run of a Hugging Face folder or hub id: it can be evaluated and be the init_from of other runs. Of an
adapter of PEFT it is the base that adapter_config.json names, with the adapter merged.
`export` makes a folder for transformers, sentence-transformers (direct mode) and r3jax from a run's best weights. Of a
run with an adapter it is the adapter, for PEFT; --merge-lora makes ordinary weights of it and its base, in float32
also where the base is stored in bfloat16, whose rounding would undo a part of what the adapter has learnt.
`data` makes a data set's folder of training data in Tevatron's or FlagEmbedding's form (.jsonl); each file is a split
of its name.
DST must not exist, or be empty; it appears whole or not at all. For example:

    python -m r3jax.convert import Qwen/Qwen2.5-0.5B-Instruct runs/qwen-0.5b
    python -m r3jax.convert export runs/rl-tiny published/rl-tiny
    python -m r3jax.convert data train.jsonl,validation.jsonl data/mine
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from r3jax import export, weights
from r3jax.data import pairs
from r3jax.errors import UserError, cannot_write, writing
from r3jax.model import lora, peft
from r3jax.model.hub import local_folder
from r3jax.model.hugging_face_config import read_dtype
from r3jax.model.sharding import make_mesh
from r3jax.results import table
from r3jax.run import command
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.config import run_main
from r3jax.run.log import quiet_libraries
from r3jax.text import settings, tokenizer
from r3jax.text.prompts import ChatFormat, Prompts

ENTRY = "r3jax.convert"
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
BASE = f"{CONFIGS / 'base.py'}:qwen2_5_0_5b"  # for all but the sizes
MIB = 2**20
MERGE = "--merge-lora"
EXPORT_FLAGS = {
    "stage": "sft or rl; default: the run's last",
    "shard-size": "MiB of a safetensors file at most; default: 4096",
}


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        sys.exit(0)
    commands = {"import": import_, "export": export_, "data": data}
    if len(argv) < 3 or argv[0] not in commands or any(word.startswith("--") for word in argv[:3]):
        raise UserError(
            f"give import SRC DST, export RUN DST or data FILES DST, then flags; see python -m {ENTRY} --help."
        )
    chosen, source, target = argv[:3]
    quiet_libraries()
    commands[chosen](source, pathlib.Path(target), argv[3:])


def import_(source: str, target: pathlib.Path, argv: Sequence[str]) -> None:
    """Makes a run's folder of a published checkpoint, with its weights as they are (in model.param_dtype)."""
    parsed = run_config.parse([f"--config={BASE}", *argv], ENTRY)
    config = parsed.config
    check_target(target)
    folder = local_folder(source, "SRC")
    if weights.is_run(source):
        raise UserError(f"SRC names {source!r}, which is a run already; give a Hugging Face folder or a hub id.")
    begin = time.time()
    base, name = folder, source  # what brings the sizes and all weights but an adapter's
    if peft.is_adapter(folder):
        name = peft.base_of(folder)
        base = local_folder(name, f"{folder / peft.CONFIG}: base_model_name_or_path")
        if weights.is_run(name):
            raise UserError(
                f"{folder / peft.CONFIG}: the base {name!r} is a run; export it and name that folder there."
            )
    config.init_from, config.name = name, target.name
    known = settings.read(folder) or settings.read(base)
    weights.adopt(config, parsed.given, known)
    if config.lora.rank:
        raise UserError(f"config.lora.rank is {config.lora.rank}; import first, then train the adapter from that run.")
    checked = ("init_from", "from_scratch", "tokenizer", "model", "mesh", "evaluate")
    run_config.validate(ConfigDict({name: config[name] for name in checked}))
    if "model.param_dtype" not in parsed.given:
        config.model.param_dtype = read_dtype(base)
    jax.config.update("jax_compilation_cache_dir", config.xla_cache)
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh), new_folder(target) as part:
        own = folder if (folder / "tokenizer.json").is_file() else base
        own = config.tokenizer.path or own
        words = tokenizer.load(own, lowercase=bool(known and known.lowercase))
        model = weights.model_config(config, words)
        params = weights.load_published(base, model, mesh, words, str(own))
        if base is not folder:
            adapter, adapted = peft.import_adapter(folder, model, mesh)
            params = lora.merge(lora.join(params, adapter), adapted)
        words.save(part / "tokenizer")
        config.init_from = source
        run_config.save(config, part / run_config.SAVED_NAME)
        checkpointer = Checkpointer(part / "checkpoints" / weights.IMPORTED, keep_last=1)
        checkpointer.save(0, {"train": {"params": params}}, meta={"data": None})
        checkpointer.close()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{target}: {count:,} parameters of {source} in {time.time() - begin:.0f} s")


def export_(source: str, target: pathlib.Path, argv: Sequence[str]) -> None:
    """Makes a Hugging Face folder of a run's best weights (by validation)."""
    merge = MERGE in argv
    argv = [word for word in argv if word != MERGE]
    parsed = run_config.parse([f"--workdir={source}", *argv], ENTRY, EXPORT_FLAGS, config_required=False)
    config, run, flags = parsed.config, parsed.workdir, parsed.flags
    if flags["stage"] not in (None, "sft", "rl"):
        raise UserError(f"--stage must be sft or rl, not {flags['stage']!r}.")
    size = flags["shard-size"] or "4096"
    if not size.isdecimal() or not int(size):
        raise UserError(f"--shard-size must be a whole number of MiB above 0, not {size!r}.")
    if not {"data", "model", "mesh", "prompts"} <= set(config):
        raise UserError(f"{run} is not the folder of a run; name one that train.py or import made.")
    run_config.validate(ConfigDict({name: config[name] for name in ("model", "mesh")}))
    check_target(target)
    stage = flags["stage"] or weights.trained_stage(run)
    words = tokenizer.load(run / "tokenizer")
    model = weights.model_config(config, words)
    if merge and model.lora is None:
        raise UserError(f"{MERGE}: {run} was trained without an adapter; leave the flag out.")
    written = dataclasses.replace(model, lora=None, param_dtype="float32") if merge else model
    prompts, d = Prompts(**config.prompts), config.data
    what = export.Exported(
        name=config.name,
        model=written,
        chat=ChatFormat(words, prompts),
        settings=settings.Settings(
            prompts, d.max_query_tokens, d.max_doc_tokens, d.max_thought_tokens, lowercase=words.lowercase
        ),
        evaluation=evaluation(run),
        warning=warning(run, stage, config),
    )
    command.prepare(config.xla_cache if "xla_cache" in parsed.given else "")
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        params = weights.load_params(run, model, mesh, stage)
        with new_folder(target) as part:
            if model.lora and not merge:
                export.fill_adapter(part, params, what, config.init_from)
            else:
                whole = lora.merge(params, model, written.param_dtype) if merge else params
                export.fill(part, whole, what, int(size) * MIB)
    print(f"{target}: the {stage} {'adapter' if model.lora and not merge else 'weights'} of {run}")


def data(source: str, target: pathlib.Path, argv: Sequence[str]) -> None:
    """Makes a folder in BEIR form of other tools' training data."""
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}; give data FILES DST.")
    check_target(target)
    with new_folder(target) as part:
        counts = pairs.write_beir([pathlib.Path(name) for name in source.split(",")], part)
    print(f"{target}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))


def evaluation(run: pathlib.Path) -> str:
    """The run's results as markdown tables: its own or, of one that only r3jax.evaluate has read, those; "" without."""
    whole = run / "results.json"
    parts = [whole] if whole.is_file() else sorted((run / "evaluation").glob("*/evaluation.json"))
    tables = []
    for path in parts:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            heading = [] if path == whole else [f"### {results['data']}", ""]
            tables.append("\n".join([*heading, table.markdown(results)]))
        except (ValueError, TypeError, LookupError) as e:
            raise UserError(f"{path} is malformed ({e}); evaluate the run again or remove it.") from None
    return "\n\n".join(tables)


def warning(run: pathlib.Path, stage: str, config: ConfigDict) -> str:
    """What to say of weights that no validation found within the bound on what they may forget; "" of others."""
    bound = (config.get("evaluate") or {}).get("max_ability_kl")
    if not bound or stage == weights.IMPORTED:
        return ""
    checkpointer = Checkpointer(run / "checkpoints" / stage, keep_last=1, best_key=weights.BEST_KEY, read_only=True)
    best = checkpointer.best()
    checkpointer.close()
    # Training keeps no score of a checkpoint that crossed the bound, so that it is never the best.
    return (
        "" if best is not None else f"No validation found these weights within max_ability_kl={bound:g} of their base."
    )


def check_target(target: pathlib.Path) -> None:
    """Raises UserError for a DST with something in it."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"DST names {target}, where something is already; name another folder or remove that one.")


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill beside `target`, which takes its name once all is written; nothing stays after a failure."""
    part = target.absolute().with_name(f".{target.absolute().name}.part")
    try:
        with writing("DST", target):
            shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
            part.mkdir(parents=True)
        try:
            yield part
        except OSError as e:
            if e.filename and part not in pathlib.Path(e.filename).parents:
                raise  # of a file that is read
            raise UserError(cannot_write("DST", target, e)) from None
        with writing("DST", target):
            part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
