"""A real server: `python -m r3jax.serve` in a process of its own, on a tiny model and its documents."""

import contextlib
import pathlib
import select
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from r3jax import encode
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from tests import fixtures
from tests.tiny_model import weights

START = 600  # seconds: on a busy machine, with nothing compiled yet


def tiny_run(folder: pathlib.Path, **changes) -> pathlib.Path:
    """`folder`/run with random weights, under which some thoughts end in time; its documents are in `folder`/data."""
    prompts = {"prompts__direct_system": "Represent.", "prompts__reasoning_system": "Think."}
    parts = fixtures.parts(folder, **prompts, **changes)
    run_config.save(parts.config, folder / "run" / "config.json")
    checkpointer = Checkpointer(folder / "run" / "checkpoints" / "sft", keep_last=1)
    params = fixtures.placed(weights(parts.model), parts)
    checkpointer.save(1, {"train": {"params": params}}, meta={})
    checkpointer.close()
    return folder / "run"


def encoded(run: pathlib.Path) -> pathlib.Path:
    """A run's documents as its model reads them, for the server to search in."""
    encode.main([str(run), str(run.parent / "data"), str(run.parent / "vectors")])
    return run.parent / "vectors"


@contextlib.contextmanager
def serving(*argv: str | pathlib.Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of `r3jax serve` with these arguments, on a free port, as soon as /healthz answers.

    Unless it was stopped within, it is stopped by SIGTERM, and must exit with 0 and have complained of nothing.
    """
    process = fixtures.run_python("-m", "r3jax.serve", *map(str, argv), "--port=0")
    try:
        ready, _, _ = select.select([process.stdout], [], [], START)
        said = process.stdout.readline() if ready else ""
        if " at http://" not in said:
            process.kill()
            raise AssertionError(f"serve has not started: {said}{process.stderr.read()}")
        address = said.split()[-1]
        with urllib.request.urlopen(f"{address}/healthz", timeout=20) as answer:
            assert answer.status == 200
        yield address, process
        if process.poll() is None:
            complaints = stop(process)
            assert not complaints, complaints
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen) -> str:
    """Ends a server by SIGTERM and returns its complaints; it must exit with 0."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return "".join(line for line in said.splitlines(True) if not line.startswith("compiling: "))  # on a busy machine


def wait_for(condition, seconds: float = 20) -> None:
    """Until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)
