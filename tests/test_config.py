"""Configs: overrides take the type of what they replace; every mistake is one sentence and exit code 2."""

import errno
import json
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, rl
from r3jax import assembly
from r3jax.errors import UserError
from r3jax.model.sharding import make_mesh
from r3jax.run import config as configs
from r3jax.run.rules import RULES

FILE = """
from ml_collections import ConfigDict
from r3jax.run.config import choose

def get_config(arg="tiny"):
    width = choose(arg, {"tiny": 128, "qwen2_5_0_5b": 896})
    return ConfigDict(dict(
        name="try", seed=0, init_from="", hint=None,
        model=dict(width=width, tied=True),
        data=dict(eval_splits=("seen", "unseen"), sizes=(1, 2)),
        rl=dict(group_size=8, learning_rate=1e-4),
    ))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "try.py"
    path.write_text(FILE)
    return path


def parse(*argv, **kwargs):
    return configs.parse(argv, "r3jax.train", **kwargs)


def test_overrides_take_the_type_of_what_they_replace(file):
    parsed = parse(
        f"--config={file}:qwen2_5_0_5b",
        "--config.rl.group_size=4",
        "--config.rl.learning_rate",
        "2",
        "--config.model.tied=false",
        "--config.data.eval_splits=a,b,c",
        "--config.data.sizes=(3, 4)",
        "--config.init_from=",
        "--config.hint=7",
        "--workdir=else/where",
    )
    config = parsed.config
    assert (config.model.width, config.rl.group_size, config.model.tied, config.hint) == (896, 4, False, 7)
    assert isinstance(config.rl.learning_rate, float) and config.rl.learning_rate == 2.0
    assert config.data.eval_splits == ("a", "b", "c") and config.data.sizes == (3, 4)
    assert parsed.workdir == pathlib.Path("else/where")
    assert config.is_locked


def test_the_defaults(file):
    parsed = parse(f"--config={file}")
    assert parsed.config.model.width == 128
    assert parsed.workdir == pathlib.Path("runs/try") and parsed.flags == {}


def test_a_saved_config_reads_back_the_same(file, tmp_path):
    config = parse(f"--config={file}", "--config.rl.group_size=4").config
    configs.save(config, tmp_path / "run" / "config.json")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rl"]["group_size"] == 4
    parsed = parse(
        f"--workdir={tmp_path / 'run'}",
        "--split=seen",
        "--config.seed=3",
        flags={"split": "which", "data": "where"},
        config_required=False,
    )
    assert parsed.config.rl.to_dict() == config.rl.to_dict()
    assert parsed.config.data.to_dict() == config.data.to_dict()
    assert parsed.config.seed == 3 and parsed.flags == {"split": "seen", "data": None}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]


MISTAKES = [
    ([], "--config is missing"),
    (["--config=nothing.py"], "no file nothing.py"),
    (["--config=TRI"], "did you mean FILE"),
    (["--config=FILE:huge"], "'huge'; choose one of tiny, qwen2_5_0_5b"),
    (["--config=FILE:qwen2_5_05b"], "did you mean qwen2_5_0_5b?"),
    (["--config="], "--config is empty"),
    (["--config"], "--config needs a value"),
    (["--confg=FILE"], "did you mean --config?"),
    (["--config=FILE", "--workdri=x"], "did you mean --workdir?"),
    (["--config=FILE", "extra"], "unexpected argument 'extra'"),
    (["--config=FILE", "--config.rl.gruop_size=4"], "did you mean --config.rl.group_size?"),
    (["--config=FILE", "--config.group_size=4"], "did you mean --config.rl.group_size?"),
    (["--config=FILE", "--confgi.rl.group_size=4"], "did you mean --config.rl.group_size?"),
    (["--config=FILE", "--config.rl=4"], "--config.rl is a group of fields"),
    (["--config=FILE", "--config.rl.group_size.more=4"], "no such field"),
    (["--config=FILE", "--config.rl.group_size=four"], "must be a whole number, not 'four'"),
    (["--config=FILE", "--config.rl.group_size=4.5"], "must be a whole number, not '4.5'"),
    (["--config=FILE", "--config.rl.group_size="], "must be a whole number, not ''"),
    (["--config=FILE", "--config.rl.learning_rate=fast"], "must be a number, not 'fast'"),
    (["--config=FILE", "--config.rl.learning_rate=nan"], "must be a number, not 'nan'"),
    (["--config=FILE", "--config.model.tied=maybe"], "must be true or false, not 'maybe'"),
    (["--config=FILE", "--config.data.sizes=1,x"], "--config.data.sizes must be a whole number, not 'x'"),
]


@pytest.mark.parametrize("argv, sentence", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(file, monkeypatch, capsys, argv, sentence):
    words = [a.replace("FILE", str(file)).replace("TRI", str(file.with_name("tri.py"))) for a in argv]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit) as exit_:
        configs.run_main(lambda argv: parse(*argv) and None)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert sentence.replace("FILE", str(file)) in error
    assert error.startswith("error: ") and error.count("\n") == 1


BROKEN = [
    ("x = 1", "defines no function get_config"),
    ("def get_config(arg='tiny'):\n    return {}", "must return a ConfigDict, not a dict"),
    ("def get_config(arg='tiny'):\n    return 1 / 0", ":2: ZeroDivisionError: division by zero"),
    ("import json\nimport no_such_module", ":2: ModuleNotFoundError"),
    ("def get_config(:", ":1: "),
    (
        "import ml_collections as m\ndef get_config(a=''):\n    return m.ConfigDict(dict(rl=dict(f=print)))",
        "config.rl.f is a builtin_function_or_method; use numbers",
    ),
]


@pytest.mark.parametrize("text, sentence", BROKEN)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, sentence):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(f"--config={path}")
    assert sentence in str(error.value) and "broken.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_argument_for_a_config_that_takes_none(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import ml_collections as m\ndef get_config():\n    return m.ConfigDict(dict(seed=0))")
    assert parse(f"--config={path}").config.seed == 0
    with pytest.raises(UserError, match="takes no argument; leave out :tiny"):
        parse(f"--config={path}:tiny")


def test_a_bug_keeps_its_trace_and_ctrl_c_is_130(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        configs.run_main(lambda argv: 1 / 0)

    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        configs.run_main(interrupted)
    assert exit_.value.code == 130


@pytest.fixture
def good(tmp_path):
    """The default config, with a few values that the impossible ones below are held against."""
    (tmp_path / "qrels").mkdir()
    for name in (
        "corpus.jsonl",
        "queries.jsonl",
        *(f"qrels/{s}.tsv" for s in ("train", "validation", "seen")),
    ):
        (tmp_path / name).touch()
    config = rl.get_config()
    config.data.update({"path": str(tmp_path), "eval_splits": ("seen",)})
    config.tokenizer.vocab_size = 512
    config.model.update({"heads": 4, "kv_heads": 2, "vocab": 512})
    config.sft.update({"kl_weight": 0.0, "triplet_weight": 0.0})
    config.data.max_thought_tokens = 16
    config.rl.reward.update({"k": 10, "min_tokens": 4, "max_tokens": 16})
    return config


def test_a_good_config_passes_every_rule(good):
    fields = dict(configs.leaves(good))
    assert [f for rule in RULES for f in rule.fields if f not in fields] == []
    configs.validate(good)


def test_judgements_may_be_in_either_form(good):
    folder = pathlib.Path(good.data.path) / "qrels"
    (folder / "train.tsv").rename(folder / "train.jsonl")
    configs.validate(good)


def test_fields_that_a_config_lacks_are_not_checked(good):
    del good["rl"], good["index"]
    configs.validate(good)
    configs.validate(ConfigDict({"name": "x"}))


IMPOSSIBLE = [
    ("name", "a/b", "config.name must be a name without a slash"),
    ("seed", -1, "config.seed must be between 0 and 2147483646"),
    ("seed", 2**63, "config.seed must be between 0 and 2147483646"),
    ("init_from", "nowhere", "config.init_from names 'nowhere', which does not exist"),
    ("data.path", "nowhere", "config.data.path names 'nowhere', which is not a folder"),
    ("data.on_error", "ignore", "must be one of strict, skip, not 'ignore'"),
    ("data.train_split", "trian", "config.data.train_split is 'trian', but"),
    ("data.eval_splits", ("seen", "test"), "config.data.eval_splits is ('seen', 'test')"),
    ("data.train_split", "seen", "data.eval_splits holds too"),
    ("model.kv_heads", 3, "config.model.heads (4) must be a multiple of model.kv_heads (3)"),
    ("model.head_dim", 3, "config.model.head_dim must be even"),
    ("model.rope_theta", 1.0, "config.model.rope_theta must be above 1"),
    ("model.rope_factor", 0.5, "config.model.rope_factor must be at least 1 (1 is plain RoPE, above is YaRN), not 0.5"),
    ("model.rope_original_length", 0, "config.model.rope_original_length must be at least 1"),
    ("model.max_positions", 0, "config.model.max_positions must be at least 1"),
    ("model.compute_dtype", "fp32", "must be one of float32, bfloat16, not 'fp32'"),
    ("model.vocab", 400, "must be at least tokenizer.vocab_size (512)"),
    ("mesh.tensor", 4, "config.mesh.tensor (4) must divide model.kv_heads (2)"),
    ("mesh.data", -1, "only one of them may be -1"),
    ("mesh.fsdp", 0, "config.mesh.fsdp must be at least 1, or -1"),
    ("sft.steps", -1, "config.sft.steps must be at least 0"),
    ("sft.steps", "many", "config.sft.steps must be at least 0, not many"),
    ("sft.temperature", 0.0, "config.sft.temperature must be above 0"),
    ("sft.learning_rate", float("inf"), "config.sft.learning_rate must be a finite number"),
    ("rl.group_size", 1, "config.rl.group_size must be at least 2, for an advantage"),
    ("rl.top_p", 0.9, "config.rl.top_p must be 1, for truncated sampling biases the policy ratio"),
    ("rl.top_k", 50, "config.rl.top_k must be 0, for truncated sampling biases the policy ratio"),
    ("rl.advantage", "gpro", "config.rl.advantage must be one of grpo, dr_grpo, rloo, not 'gpro'"),
    ("rl.kl", "k1", "config.rl.kl must be one of none, k2, k3, not 'k1'"),
    ("rl.reward.name", 3, "config.rl.reward.name must name a reward, not 3"),
    ("index.policy", "oldest", "config.index.policy must be one of none, round_robin,"),
    ("index.kind", "hnsw", "config.index.kind must be one of exact, scann, not 'hnsw'"),
    ("rl.reward.min_tokens", 20, "(20) must not exceed rl.reward.max_tokens (16)"),
    ("data.max_thought_tokens", 8, "(16) must not exceed data.max_thought_tokens (8)"),
    ("rl.reward.max_tokens", 0, "config.rl.reward.max_tokens must be at least 1"),
    ("from_scratch", False, "config.init_from is empty; give the folder of a Qwen-2.5 checkpoint"),
    ("data.validation_split", "seen", "must be a split of its own"),
    ("data.validation_split", "train", "must be a split of its own"),
    ("index.budget", 1.5, "config.index.budget must be between 0 and 1, not 1.5"),
    ("index.tree_above", 100, "config.index.tree_above must be at least 256, for a tree has to be trained"),
    ("index.max_age", 19, "config.index.max_age (19) asks for every document once in so many steps, which"),
    ("index.fresh_negatives", -1, "config.index.fresh_negatives must be at least 0"),
    ("index.over_retrieve", 5, "(5 candidates) must be at least rl.reward.k (10)"),
    ("checkpoint.keep", 0, "config.checkpoint.keep must be at least 1"),
]


@pytest.mark.parametrize("field, value, sentence", IMPOSSIBLE)
def test_an_impossible_value_is_named(good, field, value, sentence):
    *groups, leaf = field.split(".")
    group = good
    for name in groups:
        group = group[name]
    with group.ignore_type():
        group[leaf] = value
    with pytest.raises(UserError) as error:
        configs.validate(good)
    assert sentence in str(error.value)


def test_rounds_of_a_step_leave_the_first_a_share_of_what_max_age_needs(good):
    good.index.update({"max_age": 20, "budget": 0.1})
    configs.validate(good)
    good.rl.dynamic_sampling = 1
    with pytest.raises(UserError, match=r"config.index.max_age \(20\) .* for rl.dynamic_sampling is 1; raise either"):
        configs.validate(good)
    good.index.max_age = 40
    configs.validate(good)


def test_a_moving_reference_needs_a_reference_of_its_own(good):
    good.rl.update({"reference_decay": 0.99, "kl_weight": 0.01})
    configs.validate(good)
    good.lora.rank, good.init_from = 8, ""
    with pytest.raises(UserError, match="config.lora.rank is 8, but config.init_from is empty"):
        configs.validate(good)
    del good["init_from"]
    with pytest.raises(UserError, match=r"config.rl.reference_decay is 0.99, but with lora.rank=8 the reference is"):
        configs.validate(good)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_data_folder_without_its_files(good, name):
    (pathlib.Path(good.data.path) / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}"):
        configs.validate(good)


def test_all_loss_weights_zero(good):
    good.sft.ce_weight = good.sft.infonce_weight = 0.0
    with pytest.raises(UserError, match="stage 1 would learn nothing"):
        configs.validate(good)
    good.sft.steps = 0
    configs.validate(good)


def test_a_full_disk_is_one_sentence_and_other_errors_keep_their_trace(tmp_path, capsys):
    def write(code):
        raise OSError(code, "", str(tmp_path / "file"))

    with pytest.raises(SystemExit) as exit_:
        configs.run_main(lambda argv: write(errno.ENOSPC))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: No space left on device at {tmp_path}/file; make room and give the same command again.\n"
    with pytest.raises(OSError, match="file"):
        configs.run_main(lambda argv: write(errno.EIO))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("size", base.SIZES)
def test_every_size_splits_over_the_devices_of_a_machine(size, devices):
    """The defaults as they are, on the default mesh."""
    mesh = make_mesh(**rl.get_config(size).mesh, devices=jax.devices()[:devices])
    assembly.check_mesh(rl.get_config(size), mesh)
