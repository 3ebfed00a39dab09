"""SIGTERM and Ctrl-C: the step is finished and saved, the exit is 75, and the run goes on as if nothing had been."""

import json
import os
import signal

import pytest

from r3jax import loop, train
from r3jax.run import stop as stopping
from tests import fixtures

STEPS = 6


class Trained(BaseException):
    """Stands for the evaluation at the end, which is not looked at here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    fixtures.write_dataset(folder / "data", thoughts=True)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Trains stage 1 in a folder; a signal comes with the nth call of a function of the loop. Gives the exit code."""

    def trained(*_):
        raise Trained

    monkeypatch.setattr(train, "compare", trained)

    def go(name: str, what: str = "", nth: int = 0, number: int = signal.SIGTERM):
        few = {"sft__steps": STEPS, "sft__kl_weight": 0.0, "evaluate__every": 3, "checkpoint__every": 100}
        calls = 0
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Trained, SystemExit)) as end:
            if what:
                real = getattr(loop, what)

                def struck(*args):
                    nonlocal calls
                    calls += 1
                    if calls == nth:
                        os.kill(os.getpid(), number)
                    return real(*args)

                patch.setattr(loop, what, struck)
            train.main([*fixtures.flags(folder, "sft", **few), f"--workdir={folder / name}"])
        return getattr(end.value, "code", None)

    return go


def left(run) -> tuple:
    """What a run has left: its figures without times, its ledger, its last checkpoint's description of every leaf."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in x.items() if not k.startswith("time") and k != "tokens_per_second"} for x in lines]
    meta = json.loads((run / "checkpoints" / "sft" / str(STEPS) / "meta" / "metadata").read_text())["text"]
    content = json.loads(meta)
    return figures, (run / "ledger.jsonl").read_text(), content["leaves"], content["score"]


def steps(run) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints" / "sft").iterdir() if p.name.isdigit())


def test_a_stopped_run_equals_one_that_was_not(run, folder, capfd):
    assert run("whole") is None
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    # `report` of step 1 is called while step 2 is computed; step 3 is validated.
    for name, what, nth, number, at in (
        ("early", "report", 1, signal.SIGINT, 2),
        ("validating", "validate", 1, signal.SIGTERM, 3),
    ):
        assert run(name, what, nth, number) == 75
        assert steps(folder / name)[-1] == at
        assert "stopped; the same command goes on from here" in capfd.readouterr().err
        assert run(name) is None
        assert left(folder / name) == left(folder / "whole"), name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(stopping.os, "_exit", end)
    with stopping.Stop() as stop, pytest.raises(Ended, match="130"):
        stop.stepping = True
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            assert not stop.due() or stop.asked
            os.kill(os.getpid(), number)
    assert "stopping after this step" in capfd.readouterr().err


def test_between_stages_it_ends_at_once():
    with stopping.Stop(), pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 75
