"""Several processes train as one does: the same figures, and a checkpoint of one goes on with the others.

Real processes, that find each other as launch/local.sh tells them to, with gloo between their CPUs.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from r3jax import processes
from r3jax.errors import UserError
from tests.fixtures import ROOT, flags, write_dataset

# No validation between, and one split, so that little is compiled.
SHORT = {
    "sft__steps": 4,
    "rl__steps": 3,
    "checkpoint__every": 2,
    "evaluate__every": 0,
    "evaluate__thoughts": 0,
    "data__eval_splits": "unseen",
}
# Where rounding meets a step: a rank or a token changes at once. Others agree in fp32.
TIMES = ("time", "seconds", "tokens_per_second")


def start(folder, count: int, devices: int, run: str, **changes) -> list[subprocess.Popen]:
    """Starts `r3jax.train` as `count` processes of so many fake devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}
    # Kept programs are found by process 0 alone, which would then be half a minute ahead: too far for gloo.
    cache = {"xla_cache": folder / "no-cache"} if count > 1 else {}
    argv = [sys.executable, "-m", "r3jax.train", *flags(folder, **SHORT | cache | changes), f"--workdir={folder / run}"]
    found = []
    for rank in range(count):
        told = dict(zip(processes.VARIABLES, (address, str(count), str(rank)), strict=True)) if count > 1 else {}
        found.append(
            subprocess.Popen(argv, env=env | told, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    return found


def finish(job: list[subprocess.Popen], code: int = 0) -> None:
    said = [process.communicate(timeout=1500)[1][-3000:] for process in job]
    assert [process.returncode for process in job] == [code] * len(job), "\n".join(said)


def figures(folder, run: str) -> tuple[dict, dict, list]:
    """Metrics by stage, step and name; results by split, condition and name; the ledger."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    metrics = {(x["stage"], x["step"], name): x[name] for x in lines for name in x if not name.startswith(TIMES)}
    results = json.loads((folder / run / "results.json").read_text())["splits"]
    scores = {(s, c, name): v for s, by in results.items() for c, x in by.items() for name, v in x.items()}
    ledger = [json.loads(line) for line in (folder / run / "ledger.jsonl").read_text().splitlines()]
    return metrics, {k: v for k, v in scores.items() if k[2] != "ms_per_query"}, ledger


def close(folder, run: str, other: str) -> None:
    for found, want in zip(figures(folder, run)[:2], figures(folder, other)[:2], strict=True):
        assert found.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, str | None.__class__):
                assert found[name] == value
            else:
                np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5, err_msg=str(name))
    assert figures(folder, run)[2] == figures(folder, other)[2]


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_of_eight_and_one_of_one(tmp_path):
    write_dataset(tmp_path / "data")
    for run, count, devices in (("one", 1, 1), ("eight", 1, 8), ("two-by-four", 2, 4)):
        finish(start(tmp_path, count, devices, run))
    close(tmp_path, "eight", "one")
    close(tmp_path, "two-by-four", "one")
    # What one began, the others finish: from the checkpoint at step 2 of stage 2, and from one in stage 1.
    for run, began, count, devices in (("two-from-one", "one", 2, 4), ("one-from-two", "two-by-four", 1, 1)):
        shutil.copytree(tmp_path / began, tmp_path / run)
        shutil.rmtree(tmp_path / run / "checkpoints" / "rl" / "3")
        (tmp_path / run / "results.json").unlink()
        finish(start(tmp_path, count, devices, run))
        close(tmp_path, run, "one")


def test_the_environment_names_all_three_or_none(monkeypatch):
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    processes.connect()  # alone
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="sets JAX_NUM_PROCESSES but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        processes.connect()
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "n1:8476")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=2 must be .* below JAX_NUM_PROCESSES=2"):
        processes.connect()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "n1")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=n1 must be the host and port"):
        processes.connect()


def test_one_process_gathers_from_itself_bit_for_bit():
    for x in (np.array([2**40, -1]), np.array(1.5), np.zeros((0, 3), np.uint8), np.array([[True, False]])):
        found = processes.gather(x)
        assert found.dtype == x.dtype and found.shape == (1, *x.shape) and (found[0] == x).all()
    assert processes.in_turn(lambda first: first) is True and processes.leads()
