"""launch/slurm.sbatch on a real Slurm of two nodes, which is this machine twice: tests/slurm.sh brings it."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.fixtures import ROOT, flags, write_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="as root: tests/slurm.sh install"),
]
SBATCH = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]
STEPS = 150  # longer than Slurm takes to preempt


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    subprocess.run([ROOT / "tests" / "slurm.sh", "start", folder], check=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    subprocess.run(["scancel", "--user=root"])
    while said("squeue", "--noheader"):
        time.sleep(0.2)
    subprocess.run([ROOT / "tests" / "slurm.sh", "stop", folder], timeout=60)


def said(*argv) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def lines(run) -> list[dict]:
    """What the run has logged, without times."""
    file = run / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith(("time", "tokens_per"))} for line in found]


def wait_for(what, job: str, seconds: float = 900.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        state = said("scontrol", "--oneliner", "show", "job", job)
        if "Reason=BeginTime" in state:  # two minutes, which a test need not wait
            said("scontrol", "update", f"jobid={job}", "starttime=now")
        assert time.monotonic() < end and "JobState=FAILED" not in state, state
        time.sleep(0.2)


def test_a_preempted_job_saves_requeues_and_comes_to_the_same_end(tmp_path, slurm):
    write_dataset(tmp_path / "data")
    changes = {"sft__steps": STEPS, "evaluate__every": 0, "checkpoint__every": 1000}
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def submit(name: str) -> str:
        words = [*flags(tmp_path, "sft", **changes), f"--workdir={tmp_path / name}"]
        argv = [*SBATCH, f"--output={tmp_path / name}.out", "launch/slurm.sbatch", "train", *words]
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()

    job = submit("preempted")
    wait_for(lambda: len(lines(tmp_path / "preempted")) >= 2, job)
    urgent = ["--parsable", "--partition=urgent", f"--output={tmp_path / 'urgent.out'}", "--wrap=sleep 1"]
    said("sbatch", *urgent)  # wants one of the two nodes: the job must leave within its partition's GraceTime
    wait_for(lambda: (tmp_path / "preempted" / "results.json").exists(), job)
    (saved,) = [p.name for p in (tmp_path / "preempted" / "checkpoints" / "sft").iterdir() if p.name != str(STEPS)]
    assert 2 <= int(saved) < STEPS
    output = (tmp_path / "preempted.out").read_text()
    assert "Exited with exit code 75" in output and f"going on from step {saved} of {STEPS}" in output
    assert "Restarts=1" in said("scontrol", "--oneliner", "show", "job", job)

    job = submit("whole")
    wait_for(lambda: (tmp_path / "whole" / "results.json").exists(), job)
    assert lines(tmp_path / "preempted") == lines(tmp_path / "whole")  # bit for bit
