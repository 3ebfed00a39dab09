"""Small JSON files that say what lies beside them; written whole or not at all."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from r3jax.errors import UserError

NAMES = {"data": "other data", "model": "another model", "system": "another prompt", "answer": "another fixed answer"}


def read(path: pathlib.Path) -> dict[str, Any]:
    """ValueError for a file that holds no JSON object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, also where the machine fails."""
    part = path.with_name(f".{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def refuse_to_mix(where: str, old: Mapping[str, Any], new: Mapping[str, Any], fix: str) -> None:
    """Raises UserError for the first field of `new` in which `old` differs."""
    for name, value in new.items():
        if old.get(name) != value:
            kind = NAMES.get(name, f"{name}={old.get(name)!r}, not {value!r}")
            raise UserError(f"{where} was encoded with {kind}; {fix}.")
