"""Does the command that goes on with a run bring what the run was begun with? Config, data set and code.

A difference is named and refused: the run would be neither the old one nor the new. Who means it says so with
--accept, by the names given here: "data", "code", or a field of the config, `rl.steps` for one (more steps are another
schedule of the learning rate from here on, so they are no exception).
"""

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import pathlib
from collections.abc import Collection, Mapping

from ml_collections import ConfigDict

import r3jax
from r3jax.errors import UserError
from r3jax.rl import mix
from r3jax.rl.rewards import REWARDS
from r3jax.run import config as run_config

LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "grain", "scann")  # whose arithmetic or order a step follows
FLAG = {"accept": "on resumption, what may differ: data, code, or fields of the config, by commas"}
# What may always differ: it changes no weight and no figure.
# model.max_positions: nothing uses it, and runs from before it was kept have none.
FREE = (
    "name",
    "log.",
    "checkpoint.",
    "processes.",
    "xla_cache",
    "data.cache",
    "evaluate.max_ability_kl",
    "evaluate.collapse.",
    "model.max_positions",
)


def accepted(text: str | None, config: ConfigDict) -> frozenset[str]:
    """What --accept names; UserError for a name that is none."""
    names = frozenset(name.strip().removeprefix("config.") for name in (text or "").split(",")) - {""}
    known = ["data", "code", *dict(run_config.leaves(config))]
    for name in sorted(names - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--accept: there is no {name!r}{hint}; name data, code or a field of the config.")
    return names


def refuse_config(workdir: pathlib.Path, began: ConfigDict, now: ConfigDict, accept: Collection[str]) -> None:
    """UserError where a run's config differs in a field that is neither free nor accepted."""
    old, new = dict(run_config.leaves(began)), dict(run_config.leaves(now))
    changed = [key for key in sorted(new) if old.get(key) != new[key]]  # what is no more cannot be set
    changed = [key for key in changed if not key.startswith(FREE) and key not in accept]
    if changed:
        words = ", ".join(f"config.{key}={old.get(key)!r}, not {new.get(key)!r}" for key in changed)
        raise UserError(
            f"--workdir: {workdir} holds a run with {words}; name another --workdir or remove that folder, or go on "
            f"all the same with --accept={','.join([*sorted(accept), *changed])}."
        )


@functools.cache
def code(reward: str = "") -> dict[str, str]:
    """The versions that a step's bits depend on, and hashes: of this package's own files, and of those of `reward`.

    reward: `config.rl.reward.name`, in which functions of the user's may be named.
    """
    source, root = hashlib.sha256(), pathlib.Path(r3jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        source.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    found = {"r3jax": r3jax.__version__, "r3jax's files": source.hexdigest()[:12]}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    for name in set(mix.parse(reward) if reward else ()) - set(REWARDS):
        if where := getattr(importlib.import_module(name.rpartition(".")[0]), "__file__", None):
            found[f"{name}'s file"] = hashlib.sha256(pathlib.Path(where).read_bytes()).hexdigest()[:12]
    return found


def refuse_data(path: str, began: str, now: str, accept: Collection[str]) -> None:
    """UserError where a data set's hash differs."""
    if began != now and "data" not in accept:
        raise UserError(
            f"config.data.path: {path} has changed since this run began; put the old files back or name another "
            "--workdir, or go on all the same with --accept=data."
        )


def refuse_code(began: Mapping[str, str] | None, now: Mapping[str, str], accept: Collection[str]) -> None:
    """UserError where a run was begun by other `code`; what a run has not kept, for it is older, is believed."""
    old = began or {}
    changed = [f"{what} {old[what]}, now {now[what]}" for what in now if what in old and old[what] != now[what]]
    if changed and "code" not in accept:
        raise UserError(
            f"--workdir: the run was trained with {'; '.join(changed)}; its steps may come out otherwise: put the old "
            "code back or name another --workdir, or go on all the same with --accept=code."
        )
