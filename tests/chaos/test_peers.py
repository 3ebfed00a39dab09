"""Two real processes: whatever becomes of one, the other ends within seconds and names it."""

import os
import signal
import socket
import time

import pytest

from r3jax.processes import VARIABLES
from tests import fixtures

pytestmark = pytest.mark.slow
HANG = 10.0


@pytest.fixture
def pair():
    """Starts both with the fates given; kills what is left of them."""
    started = []

    def start(*fates: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        started.extend(
            fixtures.run_python("-m", "tests.chaos.peer", str(rank), str(port), str(HANG), fate)
            for rank, fate in enumerate(fates)
        )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end_of(process, within: float) -> tuple[int, str]:
    _, errors = process.communicate(timeout=within)
    return process.returncode, errors


def wait_for_step_2(*processes) -> None:
    for process in processes:  # gloo has something to say before
        assert "at step 2\n" in iter(process.stdout.readline, ""), process.communicate()[1]


def test_both_end_well(pair):
    assert [end_of(process, 120)[0] for process in pair("none", "none")] == [0, 0]


@pytest.mark.parametrize("told", [0, 1])
def test_one_gets_a_preemption_notice(pair, told):
    processes = pair("linger", "linger")
    wait_for_step_2(*processes)
    processes[told].terminate()
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    last = [out.splitlines()[-1] for out, _ in said]
    assert last[0] == last[1] and last[0].startswith("stopping at step "), said


@pytest.mark.parametrize("lost", [0, 1])
def test_one_is_killed(pair, lost):
    processes = pair("linger", "linger")
    wait_for_step_2(*processes)
    processes[lost].kill()
    code, errors = end_of(processes[1 - lost], 30)
    assert code == 1 and f"error: process {lost} of 2 (" in errors and ") has ended; process" in errors, errors


@pytest.mark.parametrize("fate, code, own", [("raise", 1, "Traceback"), ("mistake", 2, "error: config.x: a mistake")])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_fails(pair, failing, fate, code, own):
    fates = ["linger", "linger"]
    fates[failing] = fate
    processes = pair(*fates)
    wait_for_step_2(*processes)
    got, errors = end_of(processes[1 - failing], 30)
    assert got == 1 and f"error: process {failing} of 2 (" in errors and "failed: " in errors, errors
    got, errors = end_of(processes[failing], 30)
    assert got == code and own in errors, errors


@pytest.mark.parametrize("verb", ["encode", "evaluate"])
def test_one_of_a_verb_fails(verb, tmp_path, monkeypatch):
    """The other has begun its work meanwhile."""
    folder, _ = fixtures.finished_run()
    run, data = str(folder / "run"), str(folder / "data")
    words = {
        "encode": [(run, data, str(tmp_path / "out")), (run, "nowhere", str(tmp_path / "out"))],
        "evaluate": [(run, f"--out={tmp_path}"), (run, "--data=nowhere")],
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for rank, argv in enumerate(words[verb]):
        for name, value in zip(VARIABLES, (address, "2", str(rank)), strict=True):
            monkeypatch.setenv(name, value)
        started.append(fixtures.run_python("-m", f"r3jax.{verb}", *argv))
    try:
        code, errors = end_of(started[1], 300)
        assert code == 2 and "error: " in errors and "nowhere" in errors, errors
        code, errors = end_of(started[0], 30)
        assert code == 1 and "error: process 1 of 2 (" in errors and "failed: UserError" in errors, errors
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("hanging", [0, 1])
def test_one_hangs(pair, hanging):
    fates = ["linger", "linger"]
    fates[hanging] = "hang"
    processes = pair(*fates)
    wait_for_step_2(*processes)
    for process in processes:
        code, errors = end_of(process, HANG + 30)
        assert code == 1 and f"behind is process {hanging} of 2 (" in errors, errors
        assert "most recent call first" in errors  # the stacks
        assert ("time.sleep" in errors or "peer.py" in errors) or process is not processes[hanging]


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_is_stopped(pair, stopped):
    """SIGSTOP: its machine still answers, it does not."""
    processes = pair("linger", "linger")
    wait_for_step_2(*processes)
    begin = time.monotonic()
    os.kill(processes[stopped].pid, signal.SIGSTOP)
    code, errors = end_of(processes[1 - stopped], HANG + 30)
    assert code == 1 and f"process {stopped} of 2 (" in errors, errors
    assert time.monotonic() - begin > 5
