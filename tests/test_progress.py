"""What a user is told while work takes long: nothing at first."""

import time

import pytest

from r3jax.run import progress


@pytest.mark.parametrize("silent, said", [(0.01, "building …\n"), (60.0, "")])
def test_waiting_says_so_once_it_takes_long(capfd, monkeypatch, silent, said):
    monkeypatch.setattr(progress, "SILENT_SECONDS", silent)
    with progress.waiting("building"):
        time.sleep(0.3)
    assert capfd.readouterr().err == said


def test_waiting_ends_with_the_work(monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 60.0)
    with pytest.raises(ValueError, match="of the work"), progress.waiting("building"):
        raise ValueError("of the work")
