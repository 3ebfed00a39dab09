"""However a run with data workers ends, its workers end too."""

import os
import signal
import time

import pytest

from tests import fixtures

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_no_worker_is_left(tmp_path, number, code):
    fixtures.write_dataset(tmp_path / "data", thoughts=True)
    run = tmp_path / "run"
    flags = fixtures.flags(tmp_path, "sft", sft__steps=10_000, data__workers=2, evaluate__every=0)
    process = fixtures.run_python("-m", "r3jax.train", *flags, f"--workdir={run}", start_new_session=True)
    ledger = run / "ledger.jsonl"
    while not (ledger.is_file() and ledger.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to all
    else:
        process.send_signal(number)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == code and "Traceback" not in errors, errors
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlives its run")
