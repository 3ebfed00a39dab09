"""What a user can get wrong with `r3jax.convert` besides its command line (tests/mistakes)."""

import json
import pathlib

import pytest

from r3jax import convert, export
from r3jax.errors import UserError
from r3jax.text import settings
from r3jax.text.prompts import Prompts
from tests.test_convert import make_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    make_run(folder)
    return folder


def test_a_failure_half_way_leaves_nothing_and_a_killed_one_is_no_obstacle(shared, tmp_path, monkeypatch):
    target = tmp_path / "out"
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "old").write_text("of a killed export")
    fill = export.fill

    def full(folder, *args):
        fill(folder, *args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "fill", full)
    with pytest.raises(UserError, match="cannot write to .*out: No space left on device"):
        convert.main(["export", str(shared / "run"), str(target)])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "fill", fill)
    target.mkdir()  # an empty folder may be there
    convert.main(["export", str(shared / "run"), str(target)])
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (target / "old").exists()


def test_what_cannot_be_written_is_told_and_what_cannot_be_read_is_not_told_as_that(tmp_path):
    with (
        pytest.raises(UserError, match="DST: cannot write to /proc/none/out: .*; name another folder"),
        convert.new_folder(pathlib.Path("/proc/none/out")),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="elsewhere"), convert.new_folder(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    with (
        pytest.raises(UserError, match="DST: cannot write to .*out: Is a directory; name another folder"),
        convert.new_folder(tmp_path / "out") as part,
    ):
        (part / "inside").mkdir()
        (part / "inside").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        convert.main(["--help"])
    assert exit_.value.code == 0
    assert "python -m r3jax.convert export runs/rl-tiny published/rl-tiny" in capsys.readouterr().out


def test_malformed_settings_are_named(tmp_path):
    path = tmp_path / "config.json"
    assert settings.read(tmp_path) is None
    for theirs in ('{"model_type": "qwen2"}', "[]", "{"):  # the last two are for `read_config` to refuse
        path.write_text(theirs)
        assert settings.read(tmp_path) is None
    path.write_text('{"model_type": "qwen2"}')
    good = settings.Settings(Prompts(), 1, 2, 3, lowercase=True)
    good.write(tmp_path)
    assert settings.read(tmp_path) == good
    whole = json.loads(path.read_text())
    assert whole["model_type"] == "qwen2"
    raw = whole["r3jax"]
    for wrong in (3, {}, [], raw | {"more": 1}, raw | {"max_doc_tokens": "2"}, raw | {"prompts": {"direct_system": 3}}):
        path.write_text(json.dumps(whole | {"r3jax": wrong}))
        with pytest.raises(UserError, match='config.json: "r3jax" does not hold prompts and lengths'):
            settings.read(tmp_path)


def test_the_base_of_an_adapter_must_be_named_and_published(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "adapter_config.json"
    for said, says in (
        ("{}", "has no base_model_name_or_path; set it to the folder or hub id"),
        ('{"base_model_name_or_path": null}', "has no base_model_name_or_path"),
        ('{"base_model_name_or_path": "./nowhere"}', "base_model_name_or_path names './nowhere', which does not exist"),
        (json.dumps({"base_model_name_or_path": str(shared / "run")}), "is a run; export it and name that folder"),
    ):
        config.write_text(said)
        with pytest.raises(UserError) as caught:
            convert.main(["import", str(tmp_path), str(tmp_path / "out")])
        assert says in str(caught.value) and str(config) in str(caught.value)
