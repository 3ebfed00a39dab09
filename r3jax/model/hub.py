"""Checkpoints by name: a folder here, or what huggingface_hub fetches of `owner/name`: weights and JSON, no code."""

import pathlib
import re

from r3jax.errors import UserError

_PART = r"[A-Za-z0-9][\w.-]*"


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here may be one on the hub: `owner/name`."""
    return re.fullmatch(f"{_PART}/{_PART}", name) is not None


def local_folder(name: str, field: str = "config.init_from") -> pathlib.Path:
    """The folder of a checkpoint; one on the hub is fetched once and then kept in huggingface_hub's cache.

    Only safetensors and JSON at the top of the repository are fetched: no pickle, no code. `field` is what to call
    the name in the UserError for one that is neither here nor to be had.
    """
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    give = "give the folder of a run or of a Hugging Face checkpoint, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
    if not is_hub_id(name):
        raise UserError(f"{field} names {name!r}, which does not exist; {give}.")
    from huggingface_hub import snapshot_download  # takes half a second, and few need it

    try:
        found = snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"])
    except Exception as e:  # whatever the network makes of it
        raise UserError(
            f"{field} names {name!r}, which is no folder here and cannot be had from the Hugging Face hub "
            f"({_said(e)}); {give}."
        ) from None
    return pathlib.Path(found)


def _said(error: BaseException) -> str:
    """The first sentence of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200].rstrip(".")
