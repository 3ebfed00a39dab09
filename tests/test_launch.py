"""What launches: scripts, flags and job descriptions, held against what reads them. Nothing is launched."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from tests.fixtures import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
JOBSETS = sorted(LAUNCH.glob("jobset_*.yaml"))
TPU = {"NAME": "r3", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite", "POLL": "0"}

# In the place of a program: writes its arguments, one line each call, and ends with the next of some codes.
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$LOG"; printf '\\n' >> "$LOG"
case "$*" in *describe*) echo "${STATE:-ACTIVE}";; esac
code=$(head -n1 "$CODES" 2>/dev/null); sed -i 1d "$CODES" 2>/dev/null
exit "${code:-0}"
"""
# What gcloud's reference gives each command: positional arguments, and flags (with "=": they take a value).
GCLOUD = {
    "queued-resources create": (
        1,
        {"--zone=", "--project=", "--node-id=", "--accelerator-type=", "--runtime-version=", "--spot"},
    ),
    "queued-resources describe": (1, {"--zone=", "--project=", "--format="}),
    "queued-resources delete": (1, {"--zone=", "--project=", "--force", "--quiet"}),
    "tpu-vm ssh": (1, {"--zone=", "--project=", "--worker=", "--command="}),
    "tpu-vm scp": (2, {"--zone=", "--project=", "--worker="}),
}


class Bench:
    """A folder with stubs first on the PATH."""

    def __init__(self, folder: pathlib.Path, *programs: str):
        self.folder = folder
        for name in programs:
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)

    def run(self, *argv, codes=(), **env) -> tuple[int, list[str], str]:
        """The exit code, what the stubs were called with, and stderr."""
        log = self.folder / "log"
        log.write_text("")
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        env = clean | {"PATH": f"{self.folder}:{os.environ['PATH']}", "LOG": str(log)} | env
        done = subprocess.run(argv, env=env | {"CODES": str(self.folder / "codes")}, text=True, capture_output=True)
        return done.returncode, log.read_text().splitlines(), done.stderr


def hears_ctrl_c() -> None:
    """For a child: tests that run in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_clean(script):
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_gcloud_command_is_one(tmp_path):
    bench, script = Bench(tmp_path, "gcloud"), str(LAUNCH / "tpu_vm.sh")
    calls = []
    for verb, extra in (
        ("create", {"SPOT": "1", "PROJECT": "p"}),
        ("sync", {}),
        ("run", {"PROJECT": "p"}),
        ("delete", {}),
    ):
        words = ("train", "--workdir=a b") if verb == "run" else ()
        code, made, _ = bench.run(script, verb, *words, **TPU, **extra)
        assert code == 0
        calls += made
    for call in calls:
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {call}"], capture_output=True, text=True).stdout.split(
            "\0"
        )[:-1]
        assert words[:2] == ["compute", "tpus"], call
        positional, flags = GCLOUD[" ".join(words[2:4])]
        given = [re.sub("=.*", "=", word, flags=re.DOTALL) for word in words[4:] if word.startswith("--")]
        assert set(given) <= flags and len(given) == len(set(given)), call
        assert sum(not word.startswith("--") for word in words[4:]) == positional, call
        assert "--zone=" in given
    made = [" ".join(call.split()[2:4]) for call in calls]
    assert set(made) == set(GCLOUD)  # and all of them were made
    assert "workdir\\=a\\\\\\ b" in calls[-2] or "--workdir=a\\\\\\ b" in calls[-2]  # quoted for the hosts' shell
    assert "--spot" in calls[0] and "--node-id=r3" in calls[0]


def test_tpu_runs_again_on_75_alone_and_passes_other_codes(tmp_path):
    bench, script = Bench(tmp_path, "gcloud"), str(LAUNCH / "tpu_vm.sh")
    assert bench.run(script, "run", "train", codes=(75, 75, 0), **TPU)[0] == 0
    code, calls, _ = bench.run(script, "run", "train", codes=(75, 2, 0), **TPU)
    assert (code, len(calls)) == (2, 2)
    code, calls, _ = bench.run(script, "run", "train", codes=(1, 0), **TPU)
    assert (code, len(calls)) == (1, 1)
    assert bench.run(script, "create", **TPU, STATE="FAILED")[0] == 1
    code, calls, said = bench.run(script, "create", **(TPU | {"ZONE": ""}))
    assert (code, calls) == (2, []) and "set ZONE" in said


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ended", [75, 0])
def test_a_stop_of_a_tpu_run_reaches_the_hosts_and_waits_for_them(tmp_path, sign, ended):
    log, gcloud = tmp_path / "log", tmp_path / "gcloud"
    gcloud.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in *pkill*) echo "$*" >> "$LOG"; exit;; esac\n'
        'echo up >> "$LOG"; until grep -q TERM "$LOG"; do sleep 0.1; done\n'
        'sleep 0.3; echo saved >> "$LOG"; exit "$ENDED"\n'
    )
    gcloud.chmod(0o755)
    log.write_text("")
    env = os.environ | TPU | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "ENDED": str(ended)}
    script = [LAUNCH / "tpu_vm.sh", "run", "train"]
    job = subprocess.Popen(script, env=env, start_new_session=True, preexec_fn=hears_ctrl_c)
    while "up" not in log.read_text():
        time.sleep(0.05)
    os.killpg(job.pid, sign) if sign == signal.SIGINT else job.terminate()
    assert job.wait(60) == ended
    said = log.read_text().splitlines()
    assert said[0] == "up" and "pkill -TERM" in said[1] and said[2:] == ["saved"]


def test_slurm_requeues_on_75_alone_and_passes_other_codes(tmp_path):
    bench, env = Bench(tmp_path, "srun", "scontrol"), {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    for codes, requeued in (((0,), 0), ((1,), 0), ((2,), 0), ((143,), 0), ((75, 0), 1)):
        code, calls, _ = bench.run("bash", str(LAUNCH / "slurm.sbatch"), "train", "--workdir=a b", codes=codes, **env)
        assert code == codes[0]
        assert calls[0].endswith("-m r3jax train --workdir=a\\ b ") and "--kill-on-bad-exit=0" in calls[0]
        assert [c for c in calls if c == "requeue 7 "] == ["requeue 7 "] * requeued


def test_local_tells_each_process_who_it_is_and_passes_codes(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -c ]; then echo 12345; exit; fi\n'
        'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*" >> "$LOG"\n'
        'codes=($CODE)\nif [ "${codes[$JAX_PROCESS_ID]}" = wait ]; then trap "exit 75" TERM; sleep 60 & wait; fi\n'
        'exit "${codes[$JAX_PROCESS_ID]}"\n'
    )
    fake.chmod(0o755)
    bench, script = Bench(tmp_path, "nvidia-smi"), str(LAUNCH / "local.sh")
    for codes, want in (("0 0 0", 0), ("0 1 2", 2), ("75 75 75", 75), ("75 1 75", 1), ("0 137 1", 137)):
        code, calls, _ = bench.run(script, "3", "train", "--x=a b", PYTHON=str(fake), CODE=codes)
        assert code == want, codes
        calls = sorted(call for call in calls if "r3jax" in call)
        assert calls == [f"127.0.0.1:12345 3 {rank} -m r3jax train --x=a b" for rank in range(3)]


@pytest.mark.parametrize(
    ("said", "env", "ids"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate\nwith the driver", {}, ["", ""]),
        ("GPU 0: H100\nGPU 1: H100\nGPU 2: H100\nGPU 3: H100", {}, ["0,1", "2,3"]),
        ("GPU 0: H100\nGPU 1: H100\nGPU 2: H100\nGPU 3: H100", {"CUDA_VISIBLE_DEVICES": "2,3"}, ["0", "1"]),
        ("GPU 0: H100\nGPU 1: H100", {"JAX_PLATFORMS": "cpu"}, ["", ""]),
        ("GPU 0: H100", {"CUDA_VISIBLE_DEVICES": ""}, ["", ""]),
        ("GPU 0: H100", {"CUDA_VISIBLE_DEVICES": "-1"}, ["", ""]),
    ],
)
def test_local_shares_the_gpus_that_are_there(tmp_path, said, env, ids):
    for name, text in (
        ("nvidia-smi", f'echo "{said}"'),
        (
            "python",
            'if [ "$1" = -c ]; then echo 1; else echo "$JAX_PROCESS_ID:${JAX_LOCAL_DEVICE_IDS:-}" >> "$LOG"; fi',
        ),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    bench = Bench(tmp_path)
    code, calls, _ = bench.run(str(LAUNCH / "local.sh"), "2", "train", PYTHON=str(tmp_path / "python"), **env)
    assert (code, sorted(calls)) == (0, [f"{rank}:{given}" for rank, given in enumerate(ids)])


def test_a_stop_of_local_reaches_all_and_is_waited_for(tmp_path):
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -c ]; then echo 12345; exit; fi\n'
        "trap 'sleep 0.3; echo saved >> \"$LOG\"; exit 75' TERM\n"
        'echo ready >> "$LOG"; sleep 60 & wait\n'
    )
    fake.chmod(0o755)
    for sign in (signal.SIGTERM, signal.SIGINT):
        log.write_text("")
        env = os.environ | {"PYTHON": str(fake), "LOG": str(log)}
        job = subprocess.Popen(
            [LAUNCH / "local.sh", "2", "train"], env=env, start_new_session=True, preexec_fn=hears_ctrl_c
        )
        while log.read_text().count("ready") < 2:
            time.sleep(0.05)
        os.killpg(job.pid, sign)  # as a terminal's Ctrl-C does
        assert job.wait(120) == 75
        assert log.read_text().count("saved") == 2


@pytest.mark.parametrize("file", JOBSETS, ids=lambda path: path.name)
def test_jobsets_are_valid_and_keep_every_key(file):
    described = yaml.safe_load(file.read_text())
    known = JobsetV1alpha2JobSet.from_dict(described).to_dict()
    assert dropped(described, known) == []
    for job in described["spec"]["replicatedJobs"]:
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(inner, "1.31", strict=True)
        pod = job["template"]["spec"]
        assert pod["parallelism"] == pod["completions"] and pod["backoffLimit"] == 0
        (rule,) = pod["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
        assert rule["onExitCodes"]["values"] == [75]
        (container,) = pod["template"]["spec"]["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert pod["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy wants it
        env = {e["name"]: e.get("value") for e in container.get("env", [])}
        if env:
            name, replicated = described["metadata"]["name"], job["name"]
            assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{replicated}-0-0.{name}:8476"
            assert env["JAX_NUM_PROCESSES"] == str(pod["parallelism"]) and "JAX_PROCESS_ID" in env
    (rule,) = described["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def dropped(given, known, path="") -> list[str]:
    """Keys of a description that its schema does not know, or knows otherwise."""
    if isinstance(given, dict):
        missing = [f"{path}.{key}" for key in given if key not in known]
        return missing + [x for key in given if key in known for x in dropped(given[key], known[key], f"{path}.{key}")]
    if isinstance(given, list):
        return [x for i, (a, b) in enumerate(zip(given, known, strict=True)) for x in dropped(a, b, f"{path}[{i}]")]
    return [] if given == known else [path]


def gpu_flags(own: str = "") -> list[str]:
    script = '. launch/env_gpu.sh; echo "$XLA_FLAGS"'
    env = os.environ | {"XLA_FLAGS": own}
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True).stdout.split()


def test_the_pinned_jaxlib_knows_every_flag_and_has_other_defaults(tmp_path):
    for more, known in (([], True), (["--xla_gpu_no_such_flag=true"], False)):
        flags = [*gpu_flags(), f"--xla_dump_to={tmp_path}", *more]
        env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        script = "import jax; jax.jit(lambda x: x + 1)(1.0)"
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
        assert (done.returncode == 0) == known, done.stderr
    (changed,) = tmp_path.glob("*.debug_options")  # what is not as XLA has it by itself
    for flag in gpu_flags():
        assert flag.removeprefix("--").replace("=", ": ") in changed.read_text().splitlines()


def test_flags_of_the_user_win():
    flags = gpu_flags("--mine=1")
    assert len(flags) > 1 and flags[-1] == "--mine=1"
