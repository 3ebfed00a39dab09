"""What a user can get wrong with `r3jax.convert`: one sentence each, and nothing left behind."""

import json

import pytest

from r3jax import convert, export
from r3jax.errors import UserError
from r3jax.model.qwen2 import ModelConfig
from r3jax.run import config as run_config
from r3jax.text import settings
from r3jax.text.prompts import Prompts
from tests import fixtures
from tests.test_convert import make_run
from tests.tiny_model import reference


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    make_run(folder)
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("something")
    for name, change in (("theirs", {}), ("sliding", {"use_sliding_window": True}), ("deep", {"num_hidden_layers": 3})):
        model = reference(ModelConfig(**fixtures.config(folder).model))
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text((folder / "run" / "tokenizer" / "tokenizer.json").read_text())
        raw = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(raw | change))
    return folder


MISTAKES = [
    ([], "give import SRC DST, export RUN DST or data FILES DST, then flags; see python -m r3jax.convert --help"),
    (["import", "IN/theirs"], "give import SRC DST, export RUN DST or data FILES DST"),
    (["publish", "IN/run", "OUT"], "give import SRC DST, export RUN DST or data FILES DST"),
    (["export", "--stage=sft", "IN/run", "OUT"], "give import SRC DST, export RUN DST or data FILES DST"),
    (["export", "IN/run", "OUT", "--stage=dpo"], "--stage must be sft or rl, not 'dpo'"),
    (["export", "IN/run", "OUT", "--stage=rl"], "there are no checkpoints at IN/run/checkpoints/rl"),
    (["export", "IN/run", "OUT", "--shard-size=4G"], "--shard-size must be a whole number of MiB above 0, not '4G'"),
    (["export", "IN/run", "OUT", "--shards=4"], "unknown flag --shards"),
    (["export", "IN/empty", "OUT"], "there is no IN/empty/config.json; name the folder of a run"),
    (["export", "IN/theirs", "OUT"], "IN/theirs is not the folder of a run; name one that train.py or import made"),
    (["export", "IN/run", "IN/full"], "DST names IN/full, where something is already; name another folder"),
    (["export", "IN/run", "IN/full/file"], "DST names IN/full/file, where something is already"),
    (["export", "IN/run", "IN/full/file/out"], "DST: cannot write to IN/full/file/out"),
    (["export", "IN/run", "OUT", "--config.mesh.fsdp=3"], "does not multiply to the 8 devices"),
    (["import", "nowhere", "OUT"], "SRC names 'nowhere', which does not exist; give the folder"),
    (["import", "owner/name", "OUT"], "SRC names 'owner/name', which is no folder here and cannot be had from"),
    (["import", "IN/run", "OUT"], "is a run already; give a Hugging Face folder or a hub id"),
    (["import", "IN/empty", "OUT"], "holds neither checkpoints/ (a run) nor *.safetensors"),
    (["import", "IN/sliding", "OUT"], 'a sliding window ("use_sliding_window") is not implemented'),
    (["import", "IN/deep", "OUT"], "12 tensors are missing, the first is 'model.layers.2.input_layernorm.weight'"),
    (["import", "IN/theirs", "IN/full"], "DST names IN/full, where something is already"),
    (["import", "IN/theirs", "OUT", "--config.model.param_dtype=fp8"], "config.model.param_dtype must be one of"),
    (["import", "IN/theirs", "OUT", "--config=configs/none.py"], "there is no file configs/none.py"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES, ids=lambda x: " ".join(x[:3])[-30:] if isinstance(x, list) else "")
def test_a_mistake_is_one_sentence_and_leaves_nothing(shared, tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = {str(p) for p in shared.rglob("*")}

    def filled(text):
        return text.replace("IN/", f"{shared}/").replace("OUT", str(tmp_path / "out"))

    monkeypatch.setattr("sys.argv", ["convert", *map(filled, argv)])
    with pytest.raises(SystemExit) as exit_:
        run_config.run_main(convert.main)
    said = capsys.readouterr()
    assert exit_.value.code == 2 and filled(says) in said.err
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [] and {str(p) for p in shared.rglob("*")} == before


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


def test_there_is_nothing_to_merge_without_an_adapter(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="--merge-lora: .* was trained without an adapter; leave the flag out"):
        convert.main(["export", str(run), str(tmp_path / "out"), "--merge-lora"])
