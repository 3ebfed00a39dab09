"""The collapse guard: when it counts, when it stops a run, and that a resumed run still knows."""

import json

import pytest

from r3jax import train
from r3jax.errors import UserError
from r3jax.run.guard import CollapseGuard
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


def test_its_state_survives():
    guard, other = CollapseGuard(2, 0.5, 0.5), CollapseGuard(2, 0.5, 0.5)
    seen(guard, (0.4, 1.0), (0.1, 1.0))
    other.restore(json.loads(json.dumps(guard.state())))
    assert other == guard and seen(other, (0.1, 1.0)) == [True]
    with pytest.raises(UserError, match="collapsed by step 7 of rl: at 2 validations .* of its best, 0.400; training"):
        other.check(7)
    CollapseGuard(2, 0.5, 0.5).restore(None)


def test_a_run_stops_and_stays_stopped(tmp_path):
    folder, _ = fixtures.finished_run()
    more = {"rl__steps": 3, "evaluate__every": 1, "evaluate__collapse__token_rate": 1.0}
    argv = [*fixtures.flags(folder, init_from=folder / "run", **more), f"--workdir={tmp_path / 'run'}"]
    for _ in range(2):  # the second time before any step
        with pytest.raises(UserError, match="has collapsed by step 2 of rl: at 2 validations in a row"):
            train.main([*argv, "--config.evaluate.collapse.evaluations=2"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2 and max(row.get("eval/token_rate") or 0 for row in rows) < 1
    assert any((tmp_path / "run" / "checkpoints" / "rl").glob("2"))
