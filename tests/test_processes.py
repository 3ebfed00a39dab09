"""Several processes train as one does: the same figures, and a checkpoint of one goes on with the others.

Real processes, that find each other as launch/local.sh tells them to, with gloo between their CPUs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from r3jax import processes
from r3jax.errors import UserError
from r3jax.run.checkpoint import Checkpointer
from r3jax.search import sharded
from r3jax.search.index import VersionedIndex
from tests import two_hosts, xla
from tests.fixtures import ROOT, flags, write_dataset

# No validation between, and one split, so that little is compiled. Fewer steps of stage 1 leave documents that move
# less than rounding does, and rounding then chooses whom to encode anew.
SHORT = {
    "sft__steps": 12,
    "rl__steps": 3,
    "checkpoint__every": 2,
    "evaluate__every": 0,
    "evaluate__thoughts": 0,
    "data__eval_splits": "unseen",
}
TIMES = ("time", "seconds", "tokens_per_second")
# A document that is as urgent or as near as another but for rounding may be encoded in its place, or stand in its rank.
DISCRETE = ("index/age", "index/sigma", "index/probe", "probe/stale_recall")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def processes_of(argv: list[str], count: int, devices: int, last: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """Starts `python argv` as `count` processes of a job, of so many fake devices each; the last by another command."""
    address = free_address()
    env = os.environ | {"XLA_FLAGS": xla.flags(devices), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    found = []
    for rank in range(count):
        told = dict(zip(processes.VARIABLES, (address, str(count), str(rank)), strict=True)) if count > 1 else {}
        through = last if rank == count - 1 else ()
        found.append(subprocess.Popen([*through, sys.executable, *argv], env=env | told, cwd=ROOT, **pipes))
    return found


def train(folder, count: int, devices: int, run: str) -> None:
    """`r3jax.train` to its end."""
    argv = ["-m", "r3jax.train", *flags(folder, **SHORT), f"--workdir={folder / run}"]
    finish(processes_of(argv, count, devices))


def up(job: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """The job, each of whose processes has printed "up"."""
    for process in job:
        while (line := process.stdout.readline()) != "up\n":
            assert line
    return job


def finish(job: list[subprocess.Popen]) -> None:
    said = [process.communicate(timeout=1500)[0][-3000:] for process in job]
    assert [process.returncode for process in job] == [0] * len(job), "\n".join(said)


def figures(folder, run: str) -> tuple[dict, dict, list]:
    """Metrics by stage, step and name; results by split, condition and name; the ledger."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    metrics = {(x["stage"], x["step"], name): x[name] for x in lines for name in x if not name.startswith(TIMES)}
    results = json.loads((folder / run / "results.json").read_text())["splits"]
    scores = {(s, c, name): v for s, by in results.items() for c, x in by.items() for name, v in x.items()}
    ledger = [json.loads(line) for line in (folder / run / "ledger.jsonl").read_text().splitlines()]
    return metrics, {k: v for k, v in scores.items() if k[2] != "ms_per_query"}, ledger


def close(folder, run: str, other: str) -> None:
    (metrics, scores, ledger), (steps, results, rows) = figures(folder, run), figures(folder, other)
    assert ledger == rows and metrics.keys() == steps.keys() and scores.keys() == results.keys()
    for key, value in steps.items():
        if isinstance(value, str) or value is None:
            assert metrics[key] == value, key
        elif not key[2].startswith(DISCRETE):
            np.testing.assert_allclose(metrics[key], value, rtol=2e-3, atol=2e-5, err_msg=f"{run} {key}")
    for key, value in results.items():
        found = np.array([scores[key], value], float)  # of 20 queries, of which one may find its document elsewhere
        np.testing.assert_allclose(*found, rtol=0, atol=0.051, err_msg=f"{run} {key}")


def go_on(folder, began: str, run: str, count: int, devices: int) -> None:
    """Trains to the end what `began` had at step 2 of stage 2."""
    shutil.copytree(folder / began, folder / run)
    shutil.rmtree(folder / run / "checkpoints" / "rl" / "3")
    (folder / run / "results.json").unlink()
    train(folder, count, devices, run)


def test_two_processes_of_four_devices_train_as_one_of_eight_and_one_of_one(tmp_path):
    write_dataset(tmp_path / "data")
    for run, count, devices in (("one", 1, 1), ("eight", 1, 8), ("two-by-four", 2, 4)):
        train(tmp_path, count, devices, run)
    close(tmp_path, "eight", "one")
    close(tmp_path, "two-by-four", "one")
    go_on(tmp_path, "two-by-four", "one-from-two", 1, 1)
    close(tmp_path, "one-from-two", "one")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), ((1, 8), (2, 4)))
def test_what_one_process_began_more_devices_finish(tmp_path, count, devices, monkeypatch):
    monkeypatch.setattr(xla, "flags", xla.devices)  # compiled as users' programs are
    write_dataset(tmp_path / "data")
    train(tmp_path, 1, 1, "one")
    go_on(tmp_path, "one", "more", count, devices)
    close(tmp_path, "more", "one")


def test_two_processes_share_an_index_and_checkpoints_with_one(tmp_path):
    whole = two_hosts.changed(VersionedIndex.build(two_hosts.vectors(), 0))
    one = Checkpointer(tmp_path / "one", 1)
    one.save(1, {"index": whole.state()}, meta={"data": None})
    one.close()
    finish(processes_of(["-m", "tests.two_hosts", str(tmp_path)], 2, 2))
    two = Checkpointer(tmp_path / "two", 1, read_only=True)
    state, meta = two.restore(None, {"index": whole.state()})
    two.close()
    index = sharded.restore(state["index"])
    np.testing.assert_array_equal(index.vectors, whole.vectors)
    np.testing.assert_array_equal(index.versions, whole.versions)
    assert index.kind == "scann" and meta["data"] == {"next": 3}


# To jax each machine's CPUs, and GPUs, are a slice, and machines are told apart by what their kernels began with.
ANOTHER_MACHINE = ("unshare", "-rm", "sh", "-c", 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"')
MEET = """
import jax, numpy as np
from r3jax import processes
from r3jax.model.sharding import everywhere, make_mesh, put_batch, to_host
from r3jax.run.peers import Peers
processes.connect()
assert len({d.slice_index for d in jax.devices()}) == 2
with jax.set_mesh(mesh := make_mesh()), Peers():
    assert processes.gather(np.array([processes.rank()])).ravel().tolist() == [0, 1]
    rows = np.arange(8.0).reshape(4, 2)
    mine = rows[2 * processes.rank() :][:2]
    assert (to_host(put_batch(mesh, mine)) == rows).all()
"""


def test_processes_of_two_machines_meet(tmp_path):
    identity = tmp_path / "boot_id"
    identity.write_text("00000000-0000-4000-8000-000000000001\n")
    other = (*ANOTHER_MACHINE, str(identity))
    tried = subprocess.run([*other, "cat", "/proc/sys/kernel/random/boot_id"], capture_output=True, text=True)
    if tried.stdout != identity.read_text():
        pytest.skip("a namespace of its own is not allowed here")
    finish(processes_of(["-c", MEET], 2, 2, last=other))


# As in the last evaluation of `train`, and in `encode` and `evaluate` all along. On a TPU slice jax numbers processes
# by their place in it, here against the coordinator's order.
TOLD = """
import contextlib, signal, time, jax, numpy as np
from r3jax import processes
from r3jax.run import stop
from r3jax.run.peers import Peers
stop.STUCK = 1.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
if not {released}:
    stop.on_term()
processes.connect(saves={released})
real = jax.process_index
jax.process_index = lambda backend=None: jax.process_count() - 1 - real()
with Peers(60), stop.Stop() if {released} else contextlib.nullcontext() as asked:
    if {released}:
        asked.release()
    assert processes.gather(np.array([processes.rank()])).ravel().tolist() == list(range(jax.process_count()))
    print("up", flush=True)
    while True:
        processes.here().wait("a round")
        {work}
"""
ROUNDS = "time.sleep(0.05)"


@pytest.mark.parametrize(
    ("count", "who", "released"), [(2, 1, True), (2, 1, False), (3, 0, False), (3, 0, True), (1, 0, False)]
)
def test_a_stop_of_one_process_ends_all_with_75(count, who, released):
    job = up(processes_of(["-c", TOLD.format(released=released, work=ROUNDS)], count, 1))
    job[who].terminate()
    said = [process.communicate(timeout=60)[0] for process in job]
    assert [process.returncode for process in job] == [75] * count, said
    assert "stopped; give the same command again" in said[who]
    for other in {*range(count)} - {who}:
        assert f"process {who} of {count}" in said[other] and "was told to stop" in said[other]


def test_a_ctrl_c_of_one_process_ends_all_with_130():
    job = up(processes_of(["-c", TOLD.format(released=False, work=ROUNDS)], 2, 1))
    job[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60)[0] for process in job]
    assert [process.returncode for process in job] == [130, 130] and "Traceback" not in "".join(said), said
    assert "process 1 of 2" in said[0] and "was interrupted" in said[0]


LAST_LOOK = """
import time
from r3jax import processes
from r3jax.run import stop
from r3jax.run.peers import Peers
processes.connect(saves=True)
with Peers(60), stop.Stop() as asked:
    for _ in range(3):
        assert not asked.due()
    print("up", flush=True)
    time.sleep(5)  # the validation of the last step
    asked.release()
    print("beyond", flush=True)
"""


def test_a_stop_after_the_last_step_is_not_lost():
    job = up(processes_of(["-c", LAST_LOOK], 2, 1))
    job[1].terminate()
    said = [process.communicate(timeout=60)[0] for process in job]
    assert [process.returncode for process in job] == [75, 75] and "beyond" not in "".join(said), said


@pytest.mark.parametrize("count", [2, 1])
def test_a_process_that_does_not_come_back_to_python_is_ended_too(count):
    """As in a compilation, or a collective that a peer does not join."""
    work = "time.sleep(0.5); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(600)"
    job = up(processes_of(["-c", TOLD.format(released=False, work=work)], count, 1))
    time.sleep(2)
    job[-1].terminate()
    said = [process.communicate(timeout=60)[0] for process in job]
    assert [process.returncode for process in job] == [75] * count, said


def test_who_finds_no_other_says_so():
    code = "from r3jax import processes\nprocesses.MEET, processes.PATIENCE = 1, 2\nprocesses.connect()"
    for rank in range(2):
        told = dict(zip(processes.VARIABLES, (free_address(), "2", str(rank)), strict=True))
        alone = subprocess.run([sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True)
        first, error = alone.stderr.splitlines()
        assert alone.returncode == 2 and first == "waiting for the other processes of this job, 1 s more"
        assert error.startswith("error: the processes of this job do not find each other (some had not come after 2 s)")


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
