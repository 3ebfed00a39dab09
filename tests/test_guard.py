"""The collapse guard: when it counts, when it stops a run, and that a resumed run still knows."""

import json

import pytest

from r3jax import loop, train
from r3jax.errors import UserError
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.guard import CollapseGuard
from r3jax.weights import BEST_KEY
from tests import fixtures


def seen(guard: CollapseGuard, *validations: tuple[float, float]) -> list[bool]:
    """Whether it speaks of a collapse after each (nDCG, token rate)."""
    found = []
    for ndcg, rate in validations:
        guard.see({"ndcg@10/reasoning": ndcg, "token_rate": rate})
        found.append(guard.collapsed)
    return found


def test_only_low_ones_in_a_row_are_a_collapse():
    good, silent, lost = (0.4, 1.0), (0.4, 0.1), (0.1, 1.0)
    assert seen(CollapseGuard(2, 0.5, 0.5), good, silent, good, lost, good) == [False] * 5
    assert seen(CollapseGuard(2, 0.5, 0.5), good, silent, lost, good) == [False, False, True, False]
    assert not any(seen(CollapseGuard(0, 0.5, 0.5), silent, silent, lost, lost))
    assert not any(seen(CollapseGuard(1, 0.0, 0.0), silent, lost, (0.0, 0.0)))
    # The best so far counts, not the one before.
    assert seen(CollapseGuard(1, 0.5, 0.5), (0.4, 1), (0.3, 1), (0.21, 1), (0.19, 1)) == [False, False, False, True]


def test_stage_1_sets_the_standard_and_is_not_judged():
    guard = CollapseGuard(1, 0.5, 0.5)
    guard.see({"ndcg@10/reasoning": 0.4, "token_rate": 0.0}, judge=False)
    assert not guard.collapsed and seen(guard, (0.3, 1.0), (0.1, 1.0)) == [False, True]


def test_its_state_survives():
    guard, other = CollapseGuard(2, 0.5, 0.5), CollapseGuard(2, 0.5, 0.5)
    seen(guard, (0.4, 1.0), (0.1, 1.0))
    other.restore(json.loads(json.dumps(guard.state())))
    assert other == guard and seen(other, (0.1, 1.0)) == [True]
    with pytest.raises(UserError, match="collapsed by step 7 of rl: at 2 validations .* of its best, 0.400; training"):
        other.check(7)
    CollapseGuard(2, 0.5, 0.5).restore(None)


def test_a_run_stops_keeps_the_best_and_stays_stopped(tmp_path, monkeypatch):
    folder, _ = fixtures.finished_run()
    rates = iter((1.0, 0.2, 0.2, 1.0))

    def validate(params, parts):
        rate = next(rates)
        return {"ndcg@10/direct": 0.1, "ndcg@10/reasoning": 0.4 * rate, "thought_tokens": 3.0, "token_rate": rate}

    monkeypatch.setattr(loop, "validate", validate)
    argv = [*fixtures.flags(folder, init_from=folder / "run", rl__steps=5, evaluate__every=1, checkpoint__keep=1)]
    argv += [f"--workdir={tmp_path / 'run'}", "--config.evaluate.collapse.evaluations=2"]
    for _ in range(2):  # the second time before any step
        with pytest.raises(UserError, match="has collapsed by step 3 of rl: at 2 validations in a row"):
            train.main(argv)
    assert next(rates) == 1.0
    kept = Checkpointer(tmp_path / "run" / "checkpoints" / "rl", 1, best_key=BEST_KEY, read_only=True)
    assert (kept.best(), kept.latest()) == (1, 3)
    kept.close()
