"""Which reward a config names: one, a weighted mix, or a function of the user's.

    dcg_scaled    ndcg:0.5,margin:0.5    my_package.my_module.reward    ndcg:1,my_package.my_module.reward:0.2

A user's function has the signature of `r3jax.rl.rewards`, is called with arrays of all rollouts [R, …] and the
exact ranks, and returns a number for each. Axis: R rollouts.
"""

import difflib
import importlib
import inspect
import math
import pathlib
import traceback
from collections.abc import Callable

import numpy as np

from r3jax.errors import UserError
from r3jax.rl.rewards import REWARDS

ON_NAN = ("stop", "drop")  # what becomes of a group with a reward that is not finite
LOGGED = ("retrieval", "format", "length", "overlong", "mean", "std", "dropped")  # as reward/…, whatever the mix


def parse(text: str) -> dict[str, float]:
    """{name: weight} of "NAME" (of weight 1) or "NAME:WEIGHT,NAME:WEIGHT"; ValueError, to follow the field's name."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = (word.strip() for word in part.partition(":"))
        dotted = "." in name and all(word.isidentifier() for word in name.split("."))
        if name not in REWARDS and not dotted:
            near = difflib.get_close_matches(name, REWARDS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"must be one of {', '.join(REWARDS)}, a mix such as ndcg:0.5,margin:0.5, or a function of yours as "
                f"package.module.function, not {name!r}{hint}"
            )
        if label(name) in map(label, mix):
            raise ValueError(f"names {label(name)} twice")
        if label(name) in LOGGED and "," in text:
            raise ValueError(f"names {name}, but {label(name)} is another figure of the logs; rename that function")
        if not colon and "," in text:
            raise ValueError(f"gives {name} no weight; in a mix each has one, as in ndcg:0.5,margin:0.5")
        try:
            mix[name] = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(f"gives {name} the weight {weight!r}, which is not a number") from None
        if not (math.isfinite(mix[name]) and mix[name] > 0):
            raise ValueError(f"gives {name} the weight {weight}, which must be above 0 and finite")
    return mix


def resolve(name: str) -> Callable[..., np.ndarray]:
    """The reward of REWARDS, or the user's at a dotted path; ValueError, to follow the field's name, if it is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as e:  # the module is the user's: whatever it raises is theirs to mend
        raise ValueError(f"names {name}, but {module} cannot be imported ({type(e).__name__}: {e})") from None
    if not callable(found):
        raise ValueError(f"names {name}, but {module} has no function {function}")
    try:
        inspect.signature(found).bind(*[None] * 4, k=None, size=None, ranks=None, emitted=None, gains=None)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"names {name}, which must take (rows, scores, relevant, positive_scores, "
            f"*, k, size, ranks, emitted, gains): {e}"
        ) from None
    return found


def label(name: str) -> str:
    """What a part is called in the logs: a function without its module."""
    return name.rpartition(".")[2]


class Retrieval:
    """The retrieval term that a text names; ValueError as of `parse` and `resolve`."""

    def __init__(self, text: str):
        self.weights = parse(text)
        self._rewards = {name: resolve(name) for name in self.weights}
        self.needs_ranks = any(name == "log_rank" or name not in REWARDS for name in self.weights)

    def __call__(
        self, rows, scores, relevant, positive_scores, *, k, size, ranks, emitted, gains
    ) -> dict[str, np.ndarray]:
        """{"retrieval": the weighted sum [R]}, and of a mix each part beside it, as `label` calls it.

        Not finite where a user's function is not; 0 for a rollout that did not emit the token. Raises UserError,
        which names the function, where one fails or does not return [R] numbers.
        """
        given = (rows, scores, relevant, positive_scores)
        named = {"k": k, "size": size, "ranks": ranks, "emitted": emitted, "gains": gains}
        total, parts = np.zeros(len(rows)), {}
        for name, reward in self._rewards.items():
            if name in REWARDS:
                value = reward(*given, **named)
            else:
                value = np.where(emitted, _of_the_user(name, reward, given, named), 0.0)
            parts[label(name)] = value
            total = total + self.weights[name] * value
        return {"retrieval": total} | (parts if len(parts) > 1 else {})


def _of_the_user(name: str, reward, given, named) -> np.ndarray:
    try:
        value = np.asarray(reward(*given, **named), np.float64)
    except Exception as e:  # in code of the user's
        where = traceback.extract_tb(e.__traceback__)[-1]
        raise UserError(
            f"config.rl.reward.name: {name} failed: {type(e).__name__}: {e} "
            f"({pathlib.Path(where.filename).name}:{where.lineno})."
        ) from None
    if value.shape != (len(given[0]),):
        raise UserError(
            f"config.rl.reward.name: {name} must return one number for each of the {len(given[0])} rollouts, "
            f"not an array of shape {value.shape}."
        )
    return value
