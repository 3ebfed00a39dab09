"""Adapters as PEFT stores them: a folder with adapter_config.json and adapter_model.safetensors.

PEFT's lora_A.weight is [rank, inputs] and its lora_B.weight [outputs, rank]: the transposes of ours, layer by layer.
The embed token's row is PEFT's `trainable_token_indices`, which also keeps the row itself and not a difference.
What an adapter of PEFT may hold besides is refused by name. Written against PEFT 0.21.
"""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from r3jax.errors import UserError
from r3jax.model import lora
from r3jax.model.params import flatten, unflatten
from r3jax.model.qwen2 import Lora, ModelConfig

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
GROUPS = {"layers/attn": "self_attn", "layers/mlp": "mlp"}
ROWS = {"embed": ("embed_tokens", "model.embed_tokens"), "unembed": ("lm_head", "lm_head")}
ROW = ".token_adapter.trainable_tokens_delta"
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "trainable_token_indices", "use_rslora", "peft_type"}
# Of no consequence to what the adapter computes.
IDLE = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "megatron_core"}
IDLE |= {"peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
# How A and B began; the other ways (pissa, olora, corda, loftq, …) change the base as well.
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def export_adapter(folder: pathlib.Path, adapter: dict, config: ModelConfig, base: str = "") -> None:
    """Writes an adapter (or weights that hold one) where PEFT's `PeftModel.from_pretrained(base, folder)` reads it.

    `base` names the checkpoint that training began with. Raises UserError if there is no adapter.
    """
    _, adapter = lora.split(adapter)
    if config.lora is None or not adapter:
        raise UserError(
            "there is no adapter to export: the run was trained with config.lora.rank=0; export its weights."
        )
    flat = {name: np.asarray(jax.device_get(leaf), np.float32) for name, leaf in flatten(adapter).items()}
    tensors = {}
    for name, leaf in flat.items():
        module, kind = name.rsplit("/", 1)
        if kind == "token_row":
            tensors[PREFIX + ROWS[module][1] + ROW] = leaf[None]
        else:
            for layer, w in enumerate(leaf):
                tensors[_key(module, layer, kind)] = np.ascontiguousarray(w.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": sorted(f"{target}_proj" for target in config.lora.targets),
        "trainable_token_indices": _indices(flat, config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def import_adapter(folder: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[dict, ModelConfig]:
    """An adapter that PEFT saved, placed on the mesh, and the config with its rank, alpha and targets.

    `config` is the base's. Use it as `lora.join(base, adapter)`. Raises UserError for what cannot be read, a tensor
    that does not fit the config's sizes, and a kind of adapter that is not implemented.
    """
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{folder} holds no adapter of PEFT in safetensors ({e}); name one that does.") from None
    _refuse(folder, described)
    flat: dict[str, np.ndarray] = {}
    found: dict[str, set[int]] = {}
    for key, tensor in tensors.items():
        name, layer = _name(folder, key)
        tensor = np.asarray(tensor, np.float32)
        if name.endswith("token_row"):
            flat[name], layer = tensor[0], 0
        else:
            if layer >= config.layers:
                raise UserError(f"{folder}: tensor {key!r} has no place in a model of {config.layers} layers.")
            flat.setdefault(name, np.zeros((config.layers, *tensor.T.shape), np.float32))
            if flat[name].shape[1:] != tensor.T.shape:
                raise UserError(f"{folder}: tensor {key!r} has shape {tensor.shape}, unlike that of other layers.")
            flat[name][layer] = tensor.T
        found.setdefault(name, set()).add(layer)
    config = _with_lora(folder, described, flat, config)
    wanted = {name: shape for name, (shape, _) in lora.adapter_table(config).items()}
    for name in sorted(flat.keys() | {n for n in wanted if not n.endswith("token_row")}):
        if name not in flat:
            raise UserError(f"{folder}: {name} is missing; give the whole adapter.")
        if name not in wanted or flat[name].shape != wanted[name]:
            raise UserError(
                f"{folder}: {name} has shape {flat[name].shape}, the base asks for {wanted.get(name)}; "
                "give the base that it was trained on."
            )
        if len(found[name]) != (config.layers if name.startswith("layers/") else 1):
            raise UserError(f"{folder}: {name} is given for {len(found[name])} of {config.layers} layers, not for all.")
    places = flatten(lora.abstract(config, mesh))
    return unflatten({name: jax.device_put(leaf, places[name].sharding) for name, leaf in flat.items()}), config


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter of PEFT, not a model."""
    return (folder / CONFIG).is_file()


def base_of(folder: pathlib.Path) -> str:
    """The base that an adapter names: a folder or a hub id; UserError if it names none."""
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, LookupError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(
            f"{folder / CONFIG} has no base_model_name_or_path; set it to the folder or hub id of the checkpoint that "
            "the adapter was trained on."
        )
    return base


def _key(module: str, layer: int, kind: str) -> str:
    group, target = module.rsplit("/", 1)
    return f"{PREFIX}model.layers.{layer}.{GROUPS[group]}.{target}_proj.lora_{kind[-1].upper()}.weight"


def _name(folder: pathlib.Path, key: str) -> tuple[str, int]:
    """Our name of a tensor of PEFT, and its layer."""
    for ours, (_, theirs) in ROWS.items():
        if key == PREFIX + theirs + ROW:
            return f"{ours}/token_row", 0
    pattern = re.escape(PREFIX) + r"model\.layers\.(\d+)\.(\w+)\.(\w+)_proj\.lora_([AB])\.weight"
    if match := re.fullmatch(pattern, key):
        layer, group, target, kind = match.groups()
        module = lora.TARGETS.get(target, ("",))[0]
        if GROUPS.get(module.rsplit("/", 1)[0]) == group:
            return f"{module}/lora_{kind.lower()}", int(layer)
    raise UserError(f"{folder}: tensor {key!r} is of no projection that can be adapted: {', '.join(lora.TARGETS)}.")


def _indices(flat: dict, config: ModelConfig):
    """`trainable_token_indices`: a list means the embedding (and the head that is tied to it)."""
    token = [config.lora.token]
    named = [ROWS[m][0] for m in ROWS if f"{m}/token_row" in flat]
    return None if not named else token if named == ["embed_tokens"] else dict.fromkeys(named, token)


def _refuse(folder: pathlib.Path, described: dict) -> None:
    """Raises UserError for the first field that asks for what is not implemented."""
    if described.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type {described.get('peft_type')!r} is not implemented; only LORA is.")
    if described.get("init_lora_weights", True) not in BEGINNINGS:
        raise UserError(
            f"{folder}: init_lora_weights={described['init_lora_weights']!r} changed the base too; "
            "convert the adapter to plain LoRA with PEFT."
        )
    for field, value in described.items():
        if field not in READ | IDLE | {"init_lora_weights"} and value not in (None, False, "none", {}, []):
            raise UserError(f"{folder}: {field}={value!r} is not implemented; merge the adapter with PEFT instead.")


def _with_lora(folder: pathlib.Path, described: dict, flat: dict, config: ModelConfig) -> ModelConfig:
    """The base's config with the adapter's rank, alpha, targets and token."""
    rank, alpha = int(described.get("r") or 8), float(described.get("lora_alpha") or 8)
    if described.get("use_rslora"):
        alpha *= rank**0.5  # its scale is alpha / sqrt(rank)
    indices = described.get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    tokens = {t for ids in lists for t in ids}
    if len(tokens) > 1:
        raise UserError(f"{folder}: trainable_token_indices names {len(tokens)} tokens; only one is implemented.")
    rows = [name for name in flat if name.endswith("token_row")]
    if bool(rows) != bool(tokens) or any(not 0 <= t < config.vocab for t in tokens):
        raise UserError(f"{folder}: trainable_token_indices={indices!r} does not fit the rows that the adapter holds.")
    targets = tuple(t for t, (module, _) in lora.TARGETS.items() if f"{module}/lora_a" in flat)
    token = next(iter(tokens), -1)  # -1: none, and no row for it
    return dataclasses.replace(
        config, lora=Lora(rank, alpha, float(described.get("lora_dropout") or 0), targets, token)
    )
