"""What a published checkpoint needs to be read as it was trained: its prompts and the lengths of its texts.

They are a key of their own in config.json: transformers and sentence-transformers keep what they do not know there
when they save a model, and drop files that they do not know.
"""

import dataclasses
import json
import pathlib

from r3jax.errors import UserError
from r3jax.text.prompts import Prompts

NAME = "config.json"
KEY = "r3jax"
LIMITS = ("max_query_tokens", "max_doc_tokens", "max_thought_tokens")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prompts, the limits in ids of the text alone, without the chat around it, and how the tokenizer reads a text.

    lowercase: whether in lower case, which tokenizer.json says too until transformers saves it.
    """

    prompts: Prompts
    max_query_tokens: int
    max_doc_tokens: int
    max_thought_tokens: int
    lowercase: bool = False

    def write(self, folder: pathlib.Path) -> None:
        """Adds the key to folder/config.json."""
        path = folder / NAME
        raw = json.loads(path.read_text(encoding="utf-8")) | {KEY: dataclasses.asdict(self)}
        path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: pathlib.Path) -> Settings | None:
    """The settings in a folder; None where config.json has no such key, UserError for a malformed one."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))[KEY]
    except (OSError, ValueError, TypeError, LookupError):
        return None  # no config.json, or one that is damaged: who reads the sizes says so
    try:
        settings = Settings(**raw | {"prompts": Prompts(**raw["prompts"])})
        limits = [getattr(settings, name) for name in LIMITS]
        fits = all(isinstance(x, int) and x > 0 for x in limits) and isinstance(settings.lowercase, bool)
        fits = fits and all(isinstance(x, str) for x in dataclasses.astuple(settings.prompts))
    except (ValueError, TypeError, LookupError):
        fits = False
    if not fits:
        raise UserError(
            f'{path}: "{KEY}" does not hold prompts and lengths as r3jax writes them; export the run again.'
        )
    return settings
