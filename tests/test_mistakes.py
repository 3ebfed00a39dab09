"""A user's mistakes: one sentence that names the field and the fix, a code, no trace, before any compilation.

The mistakes are in tests/mistakes; docs/mistakes.md shows them.
"""

import json
import pathlib
import shutil

import jax
import pytest

from r3jax import __main__ as dispatcher
from r3jax import train
from r3jax.errors import UserError
from tests import fixtures
from tests.mistakes import __main__ as listed
from tests.mistakes.world import World

PAGE = fixtures.ROOT / "docs" / "mistakes.md"
FRESH = "python -m tests.mistakes > docs/mistakes.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(scope="module")
def table():
    return PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("mistake", listed.MISTAKES, ids=lambda mistake: mistake.done[:60])
def test_a_mistake(world, table, mistake):
    """Its code, what its sentence must say, and that the page shows it as it is."""
    status, sentence = world.answer(mistake)
    assert status == mistake.code and mistake.says in sentence
    assert sentence.endswith(".") and "\n" not in sentence and "Traceback" not in sentence
    assert listed.row(mistake, status, sentence) in table, f"not so in docs/mistakes.md; write it anew: {FRESH}"


def test_the_page_shows_these_and_no_others(table):
    assert len(listed.MISTAKES) >= 80
    rows = [line for line in table if line.startswith("| ") and line != listed.HEAD[0]]
    shown = [row.rsplit(" | ", 2)[0].removeprefix("| ") for row in rows]
    assert shown == [mistake.done for mistake in listed.MISTAKES], FRESH
    assert [line for line in table if not line.startswith("|")] == listed.around()


def test_in_a_process_of_its_own():
    process = fixtures.run_python("-m", "r3jax", "train", "--config=configs/lr.py")
    out, said = process.communicate()
    assert process.returncode == 2 and out == ""
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_run_says_nothing_about_programs_to_be_run(world, tmp_path, monkeypatch):
    """Its config names the folder of compiled programs that it was trained with: a stranger's could hold anything."""
    monkeypatch.chdir(world.folder)
    run = shutil.copytree("run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"xla_cache": str(tmp_path / "theirs")}))
    for argv in (["evaluate", f"--workdir={run}", "--data=nowhere"], ["convert", "export", str(run), "file/out"]):
        with pytest.raises(UserError):
            dispatcher.main(argv)
        assert jax.config.jax_compilation_cache_dir == fixtures.XLA_CACHE


def test_a_folder_that_nobody_may_write(world, monkeypatch):
    """What the system says of it differs."""
    monkeypatch.chdir(world.folder)
    with pytest.raises(UserError, match="--workdir: cannot write to /proc/run: .*; name another folder."):
        train.main([*fixtures.flags(pathlib.Path()), "--workdir=/proc/run"])


def test_a_mended_command_may_use_the_folder_again(tmp_path):
    """The first mistake is found after the config was saved: that alone claims no folder."""
    fixtures.write_dataset(tmp_path / "data")
    argv = [*fixtures.flags(tmp_path), f"--workdir={tmp_path / 'run'}"]
    for more, sentence in (("--config.sft.batch_size=12", "=12 must"), ("--config.rl.prompts=12", "=12 must")):
        with pytest.raises(UserError, match=sentence):
            train.main([*argv, more])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sft"]["batch_size"] == 16
