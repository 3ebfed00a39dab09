"""A user's mistakes: one sentence that names the field and the fix, exit code 2, before any compilation."""

import json
import pathlib
import shutil

import jax
import pytest

from r3jax import evaluate, train
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from tests import fixtures

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "compile" in name else None
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a good data set; tests that damage one take a copy."""
    folder = tmp_path_factory.mktemp("mistakes")
    fixtures.write_dataset(folder / "data")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    for name, files in {
        "pickled": {"pytorch_model.bin": "a pickle", "config.json": "{}"},
        "sliding": {"model.safetensors": "", "config.json": '{"model_type": "qwen2", "use_sliding_window": true}'},
        "sizeless": {"model.safetensors": "", "tokenizer.json": "{}"},
    }.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    return folder


def complaint(main, argv, monkeypatch, capsys) -> str:
    """What an entry point says about a command line that it must refuse."""
    monkeypatch.setattr("sys.argv", ["entry", *map(str, argv)])
    COMPILED.clear()
    with pytest.raises(SystemExit) as exit_:
        run_config.run_main(main)
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == "" and said.err.startswith("error: ")
    assert said.err.count("\n") == 1 and "Traceback" not in said.err
    assert COMPILED == []
    return said.err


# (arguments after those of a good run, what the sentence must say). FOLDER is the fixture's.
TRAIN = [
    # the config's own fields
    (
        ["--config.rl.gruop_size=4"],
        "--config.rl.gruop_size: the config has no such field (did you mean --config.rl.",
    ),
    (["--config.sft.temprature=1"], "did you mean --config.sft.temperature?"),
    (["--config.grop_size=4"], "--config.grop_size: the config has no such field"),
    (["--config.rl=4"], "--config.rl is a group of fields"),
    (["--config.rl.group_size=many"], "--config.rl.group_size must be a whole number, not 'many'"),
    (["--config.sft.learning_rate=fast"], "--config.sft.learning_rate must be a number, not 'fast'"),
    (["--config.model.tied=perhaps"], "--config.model.tied must be true or false, not 'perhaps'"),
    (["--steps=4"], "unknown flag --steps"),
    (["rl"], "unexpected argument 'rl'"),
    # files and folders
    (["--config=configs/lr.py"], "there is no file configs/lr.py (did you mean configs/rl.py?)"),
    (["--config=configs/rl.py:huge"], "there is no size 'huge'; choose one of tiny, qwen2_5_0_5b"),
    (["--config.data.path=nowhere"], "config.data.path names 'nowhere', which is not a folder"),
    (["--config.data.path=FOLDER/empty"], "holds no corpus.jsonl"),
    (["--config.data.train_split=trian"], "config.data.train_split is 'trian', but"),
    (["--config.data.validation_split="], "config.data.validation_split is '', but"),
    (["--config.data.eval_splits=seen,test"], "config.data.eval_splits is ('seen', 'test'), but"),
    (["--config.data.eval_splits="], "config.data.eval_splits must name at least one split"),
    (["--config.data.eval_splits=train"], "which data.eval_splits holds too"),
    (["--config.data.cache=FOLDER/file"], "data cache FOLDER/file cannot be written"),
    (["--config.init_from=nowhere"], "config.init_from names 'nowhere', which does not exist; give"),
    (["--config.init_from=FOLDER/empty"], "which holds neither checkpoints/ (a run) nor *.safetensors"),
    (["--config.init_from=FOLDER/pickled"], "which holds neither checkpoints/ (a run) nor *.safetensors"),
    (["--config.init_from=FOLDER/sliding"], 'a sliding window ("use_sliding_window") is not implemented; give'),
    (["--config.init_from=FOLDER/sizeless"], "FOLDER/sizeless holds no config.json; give a folder with a Qwen-2.5"),
    (
        ["--config.init_from=runs/nowhere"],
        "config.init_from names 'runs/nowhere', which is no folder here and cannot be had from the Hugging Face hub",
    ),
    (
        ["--config.tokenizer.path=FOLDER/empty"],
        "config.tokenizer.path names 'FOLDER/empty', which is not a folder",
    ),
    (["--workdir=FOLDER/file"], "--workdir: cannot write to FOLDER/file"),
    (["--workdir=/proc/run"], "--workdir: cannot write to /proc/run"),
    # sizes
    (["--config.tokenizer.vocab_size=260"], "config.tokenizer.vocab_size must be at least 300, not 260"),
    (
        ["--config.model.vocab=256"],
        "config.model.vocab (256 rows) must be at least tokenizer.vocab_size (512)",
    ),
    (["--config.model.kv_heads=3"], "config.model.heads (4) must be a multiple of model.kv_heads (3)"),
    (["--config.model.layers=0"], "config.model.layers must be at least 1, not 0"),
    (["--config.model.width=36"], "config.mesh.fsdp=8 does not divide model.width=36"),
    (["--config.data.max_query_tokens=0"], "config.data.max_query_tokens must be at least 1, not 0"),
    (["--config.data.max_doc_tokens=0"], "config.data.max_doc_tokens must be at least 1, not 0"),
    (["--config.data.max_thought_tokens=0"], "config.data.max_thought_tokens must be at least 1, not 0"),
    (["--config.sft.steps=-1"], "config.sft.steps must be at least 0, not -1"),
    (
        ["--config.sft.steps=0", "--config.rl.steps=0"],
        "leave nothing to train; set a number of steps above 0",
    ),
    (
        ["--config.sft.batch_size=12"],
        "config.sft.batch_size=12 must be a multiple of 8, for the mesh has 8 parts",
    ),
    (
        ["--config.sft.chunks=4"],
        "config.sft.batch_size=16 must be a multiple of 32, for the mesh has 8 parts (data",
    ),
    (["--config.rl.prompts=12"], "config.rl.prompts=12 must be a multiple of 8"),
    (["--config.rl.chunks=0"], "config.rl.chunks must be at least 1, not 0"),
    (["--config.evaluate.batch_size=0"], "config.evaluate.batch_size must be at least 1, not 0"),
    (
        ["--config.rl.reward.k=300", "--config.index.over_retrieve=300"],
        "k=300 must not exceed the 200 documents",
    ),
    (
        ["--config.index.over_retrieve=5"],
        "config.index.over_retrieve (5 candidates) must be at least rl.reward.k",
    ),
    (["--config.mesh.tensor=4"], "config.mesh.tensor (4) must divide model.kv_heads (2)"),
    (["--config.mesh.tensor=-1"], "only one of them may be -1"),
    (["--config.mesh.fsdp=3"], "does not multiply to the 8 devices there are"),
    # names
    (["--config.rl.reward.name=accuracy"], "config.rl.reward.name must be one of dcg_scaled, ndcg,"),
    (["--config.rl.advantage=gpro"], "config.rl.advantage must be one of grpo, dr_grpo, rloo, not 'gpro'"),
    (["--config.rl.kl=k1"], "config.rl.kl must be one of none, k2, k3, not 'k1'"),
    (["--config.index.policy=newest"], "config.index.policy must be one of none, round_robin,"),
    (["--config.index.kind=faiss"], "config.index.kind must be one of exact, scann, not 'faiss'"),
    (["--config.model.remat=some"], "config.model.remat must be one of none, dots, full, not 'some'"),
    (["--config.model.compute_dtype=fp32"], "config.model.compute_dtype must be one of float32, bfloat16"),
    (["--config.data.on_error=ignore"], "config.data.on_error must be one of strict, skip, not 'ignore'"),
    # adapters
    (["--config.lora.rank=-1"], "config.lora.rank must be at least 0, not -1"),
    (["--config.lora.alpha=0"], "config.lora.alpha must be above 0, not 0.0"),
    (["--config.lora.dropout=1"], "config.lora.dropout must be at least 0 and below 1, not 1.0"),
    (["--config.lora.targets=q,w"], "config.lora.targets must name each of q, k, v, o, gate, up, down at most once"),
    (["--config.lora.targets=q,q"], "at most once, and nothing else, not ('q', 'q')"),
    (["--config.lora.targets=", "--config.lora.rank=8"], "config.lora.targets is empty, but lora.rank is 8"),
    (["--config.lora.rank=8"], "config.lora.rank is 8, but config.init_from is empty; an adapter needs a base"),
    (["--config.evaluate.max_ability_kl=-1"], "config.evaluate.max_ability_kl must be at least 0, not -1.0"),
    # rewards
    (["--config.rl.reward.name=ndgc"], "or a function of yours as package.module.function, not 'ndgc' (did you mean"),
    (
        ["--config.rl.reward.name=ndcg:0.5,margin"],
        "config.rl.reward.name gives margin no weight; in a mix each has one",
    ),
    (
        ["--config.rl.reward.name=ndcg:half"],
        "config.rl.reward.name gives ndcg the weight 'half', which is not a number",
    ),
    (["--config.rl.reward.name=ndcg:1,mrr:-1"], "gives mrr the weight -1, which must be above 0 and finite"),
    (["--config.rl.reward.name=mrr:1,mrr:1"], "config.rl.reward.name names mrr twice"),
    (["--config.rl.reward.name=mrr:1,mine.format:1"], "names mine.format, but format is another figure of the logs"),
    (
        ["--config.rl.reward.name=nowhere.reward"],
        "names nowhere.reward, but nowhere cannot be imported (ModuleNotFound",
    ),
    (["--config.rl.reward.name=math.reward"], "names math.reward, but math has no function reward"),
    (["--config.rl.reward.name=math.isqrt"], "names math.isqrt, which must take (rows, scores, relevant, positive_"),
    (["--config.rl.reward.on_nan=skip"], "config.rl.reward.on_nan must be one of stop, drop, not 'skip'"),
    # choices of the algorithm
    (["--config.rl.dynamic_sampling=-1"], "config.rl.dynamic_sampling must be at least 0, not -1"),
    (["--config.rl.overlong=cut"], "config.rl.overlong must be one of keep, mask, soft, not 'cut'"),
    (
        ["--config.rl.overlong=soft", "--config.rl.overlong_window=6"],
        "config.rl.overlong_window (6) must not exceed data.max_thought_tokens (5)",
    ),
    (["--config.rl.epochs=0"], "config.rl.epochs must be at least 1, not 0"),
    (["--config.rl.importance_cap=0.5"], "config.rl.importance_cap must be at least 1, for weights around 1 are right"),
    (["--config.rl.reference_decay=1"], "config.rl.reference_decay must be at least 0 and below 1, not 1.0"),
    (
        ["--config.rl.reference_decay=0.9", "--config.rl.kl_weight=0"],
        "config.rl.reference_decay is 0.9, but rl.kl_weight is 0, so nothing looks at the reference; set",
    ),
    (
        ["--config.rl.reference_decay=0.9", "--config.model.param_dtype=bfloat16"],
        "config.rl.reference_decay is 0.9, but in model.param_dtype=bfloat16 its small steps would be rounded away",
    ),
    (["--config.evaluate.collapse.evaluations=-1"], "config.evaluate.collapse.evaluations must be at least 0, not -1"),
    (["--config.evaluate.collapse.ndcg=2"], "config.evaluate.collapse.ndcg must be between 0 and 1, not 2.0"),
    # values
    (["--config.rl.top_p=0.9"], "config.rl.top_p must be 1, for truncated sampling biases the policy ratio"),
    (["--config.rl.temperature=0"], "config.rl.temperature must be above 0"),
    (["--config.rl.group_size=1"], "config.rl.group_size must be at least 2, for an advantage compares"),
    (["--config.index.budget=2"], "config.index.budget must be between 0 and 1, not 2.0"),
    (
        ["--config.rl.reward.max_tokens=9"],
        "config.rl.reward.max_tokens (9) must not exceed data.max_thought_tokens (5)",
    ),
]


@pytest.mark.parametrize("more, sentence", TRAIN, ids=lambda x: x[-1][-40:] if isinstance(x, list) else "")
def test_training_refuses(shared, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    more = [word.replace("FOLDER", str(shared)) for word in more]
    argv = [*fixtures.flags(shared), f"--workdir={tmp_path / 'run'}", *more]
    assert sentence.replace("FOLDER", str(shared)) in complaint(train.main, argv, monkeypatch, capsys)


def test_a_mended_command_may_use_the_folder_again(shared, tmp_path, monkeypatch, capsys):
    """The first mistake is found after the config was saved: that alone claims no folder."""
    argv = [*fixtures.flags(shared), f"--workdir={tmp_path / 'run'}"]
    for more, sentence in (
        ("--config.sft.batch_size=12", "=12 must"),
        ("--config.rl.prompts=12", "=12 must"),
    ):
        assert sentence in complaint(train.main, [*argv, more], monkeypatch, capsys)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sft"]["batch_size"] == 16


BAD_DATA = [
    ("corpus.jsonl", '{"_id": "d0", "text": ', "corpus.jsonl:1: malformed JSON"),
    (
        "corpus.jsonl",
        '{"_id": "d0", "text": "  "}',
        "corpus.jsonl:1: document 'd0' has an empty text; write one",
    ),
    ("queries.jsonl", '{"text": "no id"}', 'queries.jsonl:1: no "_id"; add it'),
    ("qrels/train.tsv", "train0\tnothing\t1", "train.tsv:1: unknown document 'nothing'; add it"),
    ("qrels/train.tsv", "train0 d0 1", "train.tsv:1: 1 tab-separated columns; write"),
]


@pytest.mark.parametrize("name, line, sentence", BAD_DATA)
def test_a_malformed_line_is_named_by_file_and_number(shared, tmp_path, monkeypatch, capsys, name, line, sentence):
    shutil.copytree(shared / "data", tmp_path / "data")
    lines = (tmp_path / "data" / name).read_text().splitlines()
    (tmp_path / "data" / name).write_text("\n".join([line, *lines[1:]]) + "\n")
    argv = [*fixtures.flags(tmp_path), f"--workdir={tmp_path / 'run'}"]
    assert sentence in complaint(train.main, argv, monkeypatch, capsys)


def fake_run(folder: pathlib.Path, shared: pathlib.Path) -> pathlib.Path:
    """A folder that looks like a run with one checkpoint."""
    config = fixtures.config(shared)
    run_config.save(config, folder / run_config.SAVED_NAME)
    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",))):
        checkpointer = Checkpointer(folder / "checkpoints" / "sft", 1)
        checkpointer.save(2, {"nothing": jax.numpy.zeros(2)}, meta={"data": None})
        checkpointer.close()
    return folder


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"), shared)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (
            "--config.seed=1",
            "holds a run with config.seed=0, not 1; name another --workdir or remove that folder",
        ),
        ("--config.rl.group_size=2", "holds a run with config.rl.group_size=4, not 2;"),
    ],
)
def test_going_on_with_another_config_is_refused(shared, run, monkeypatch, capsys, more, sentence):
    argv = [*fixtures.flags(shared), f"--workdir={run}", more]
    before = (run / run_config.SAVED_NAME).read_text()
    assert sentence in complaint(train.main, argv, monkeypatch, capsys)
    assert (run / run_config.SAVED_NAME).read_text() == before


EVALUATE = [
    (["--workdir=nowhere"], "--workdir: there is no nowhere/config.json; name the folder of a run"),
    ([], "--workdir is missing; name the folder of a run"),
    (["--workdir=RUN", "--stage=dpo"], "--stage must be sft or rl, not 'dpo'"),
    (["--workdir=RUN", "--stage=rl"], "there are no checkpoints at RUN/checkpoints/rl; train first"),
    (
        ["--workdir=RUN", "--split=seen,nothing"],
        "--split: data has no 'nothing'; it has seen, train, unseen, valid",
    ),
    (["--workdir=RUN", "--data=nowhere"], "data folder nowhere does not exist"),
    (["--workdir=RUN", "--splits=seen"], "unknown flag --splits (did you mean --split?)"),
    (["--workdir=RUN", "--config.evaluate.batch_size=0"], "config.evaluate.batch_size must be at least 1"),
    (["--workdir=RUN"], "does not fit this config"),
    (["--workdir=UNTRAINED"], "UNTRAINED holds no checkpoint; train it first or name another run"),
]


@pytest.mark.parametrize("argv, sentence", EVALUATE)
def test_evaluation_refuses(shared, run, tmp_path, monkeypatch, capsys, argv, sentence):
    run_config.save(fixtures.config(shared), tmp_path / "untrained" / run_config.SAVED_NAME)

    def filled(text):
        return text.replace("RUN", str(run)).replace("UNTRAINED", str(tmp_path / "untrained"))

    said = complaint(evaluate.main, [filled(word) for word in argv], monkeypatch, capsys)
    assert filled(sentence) in said
