"""When training need not go on: a policy that has collapsed, and steps without a finite loss or gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from r3jax.errors import UserError


@dataclasses.dataclass
class CollapseGuard:
    """Looks at each validation of stage 2; `best` and `low` are its state, which a checkpoint keeps.

    `best` may come from stage 1, so that a policy that never was any good is no standard for itself.

    Args:
      evaluations: so many low ones in a row are a collapse; 0: never.
      token_rate: an evaluation is low when fewer of its thoughts than this share end with the token,
      ndcg: or when its nDCG@10 with reasoning is under this share of the best so far.
    """

    evaluations: int
    token_rate: float
    ndcg: float
    best: float = 0.0
    low: int = 0

    def see(self, scores: Mapping[str, float], judge: bool = True) -> None:
        """Takes in one validation's `token_rate` and `ndcg@10/reasoning`; without `judge` it only learns `best`."""
        found = scores["ndcg@10/reasoning"]
        is_low = scores["token_rate"] < self.token_rate or found < self.ndcg * self.best
        self.low = self.low + 1 if is_low and judge else 0
        self.best = max(self.best, found)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"best": self.best, "low": self.low}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Takes back `state`; a checkpoint from before there was a guard has none."""
        if state:
            self.best, self.low = state["best"], state["low"]

    @property
    def collapsed(self) -> bool:
        """Whether the last `evaluations` validations were all low."""
        return 0 < self.evaluations <= self.low

    def check(self, step: int) -> None:
        """Raises UserError if the policy has collapsed."""
        if self.collapsed:
            raise UserError(
                f"the policy has collapsed by step {step} of rl: at {self.low} validations in a row fewer thoughts "
                f"than config.evaluate.collapse.token_rate={self.token_rate:g} ended with the token, or nDCG@10 was "
                f"under config.evaluate.collapse.ndcg={self.ndcg:g} of its best, {self.best:.3f}; training stopped and "
                "the best checkpoint is kept, for python -m r3jax.evaluate; begin anew with a lower rl.learning_rate "
                "or a larger rl.kl_weight, or set config.evaluate.collapse.evaluations=0 to go on."
            )


SKIPS = 5  # updates skipped in a row that end a run


@dataclasses.dataclass
class SkipGuard:
    """Counts updates that were skipped because their loss or gradient was not finite; checkpoints keep `row`."""

    row: int = 0  # in a row, until now

    def see(self, stage: str, step: int, skipped: bool) -> None:
        """Takes in one step; raises UserError after `SKIPS` in a row."""
        self.row = self.row + 1 if skipped else 0
        if self.row == SKIPS:
            raise UserError(
                f"the last {SKIPS} steps up to step {step} of {stage} had no finite loss or gradient: the run has "
                "diverged; training stopped and the checkpoints are kept; lower "
                f"config.{stage}.learning_rate and name another --workdir, or go on from the last checkpoint with "
                f"--accept={stage}.learning_rate."
            )
