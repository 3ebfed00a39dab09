"""A newcomer's path: every command of the README and every example, run as they are written, at tiny sizes.

A folder that looks like the repository holds the tests' data set in place of the bundled one. `python` there is ours,
and adds to the training's command line what makes it small; nothing else is changed.
"""

import os
import pathlib
import re
import stat
import subprocess
import sys

import pytest

from tests import fixtures, xla
from tests.serving_process import serving

COMMAND = re.compile(r" {4}((python|make|git|bash|pip) .*?)(\s{2,}#.*)?")
# What is not run, and why.
NOT_RUN = {
    "git clone … && cd r3jax": "the repository is here",
    "make test": "this is it",
    "make test-slow": "this is it",
    "make lint": "is run beside the tests",
    "make chaos": "half an hour of kills; the tests have a few of them",
    "make bench": "half an hour of timings, which are no tests",
    "make bench-large": "the same",
    "python -m r3jax.plan --config=configs/rl.py:qwen2_5_7b --topology=v5e:16x16": (
        "compiles for a TPU for minutes; tests/test_planning.py plans a small model for one"
    ),
    "python -m bench.pictures runs/rl-tiny runs/rl-tiny index": "needs a Chromium, and writes into docs/",
    "python -m r3jax.train --config=configs/rl.py:qwen2_5_0_5b --config.init_from=Qwen/Qwen2.5-0.5B-Instruct": (
        "downloads a gigabyte; tests/test_convert.py begins runs from Hugging Face folders"
    ),
    "python -m r3jax.study refresh --config=configs/rl.py": "trains ten runs; tests/test_study.py has it smaller",
}
# What is run in another form: what `make` does after installing.
SHORTENED = {"make train": "python -m r3jax.train --config=configs/rl.py"}
SERVE = "python -m r3jax.serve "
MAY_FAIL = "python -m r3jax.doctor "  # of a model trained for seconds it has to complain


def commands(text: str) -> list[str]:
    """Those in the indented blocks of a page, without their comments, in order."""
    return [match[1] for line in text.splitlines() if (match := COMMAND.fullmatch(line))]


README = commands((fixtures.ROOT / "README.md").read_text(encoding="utf-8"))
EXAMPLES = sorted(path.name for path in (fixtures.ROOT / "examples").iterdir() if path.is_file())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder, and the environment in which its commands run."""
    home = tmp_path_factory.mktemp("newcomer")
    for name in ("r3jax", "configs", "examples", "docs"):
        (home / name).symlink_to(fixtures.ROOT / name)
    fixtures.write_dataset(home / "data" / "tldr-commands")
    values = {key: value for key, value in fixtures.MICRO.items() if key not in ("name", "xla_cache")}
    values |= {"sft.steps": 20, "rl.steps": 2, "xla_cache": fixtures.XLA_CACHE}

    def small(file: str) -> str:
        return " ".join(
            f"--config.{key}={value}"
            for key, value in values.items()
            if file == "rl" or not key.startswith(("rl.", "index."))
        )

    shim = home / "bin" / "python"
    shim.parent.mkdir()
    # Ours come first: what a command itself sets, holds.
    cases = "".join(
        f'"-m r3jax.train --config=configs/{file}.py"*) shift 3; '
        f'set -- -m r3jax.train --config=configs/{file}.py {small(file)} "$@" ;;\n'
        for file in ("rl", "sft")
    )
    shim.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}esac\nexec {sys.executable} "$@"\n')
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "XLA_FLAGS": xla.flags(1),
        "JAX_COMPILATION_CACHE_DIR": fixtures.XLA_CACHE,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(home),  # in place of pip install -e .
    }
    return home, env


def run(home, command: str) -> str:
    folder, env = home
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 or command.startswith(MAY_FAIL), f"{command}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stdout


def serve_words(home, command: str) -> list[pathlib.Path]:
    return [home[0] / word for word in command.removeprefix(SERVE).split()]


@pytest.mark.parametrize("listed", [*NOT_RUN, *SHORTENED])
def test_what_is_listed_is_still_there(listed):
    assert README.count(listed) == 1


def test_every_indented_line_is_a_command_or_no_shell():
    """A block that begins with a command holds nothing else, so that no command is overlooked."""
    text = (fixtures.ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.M)
    held = [[bool(COMMAND.fullmatch(line)) for line in block.splitlines()] for block in blocks]
    assert all(all(lines) for lines in held if lines[0]) and sum(map(sum, held)) == len(README) > 15
    assert all(f"examples/{name}" in text for name in EXAMPLES)
    mentioned = {verb for command in README for verb in re.findall(r"-m r3jax\.(\w+)", command)}
    assert {"train", "encode", "index", "search", "evaluate", "inspect", "mine", "doctor", "serve"} <= mentioned


def test_the_readme_from_top_to_bottom(home):
    folder, _ = home
    for command in README:
        if command in NOT_RUN:
            continue
        if command.startswith(SERVE):
            with serving(*serve_words(home, command)):
                continue
        said = run(home, SHORTENED.get(command, command))
        assert said, command
    assert (folder / "runs" / "rl-tiny" / "report.html").is_file()
    assert (folder / "runs" / "rl-tiny" / "inspect.html").is_file()
    assert (folder / "negatives.jsonl").is_file() and (folder / "mined" / "corpus.jsonl").is_file()
    for example in EXAMPLES:
        said = run_example(home, example)
        assert said.count("\n") >= 3, (example, said)


def run_example(home, example: str) -> str:
    """The command that the example names, and what it says."""
    folder, _ = home
    text = (folder / "examples" / example).read_text(encoding="utf-8")
    [command] = re.findall(rf"^#?\s*((?:bash|python) examples/{re.escape(example)} .*)$", text, re.M)
    if "pairs.jsonl" in command:
        (folder / "pairs.jsonl").write_text((folder / "negatives.jsonl").read_text())
    if "http://localhost:8000" not in command:
        return run(home, command)
    with serving(*serve_words(home, next(c for c in README if c.startswith(SERVE)))) as (address, _):
        return run(home, command.replace("http://localhost:8000", address))
