"""A Hugging Face folder's config.json: the sizes it gives our decoder, and one that gives them back.

Whatever it asks for that the decoder does not implement is refused by name. Keys: transformers' Qwen2Config, both as
published with Qwen-2.5 ("rope_theta") and as transformers 5 writes them ("rope_parameters").
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from r3jax.errors import UserError
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.rope import FAST, SLOW, sharpening

NAME = "config.json"
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model")
MAX_POSITIONS = 32768  # where config.json does not say; rotary positions have no limit of their own
YARN_LENGTH = "original_max_position_embeddings"
# ModelConfig's field: config.json's key, for what both call a whole number
SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """ModelConfig's sizes by field: all of it but compute_dtype, param_dtype and remat.

    Raises UserError for a folder without a config.json, a malformed one, and one that asks for something which the
    decoder does not implement.
    """
    path = folder / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {NAME}; give a folder with a Qwen-2.5 checkpoint.") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a model's config; fetch it again.")
    try:
        _check_supported(raw)
        sizes: dict[str, Any] = {field: _whole(raw.get(key), key) for field, key in SIZES.items()}
        if sizes["heads"] % sizes["kv_heads"]:
            raise UserError(f'"{SIZES["heads"]}" is no multiple of "{SIZES["kv_heads"]}"')
        sizes["head_dim"] = _head_dim(raw, sizes)
        sizes["norm_eps"] = _positive(raw.get("rms_norm_eps"), "rms_norm_eps")
        sizes["tied"] = _flag(raw.get("tie_word_embeddings", False), "tie_word_embeddings")  # Qwen2Config's default
        sizes["max_positions"] = _longest(raw)
        return sizes | rope_of(raw)
    except UserError as e:
        raise UserError(f"{path}: {e}; give a Qwen-2.5 checkpoint.") from None


def read_dtype(folder: pathlib.Path) -> str:
    """What holds the weights of a folder, whose config.json `read_config` has read, without loss."""
    raw = json.loads((folder / NAME).read_text(encoding="utf-8"))
    dtype = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5's key, and 4's
    # float16 has three bits of mantissa more than bfloat16, and its numbers are all in float32.
    return "bfloat16" if dtype == "bfloat16" else "float32"


def to_config(model: ModelConfig, *, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The config.json of our decoder, in the form published with Qwen-2.5, which transformers 4 and 5 read."""
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "torch_dtype": model.param_dtype,
        "use_cache": True,
        "use_sliding_window": False,
    }
    raw |= {key: getattr(model, field) for field, key in SIZES.items()}
    raw |= rope_keys(model.rope_theta, model.rope_factor, model.rope_original_length)
    if model.head_dim * model.heads != model.width:
        raw["head_dim"] = model.head_dim
    return raw


def _check_supported(raw: Mapping[str, Any]) -> None:
    """Raises UserError for the first thing that our decoder does not do."""
    named = raw.get("architectures") or ([ARCHITECTURES[0]] if raw.get("model_type") == "qwen2" else ["unknown"])
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise UserError(f"the architecture {named} is not implemented, only {' and '.join(ARCHITECTURES)}")
    refused = {
        "use_sliding_window": (False, "a sliding window"),
        "hidden_act": ("silu", "an activation other than silu"),
        "attention_bias": (True, "attention without bias on q, k and v"),
        "qkv_bias": (True, "attention without bias on q, k and v"),
        "o_bias": (False, "a bias on the output projection"),
        "mlp_bias": (False, "a bias in the MLP"),
        "quantization_config": (None, "quantised weights"),
        "is_causal": (True, "attention that sees what comes later"),
        "use_mrope": (False, "rotary positions of several axes"),
        "partial_rotary_factor": (1.0, "turning a part of a head"),
        "dual_chunk_attention_config": (None, "attention in chunks"),
        "auto_map": (None, "a decoder with code of its own"),
    }
    for key, (only, what) in refused.items():
        if raw.get(key, only) != only:
            raise UserError(f'{what} ("{key}") is not implemented')
    types = raw.get("layer_types") or []
    if not isinstance(types, list):
        raise UserError(f'"layer_types" must be a list, not {types!r}')
    if other := [x for x in types if x != "full_attention"]:
        raise UserError(f'{other[0]} ("layer_types") is not implemented')


def rope_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's rope fields from a config.json in the form of transformers 4 or 5: those it names.

    Raises UserError, which names it, for a kind of scaling other than YaRN or a setting of YaRN that Qwen-2.5 leaves
    at its default. `rope_keys` is the inverse.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # of both transformers takes the first too
    written = raw.get(key) or {}
    if not isinstance(written, dict):
        raise UserError(f'"{key}" is not a group of values')
    given = {name: value for name, value in written.items() if value is not None}
    kinds = {repr(given.pop(name)) for name in ("rope_type", "type") if name in given}  # some files write both names
    theta = given.pop("rope_theta", raw.get("rope_theta", 10000.0))  # transformers' own default
    fields: dict[str, Any] = {"rope_theta": _positive(theta, "rope_theta")}
    known: dict[str, float] = {"partial_rotary_factor": 1.0}
    if kinds == {repr("yarn")}:
        longest = _longest(raw)
        original = _whole(given.pop(YARN_LENGTH, longest), YARN_LENGTH)
        factor = _positive(given.pop("factor", longest / original), "factor")
        if factor < 1:
            raise UserError(f"YaRN's factor is {factor}, it must be at least 1")
        fields |= {"rope_factor": factor, "rope_original_length": original}
        known |= {"beta_fast": FAST, "beta_slow": SLOW, "attention_factor": sharpening(factor), "truncate": True}
    elif kinds - {repr("default")}:
        raise UserError(
            f"the rope scaling {' and '.join(sorted(kinds))} is not implemented, only 'default' and 'yarn' are"
        )
    for name, value in given.items():
        if not isinstance(value, int | float) or not math.isclose(value, known.get(name, math.nan), rel_tol=1e-6):
            raise UserError(f"a rope scaling with {name}={value!r} is not implemented")
    return fields


def rope_keys(theta: float, factor: float, original_length: int) -> dict[str, Any]:
    """The keys that `rope_of` reads, as Qwen-2.5 documents them."""
    if factor == 1:
        return {"rope_theta": theta}
    scaling = {"type": "yarn", "factor": factor, YARN_LENGTH: original_length}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _longest(raw: Mapping[str, Any]) -> int:
    return _whole(raw.get("max_position_embeddings", MAX_POSITIONS), "max_position_embeddings")


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f'"{key}" must be a whole number above 0, not {value!r}')
    return value


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f'"{key}" must be a number above 0, not {value!r}')
    return float(value)


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f'"{key}" must be true or false, not {value!r}')
    return value


def _head_dim(raw: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if raw.get("head_dim") is not None:
        size = _whole(raw["head_dim"], "head_dim")
    elif sizes["width"] % sizes["heads"]:
        raise UserError('"hidden_size" is no multiple of "num_attention_heads", and there is no "head_dim"')
    else:
        size = sizes["width"] // sizes["heads"]
    if size % 2:
        raise UserError(f"a head dim of {size} is odd, and rotary positions turn pairs")
    return size
