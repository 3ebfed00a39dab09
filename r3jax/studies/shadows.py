"""Refresh policies side by side on one training run: shadow environments that score the very same rollouts.

The run itself re-encodes the whole corpus at every step, so the fresh vectors of all documents are at hand, and a
shadow's "encoder" is a look-up in them: any number of policies and budgets costs searches and no encoding. A shadow
lacks the feedback of training on its own rewards; runs that have it are trained beside (`r3jax.studies.refresh`).

Axes: T steps, S shadows, R rollouts, N documents.
"""

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from r3jax.errors import UserError
from r3jax.rl.environment import Encode, Environment, RefreshConfig, Rollouts
from r3jax.search.index import VersionedIndex

BUDGETS = (0.0, 0.003, 0.01, 0.03, 0.1, 1.0)  # shares of the corpus per step
FOLLOWING = ("round_robin", "neighbourhood", "boundary", "hybrid")  # policies that a budget makes a difference to


@dataclasses.dataclass(frozen=True)
class Cell:
    """A policy with a budget, as a share of the corpus per step."""

    policy: str
    budget: float
    carry: bool = True  # whether stale vectors are carried along

    @property
    def name(self) -> str:
        return self.policy if self.carry or not self.budget else f"{self.policy}, not carried"


def grid(own: Cell) -> list[Cell]:
    """All cells of the study, the config's own (of a policy in FOLLOWING) among them. A budget of 0 is `none`.

    All carry as `own` does, and its policy is there also with the opposite.
    """
    budgets = sorted({*BUDGETS, own.budget} - {0.0})
    cells = [Cell("none", 0.0)] + [Cell(name, share, own.carry) for name in FOLLOWING for share in budgets]
    return cells + [Cell(own.policy, share, not own.carry) for share in budgets]


class Shadowed:
    """An environment whose policy is `full`, followed by shadows; takes an `Environment`'s place in stage 2.

    After the last step the rewards are in `file`, an npz: `rewards` [T, 1 + S, R], those of the run first, and
    `reencoded` [T, S], documents per step.
    """

    def __init__(self, real: Environment, cells: list[Cell], *, steps: int, rollouts: int, file: pathlib.Path):
        if real.refresh.policy != "full":
            raise ValueError(f"real must have the policy full, not {real.refresh.policy!r}: its vectors are the truth")
        self._real, self._file, self._steps = real, file, steps
        self._shadows = [self._shadow(cell) for cell in cells]
        # As long as the run from the start: a checkpoint cannot hold an empty array.
        self._rewards = np.full((steps, 1 + len(cells), rollouts), np.nan, np.float32)
        self._reencoded = np.zeros((steps, len(cells)), np.int64)

    def _shadow(self, cell: Cell) -> Environment:
        real = self._real
        budget = int(cell.budget * len(real.index))
        refresh: RefreshConfig = dataclasses.replace(real.refresh, policy=cell.policy, budget=budget, carry=cell.carry)
        index = VersionedIndex.build(self._vectors(), 0, "exact")
        return Environment(index, real.reward_config, refresh, probes=0, seed=0)

    def _vectors(self) -> np.ndarray:
        if not isinstance(self._real.index, VersionedIndex):
            raise UserError("a study looks at all vectors of its index; start one process.")
        return self._real.index.vectors

    @property
    def terms(self) -> dict[str, np.ndarray]:
        return self._real.terms

    def score(
        self, rollouts: Rollouts, encode: Encode, step: int, rounds: int = 1
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `Environment.score`; the shadows' rewards are kept, not returned."""
        rewards, stats = self._real.score(rollouts, encode, step, rounds)
        start = time.perf_counter()
        fresh = self._vectors()
        self._rewards[step - 1, 0] = rewards
        for i, shadow in enumerate(self._shadows):
            self._rewards[step - 1, 1 + i], own = shadow.score(rollouts, fresh.__getitem__, step)
            self._reencoded[step - 1, i] = own["index/reencoded"]
        if step == self._steps:
            np.savez(self._file, rewards=self._rewards, reencoded=self._reencoded)
        return rewards, stats | {"time/shadows": time.perf_counter() - start}

    def hard_negatives(self, known: np.ndarray, group: int, count: int) -> np.ndarray:
        return self._real.hard_negatives(known, group, count)

    def probe(self, rollouts: Rollouts, rewards: np.ndarray, vectors: np.ndarray) -> dict[str, float]:
        return self._real.probe(rollouts, rewards, vectors)

    def state(self) -> dict[str, Any]:
        """The run's state, every shadow's and what was seen so far: a run that is stopped goes on with all of it."""
        return {
            "real": self._real.state(),
            "shadows": {f"{i:03}": shadow.state() for i, shadow in enumerate(self._shadows)},
            "rewards": self._rewards.copy(),
            "reencoded": self._reencoded.copy(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` returned."""
        self._real.restore(state["real"])
        for i, shadow in enumerate(self._shadows):
            shadow.restore(state["shadows"][f"{i:03}"])
        self._rewards, self._reencoded = np.array(state["rewards"]), np.array(state["reencoded"])
