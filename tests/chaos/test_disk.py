"""A disk that fills while a checkpoint or an encoding is written: one sentence, nothing lost, on it goes with room."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest

from tests import fixtures
from tests.chaos import runs
from tests.test_train import lines

pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, 48 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: pathlib.Path, leave: int) -> pathlib.Path:
    """A file that leaves so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return ballast


def fill_when(there, disk: pathlib.Path, leave: int) -> None:
    """Fills the disk as soon as `there()`."""

    def wait():
        while not there():
            time.sleep(0.01)
        with contextlib.suppress(OSError):  # the run took some of it meanwhile
            fill(disk, leave)

    threading.Thread(target=wait, daemon=True).start()


def test_a_disk_that_fills_while_training(disk, tmp_path):
    fixtures.write_dataset(tmp_path / "data")
    runs.finish(tmp_path, tmp_path / "whole")
    run = disk / "run"
    first = run / "checkpoints" / "sft" / "3"
    fill_when(first.is_dir, disk, 100_000)
    process = fixtures.run_python("-m", "r3jax.train", *runs.command(tmp_path, run))
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("error: ") and "No space left on device" in errors
    assert "make room and give the same command again" in errors
    # By then others may have taken the place of the first.
    kept = [int(folder.name) for folder in first.parent.iterdir() if folder.name.isdigit()]
    assert kept
    # What can be foreseen is said before any step, unless not even a small file can be written before that.
    process = fixtures.run_python("-m", "r3jax.train", *runs.command(tmp_path, run))
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    assert "make room" in errors
    if "No space left" not in errors:
        assert errors.startswith("error: --workdir: ") and "make room, lower config.checkpoint.keep" in errors
        assert lines(run / "ledger.jsonl")[-1]["step"] == max(kept)
    (disk / "ballast").unlink()
    assert f"stage sft: going on from step {max(kept)}" in runs.finish(tmp_path, run)
    runs.same(tmp_path, run, tmp_path / "whole")


def test_a_disk_that_fills_while_encoding(disk, tmp_path):
    folder, _ = fixtures.finished_run()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'"show file number {i}"\n' for i in range(9000)))
    words = ("-m", "r3jax", "encode", str(folder / "run"), str(corpus))

    def encode(out: pathlib.Path):
        process = fixtures.run_python(*words, str(out))
        _, errors = process.communicate(timeout=1200)
        return process.returncode, errors

    assert encode(tmp_path / "whole") == (0, "")
    # The file of vectors is reserved sparsely: its blocks are taken as shards come.
    fill_when((disk / "out" / "progress" / "000000.json").is_file, disk, 100_000)
    code, errors = encode(disk / "out")
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: OUT: cannot write to"), errors
    assert "No space left on device; make room" in errors
    (disk / "ballast").unlink()
    assert encode(disk / "out") == (0, "")
    for name in ("vectors.npy", "documents.jsonl", "offsets.npy"):
        assert (disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
