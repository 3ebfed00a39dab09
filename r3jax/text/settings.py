"""What a published checkpoint needs to be read as it was trained: its prompts and the lengths of its texts.

transformers has no place for them, so an exported folder keeps them in r3jax.json.
"""

import dataclasses
import json
import pathlib

from r3jax.errors import UserError
from r3jax.text.prompts import Prompts

NAME = "r3jax.json"
LIMITS = ("max_query_tokens", "max_doc_tokens", "max_thought_tokens")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prompts, and the limits in ids of the text alone, without the chat around it."""

    prompts: Prompts
    max_query_tokens: int
    max_doc_tokens: int
    max_thought_tokens: int

    def write(self, folder: pathlib.Path) -> None:
        """Writes folder/r3jax.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: pathlib.Path) -> Settings | None:
    """The settings in a folder; None without r3jax.json, UserError for a malformed one."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**raw | {"prompts": Prompts(**raw["prompts"])})
        limits = (settings.max_query_tokens, settings.max_doc_tokens, settings.max_thought_tokens)
        fits = all(isinstance(x, int) and x > 0 for x in limits)
        fits = fits and all(isinstance(x, str) for x in dataclasses.astuple(settings.prompts))
    except (ValueError, TypeError, LookupError):
        fits = False
    if not fits:
        raise UserError(f"{path} does not hold prompts and lengths as r3jax writes them; export the run again.")
    return settings
