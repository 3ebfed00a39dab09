"""The collapse guard: when it counts, when it stops a run, and that a resumed run still knows."""

import json

import jax
import numpy as np
import pytest

from r3jax import assembly, loop, train
from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.guard import SKIPS, CollapseGuard, SkipGuard
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


def test_skipped_steps_in_a_row_end_a_run():
    guard = SkipGuard()
    for step, skipped in enumerate([True] * (SKIPS - 1) + [False] + [True] * (SKIPS - 1)):
        guard.see("sft", step, skipped)
    assert guard.row == SKIPS - 1
    with pytest.raises(UserError, match=f"the last {SKIPS} steps up to step 20 of sft had no finite loss or gradient"):
        guard.see("sft", 20, True)


def test_a_run_that_skips_says_which_queries_and_stops_at_its_last_checkpoint(tmp_path, capsys):
    """From step 3 on every loss is not finite; the checkpoint of step 4 is as good as that of step 2."""

    def poisoned(name, parts, start):
        stage = assembly.make_stage(name, parts, start)
        update = stage.update

        def skip(state, batch):
            if int(jax.device_get(state.step)) < 2:
                return update(state, batch)
            metrics = {"loss": np.float32("nan"), "grad_norm": np.float32("inf"), "skipped": np.float32(1)}
            return state.replace(step=state.step + jax.device_put(1, state.step.sharding)), metrics

        stage.update = skip
        return stage

    fixtures.write_dataset(tmp_path / "data", thoughts=True)
    few = {"sft__steps": 20, "sft__kl_weight": 0.0, "evaluate__every": 0, "checkpoint__every": 2}
    argv = [*fixtures.flags(tmp_path, "sft", **few), f"--workdir={tmp_path / 'run'}"]
    for _ in range(2):  # a resumed run still knows how many there were
        with pytest.raises(UserError, match="up to step 7 of sft had no finite loss .* are kept; lower config.sft"):
            train.main(argv, poisoned)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in ledger if row.get("skipped")] == [3, 4, 5, 6, 7]
    told = "sft step 3 has no finite loss or gradient (nan, inf); its update is skipped; its batch: queries "
    ids = beir.load(tmp_path / "data").query_ids
    assert told + ", ".join(ids[row] for row in ledger[2]["rows"]) + "\n" in capsys.readouterr().out
    assert Checkpointer(tmp_path / "run" / "checkpoints" / "sft", 2, read_only=True).latest() == 6


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
