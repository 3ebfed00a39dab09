"""What vectors depend on besides their text; vectors with another identity are never mixed."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from r3jax.model.params import flatten
from r3jax.reader import Reader


def identity(params, reader: Reader, max_length: int) -> dict[str, Any]:
    """What the vectors of documents depend on, of at most `max_length` tokens."""
    prompts = reader.chat.prompts
    return {
        "model": fingerprint(params, reader),
        "system": prompts.direct_system,
        "answer": prompts.direct_assistant,
        "max_length": max_length,
        "compute_dtype": reader.model.compute_dtype,
    }


def fingerprint(params, reader: Reader) -> str:
    """sha256 (hex) over weights, sizes and tokenizer; a run and its export have the same where their dtypes are."""
    model = dataclasses.replace(reader.model, remat="none", attention="xla", max_positions=0, compute_dtype="")
    digest = hashlib.sha256(f"{model}\0".encode())
    digest.update(reader.chat.tokenizer.to_json().encode())
    for name, leaf in sorted(flatten(params).items()):
        digest.update(f"\0{name}\0{leaf.shape}\0{leaf.dtype}\0".encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    return digest.hexdigest()
