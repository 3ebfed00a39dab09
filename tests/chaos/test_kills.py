"""Runs that are killed, or asked to stop, at random moments, and go on: they end as if nothing had been."""

import os
import random
import time

import pytest

from tests import fixtures
from tests.chaos import runs

pytestmark = pytest.mark.slow
GRACE = 10.0  # seconds to save and exit in, after the step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set, and a run on it that nobody stopped."""
    folder = tmp_path_factory.mktemp("chaos")
    fixtures.write_dataset(folder / "data")
    runs.finish(folder, folder / "whole")
    return folder


@pytest.mark.parametrize("number, code, times", [("SIGKILL", -9, 50), ("SIGTERM", 75, 20)])
def test_stopped_runs_equal_the_whole_one(whole, tmp_path, number, code, times):
    times = int(os.environ.get("STRIKES", times))  # fewer, to try this test itself
    moment, done, attempt, fresh = random.Random(number), 0, 0, True
    while done < times or not fresh:
        run = tmp_path / str(attempt)
        if done < times:
            begin = time.monotonic()
            got, when, took, errors = runs.struck(whole, run, moment, number)
            print(
                f"{number} {done}: exit {got}, {when}, {time.monotonic() - begin:.0f} s, the end {took:.1f}", flush=True
            )
            assert got != code or took <= GRACE, (when, errors)
        else:
            got, errors = 0, runs.finish(whole, run) and ""
        assert got in (0, code), errors
        if got == code:
            done, fresh = done + 1, False
            continue
        if not fresh:  # it came to its end, after some strikes
            runs.same(whole, run, whole / "whole")
        attempt, fresh = attempt + 1, True
