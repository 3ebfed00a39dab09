"""Where weights and their sizes come from: a run's folder, another run's, a published checkpoint."""

import dataclasses
import pathlib
from collections.abc import Collection

import jax
from ml_collections import ConfigDict

from r3jax.errors import UserError
from r3jax.model import attention, lora, peft
from r3jax.model import params as model_params
from r3jax.model.hub import local_folder
from r3jax.model.hugging_face import load_hugging_face
from r3jax.model.hugging_face_config import read_config
from r3jax.model.qwen2 import Lora, ModelConfig
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from r3jax.text import settings
from r3jax.text import tokenizer as tokenizers

BEST_KEY = "ndcg@10/reasoning"  # on the validation split
OURS = ("compute_dtype", "param_dtype", "remat", "attention", "lora")  # of ModelConfig: a choice of whoever trains
IMPORTED = "imported"  # the stage of a published checkpoint that `r3jax.convert import` made a run of


def is_run(init_from: str) -> bool:
    """Whether init_from is a run of ours, not a Hugging Face folder or nothing."""
    return bool(init_from) and (pathlib.Path(init_from) / "checkpoints").is_dir()


def is_trained(init_from: str) -> bool:
    """Whether init_from is a run of ours that went through a stage, and was not only imported."""
    return is_run(init_from) and trained_stage(pathlib.Path(init_from)) != IMPORTED


def trained_stage(run: pathlib.Path) -> str:
    """`last_stage`; UserError if there is none."""
    stage = last_stage(run)
    if stage is None:
        raise UserError(f"{run} holds no checkpoint; train it first or name another run.")
    return stage


def last_stage(run: pathlib.Path) -> str | None:
    """The last stage of a run that has a checkpoint; None if none has."""
    for stage in ("rl", "sft", IMPORTED):
        # A checkpoint that is being written has a longer name than its step.
        if any(step.name.isdigit() for step in (run / "checkpoints" / stage).glob("*")):
            return stage
    return None


def load_params(run: pathlib.Path, model: ModelConfig, mesh: jax.sharding.Mesh, stage: str):
    """The best (by validation) weights of a stage of a run."""
    folder = run / "checkpoints" / stage
    checkpointer = Checkpointer(folder, keep_last=1, best_key=BEST_KEY, read_only=True)
    step = checkpointer.best() or checkpointer.latest()
    if step is None:
        raise UserError(f"{run} holds no checkpoint of {stage}; train it first or name another run.")
    target = {"params": (lora if model.lora else model_params).abstract(model, mesh)}
    state, _ = checkpointer.restore(step, {"train": target}, partial=True)
    checkpointer.close()
    trained = state["train"]["params"]
    return lora.join(load_base(run, model, mesh), trained) if model.lora else trained


def save_base(run: pathlib.Path, base) -> None:
    """Keeps an adapter's base in its run's folder, once."""
    checkpointer = Checkpointer(run / "checkpoints" / "base", keep_last=1)
    checkpointer.save(0, {"params": base}, meta={})
    checkpointer.close()


def load_base(run: pathlib.Path, model: ModelConfig, mesh: jax.sharding.Mesh):
    """What `save_base` kept."""
    checkpointer = Checkpointer(run / "checkpoints" / "base", keep_last=1, read_only=True)
    state, _ = checkpointer.restore(0, {"params": model_params.abstract(model, mesh)})
    checkpointer.close()
    return state["params"]


def of_another_run(run: pathlib.Path, model: ModelConfig, mesh: jax.sharding.Mesh, tokenizer):
    """The best weights of a run's last stage; its adapter goes on if ours is alike, and is merged if we have none.

    Raises UserError for an adapter unlike ours.
    """
    theirs = model_config(run_config.load_saved(run / run_config.SAVED_NAME), tokenizer)
    theirs = dataclasses.replace(model, param_dtype=theirs.param_dtype, lora=theirs.lora)
    base, adapter = lora.split(load_params(run, theirs, mesh, trained_stage(run)))
    base = jax.tree.map(lambda w: w.astype(model.param_dtype), base)
    if adapter and model.lora is None:
        return lora.merge(lora.join(base, adapter), theirs)
    if adapter and not lora.alike(theirs.lora, model.lora):
        raise UserError(
            f"config.init_from: {run} was trained with config.lora.rank={theirs.lora.rank}, "
            f"alpha={theirs.lora.alpha:g} and targets={','.join(theirs.lora.targets)}; set the same, "
            "or rank=0 to merge that adapter and train all weights."
        )
    return lora.join(base, adapter)


def load_published(folder: pathlib.Path, model: ModelConfig, mesh: jax.sharding.Mesh, tokenizer, words: str = ""):
    """The weights of a Hugging Face folder; the row of an embed token that is new to it becomes the mean.

    `words` is the folder that `tokenizer` came from, if it was another. Raises UserError for a checkpoint that does
    not fit the model or the tokenizer.
    """
    _refuse_adapter(folder)
    learnt = tokenizers.own_embed_id(folder)
    if learnt is None:
        learnt = tokenizers.own_embed_id(words or folder)
    if learnt not in (None, tokenizer.embed_id):
        raise UserError(
            f"{folder} has {tokenizers.EMBED_TOKEN} as token {learnt}, the tokenizer as {tokenizer.embed_id}; "
            "use the checkpoint's own tokenizer."
        )
    if tokenizer.size > model.vocab:
        raise UserError(
            f"{folder} has {model.vocab} embedding rows for the {tokenizer.size} ids of the tokenizer with "
            f"{tokenizers.EMBED_TOKEN}; resize its embeddings to at least {tokenizer.size} rows."
        )
    return load_hugging_face(folder, model, mesh, tokenizer.embed_id if learnt is None else None)


def adopt(config: ConfigDict, given: Collection[str] = (), published: settings.Settings | None = None) -> None:
    """Takes over, in place, what the run or the checkpoint that init_from names decides, and prints what changed.

    That is the model: sizes, tying, rotary positions, norms; and the prompts it was trained with, if it tells them
    (with `published`, those and the lengths of its texts). Keys that the command line has `given` stay, except the
    model's.
    Raises UserError for a checkpoint that is neither here nor on the hub, or that the decoder does not implement.
    """
    source = config.init_from
    if not source:
        return
    folder = local_folder(source)
    if is_run(source):
        saved = run_config.load_saved(folder / run_config.SAVED_NAME)
        fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}  # old runs lack some
        found = {f"model.{x}": saved.model.get(x, default) for x, default in fields.items() if x not in OURS}
        prompts = dict(saved.prompts)
    elif any(folder.glob("*.safetensors")):
        _refuse_adapter(folder)
        found = {f"model.{name}": value for name, value in read_config(folder).items()}
        known = published or settings.read(folder)
        prompts = vars(known.prompts) if known else {}
    else:
        return  # for the rules to say
    told = {f"prompts.{name}": prompts[name] for name in prompts}
    if published:
        told |= {f"data.{name}": getattr(published, name) for name in settings.LIMITS}
    found |= {name: value for name, value in told.items() if name not in given}
    now = dict(run_config.leaves(config))
    changed = {name: value for name, value in found.items() if now[name] != value}
    if changed:
        words = ", ".join(f"{name}={value!r} (not {now[name]!r})" for name, value in changed.items())
        print(f"config as in {source}: {words}")
        config.update_from_flattened_dict(changed)


def _refuse_adapter(folder: pathlib.Path) -> None:
    if peft.is_adapter(folder):
        raise UserError(f"{folder} holds an adapter, not a model; make a run of it: python -m r3jax.convert import.")


def model_config(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> ModelConfig:
    """The model's sizes and numerics; UserError if the tokenizer has more ids than the model has rows."""
    model = ModelConfig(**config.model)
    found = config.get("lora")  # runs from before there were adapters have none
    if found and found.rank:
        adapter = Lora(found.rank, float(found.alpha), found.dropout, tuple(found.targets), tokenizer.embed_id)
        # Every use of a weight casts it to compute_dtype, so a base that is never changed loses nothing by it.
        model = dataclasses.replace(model, lora=adapter, param_dtype=model.compute_dtype)
    if tokenizer.size > model.vocab:
        raise UserError(f"config.model.vocab={model.vocab} must be at least the tokenizer's {tokenizer.size} ids.")
    return model


def here(model: ModelConfig, mesh: jax.sharding.Mesh) -> ModelConfig:
    """The model with an attention kernel that runs on this mesh: a run can be read where it was not trained."""
    platform = mesh.devices.flat[0].platform
    known = attention.runs(model.attention, platform, model.compute_dtype)
    return model if known else dataclasses.replace(model, attention=attention.KERNELS[0])
