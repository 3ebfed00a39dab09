"""However a run with data workers ends, its workers end too."""

import os
import signal
import time

import pytest

from tests import fixtures

pytestmark = pytest.mark.slow


def start(folder, **changes):
    """A run of its own group, with two workers."""
    fixtures.write_dataset(folder / "data", thoughts=True)
    flags = fixtures.flags(folder, "sft", sft__steps=10_000, data__workers=2, evaluate__every=0, **changes)
    return fixtures.run_python("-m", "r3jax.train", *flags, f"--workdir={folder / 'run'}", start_new_session=True)


def nobody_is_left(group: int) -> None:
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlives its run")


# To all of a group: a terminal's Ctrl-C, systemd's SIGTERM.
@pytest.mark.parametrize(
    "send, number, code",
    [
        (os.kill, signal.SIGTERM, 75),
        (os.killpg, signal.SIGTERM, 75),
        (os.killpg, signal.SIGINT, 75),
        (os.kill, signal.SIGKILL, -9),
    ],
)
def test_no_worker_is_left(tmp_path, send, number, code):
    process = start(tmp_path)
    ledger = tmp_path / "run" / "ledger.jsonl"
    while not (ledger.is_file() and ledger.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    send(process.pid, number)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == code and "Traceback" not in errors, errors
    nobody_is_left(process.pid)


def test_no_worker_holds_up_a_run_that_fails(tmp_path):
    process = start(tmp_path, sft__learning_rate=1e30)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 2 and "the run has diverged" in errors, errors
    nobody_is_left(process.pid)
