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
from r3jax.model.rope import rope_keys, rope_of

NAME = "config.json"
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model")
MAX_POSITIONS = 32768  # of Qwen-2.5; rotary positions have no limit of their own
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
        sizes: dict[str, Any] = {field: _whole(raw, key) for field, key in SIZES.items()}
        if sizes["heads"] % sizes["kv_heads"]:
            raise UserError(f'"{SIZES["heads"]}" is no multiple of "{SIZES["kv_heads"]}"')
        sizes["head_dim"] = _head_dim(raw, sizes)
        sizes["norm_eps"] = _positive(raw, "rms_norm_eps")
        sizes["tied"] = bool(raw.get("tie_word_embeddings", False))  # as Qwen2Config's own default
        return sizes | rope_of(raw)
    except UserError as e:
        raise UserError(f"{path}: {e}; give a Qwen-2.5 checkpoint.") from None


def read_dtype(folder: pathlib.Path) -> str:
    """What the weights of a folder whose config.json `read_config` has read are stored in."""
    raw = json.loads((folder / NAME).read_text(encoding="utf-8"))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"  # transformers 5's key, and 4's
    return "bfloat16" if dtype in ("bfloat16", "float16") else "float32"


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
        "max_position_embeddings": MAX_POSITIONS,
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
    }
    for key, (only, what) in refused.items():
        if raw.get(key, only) != only:
            raise UserError(f'{what} ("{key}") is not implemented')
    types = raw.get("layer_types") or []
    if other := [x for x in types if x != "full_attention"]:
        raise UserError(f'{other[0]} ("layer_types") is not implemented')


def _whole(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f'"{key}" must be a whole number above 0, not {value!r}')
    return value


def _positive(raw: Mapping[str, Any], key: str) -> float:
    value = raw.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f'"{key}" must be a number above 0, not {value!r}')
    return float(value)


def _head_dim(raw: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if raw.get("head_dim") is not None:
        size = _whole(raw, "head_dim")
    elif sizes["width"] % sizes["heads"]:
        raise UserError('"hidden_size" is no multiple of "num_attention_heads", and there is no "head_dim"')
    else:
        size = sizes["width"] // sizes["heads"]
    if size % 2:
        raise UserError(f"a head dim of {size} is odd, and rotary positions turn pairs")
    return size
