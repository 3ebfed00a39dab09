"""Configs that cannot work: flags after those of a good `r3jax train`, config files, runs that go on."""

import pathlib

from tests.mistakes.world import Mistake, code, command

_TRAIN = [
    # the config's own fields
    ("--config.rl.gruop_size=4", "--config.rl.gruop_size: the config has no such field (did you mean --config.rl."),
    ("--config.sft.temprature=1", "did you mean --config.sft.temperature?"),
    ("--config.grop_size=4", "--config.grop_size: the config has no such field"),
    ("--config.rl=4", "--config.rl is a group of fields"),
    ("--config.rl.group_size=many", "--config.rl.group_size must be a whole number, not 'many'"),
    ("--config.sft.learning_rate=fast", "--config.sft.learning_rate must be a number, not 'fast'"),
    ("--config.model.tied=perhaps", "--config.model.tied must be true or false, not 'perhaps'"),
    ("--config.name=..", "config.name must be a name without a slash, not '..'"),
    ("--steps=4", "unknown flag --steps"),
    ("rl", "unexpected argument 'rl'"),
    # files and folders
    ("--config=configs/lr.py", "there is no file configs/lr.py (did you mean configs/rl.py?)"),
    ("--config=configs/rl.py:huge", "there is no size 'huge'; choose one of tiny, qwen2_5_0_5b"),
    ("--config.data.path=nowhere", "config.data.path names 'nowhere', which is not a folder"),
    ("--config.data.path=empty", "holds no corpus.jsonl"),
    ("--config.data.train_split=trian", "config.data.train_split is 'trian', but"),
    ("--config.data.train_split=../qrels/train", "split '../qrels/train' is not in data set 'data'; use one of"),
    ("--config.data.validation_split=", "config.data.validation_split is '', but"),
    ("--config.data.eval_splits=seen,test", "config.data.eval_splits is ('seen', 'test'), but"),
    ("--config.data.eval_splits=", "config.data.eval_splits must name at least one split"),
    ("--config.data.eval_splits=train", "which data.eval_splits holds too"),
    ("--config.data.cache=file", "data cache file cannot be written"),
    ("--config.init_from=nowhere", "config.init_from names 'nowhere', which does not exist; give"),
    ("--config.init_from=empty", "which holds neither checkpoints/ (a run) nor *.safetensors"),
    ("--config.init_from=pickled", "which holds neither checkpoints/ (a run) nor *.safetensors"),
    ("--config.init_from=sliding", 'a sliding window ("use_sliding_window") is not implemented; give'),
    ("--config.init_from=sizeless", "sizeless holds no config.json; give a folder with a Qwen-2.5"),
    (
        "--config.init_from=runs/nowhere",
        "config.init_from names 'runs/nowhere', which is no folder here and cannot be had from the Hugging Face hub",
    ),
    ("--config.tokenizer.path=empty", "config.tokenizer.path names 'empty', which is not a folder"),
    ("--workdir=file", "--workdir: cannot write to file"),
    # sizes
    ("--config.tokenizer.vocab_size=260", "config.tokenizer.vocab_size must be at least 300, not 260"),
    ("--config.model.vocab=256", "config.model.vocab (256 rows) must be at least tokenizer.vocab_size (512)"),
    ("--config.model.kv_heads=3", "config.model.heads (4) must be a multiple of model.kv_heads (3)"),
    ("--config.model.layers=0", "config.model.layers must be at least 1, not 0"),
    ("--config.model.width=36", "config.mesh.fsdp=8 does not divide model.width=36"),
    ("--config.data.max_query_tokens=0", "config.data.max_query_tokens must be at least 1, not 0"),
    ("--config.data.max_doc_tokens=0", "config.data.max_doc_tokens must be at least 1, not 0"),
    ("--config.data.max_thought_tokens=0", "config.data.max_thought_tokens must be at least 1, not 0"),
    ("--config.sft.steps=-1", "config.sft.steps must be at least 0, not -1"),
    ("--config.sft.steps=0 --config.rl.steps=0", "leave nothing to train; set a number of steps above 0"),
    ("--config.sft.batch_size=12", "config.sft.batch_size=12 must be a multiple of 8, for the mesh has 8 parts"),
    ("--config.sft.chunks=4", "config.sft.batch_size=16 must be a multiple of 32, for the mesh has 8 parts (data"),
    ("--config.rl.prompts=12", "config.rl.prompts=12 must be a multiple of 8"),
    ("--config.rl.chunks=0", "config.rl.chunks must be at least 1, not 0"),
    ("--config.evaluate.batch_size=0", "config.evaluate.batch_size must be at least 1, not 0"),
    ("--config.rl.reward.k=300 --config.index.over_retrieve=300", "k=300 must not exceed the 200 documents"),
    ("--config.index.over_retrieve=5", "config.index.over_retrieve (5 candidates) must be at least rl.reward.k"),
    ("--config.mesh.tensor=4", "config.mesh.tensor (4) must divide model.kv_heads (2)"),
    ("--config.mesh.tensor=-1", "only one of them may be -1"),
    ("--config.mesh.fsdp=3", "does not multiply to the 8 devices there are"),
    # names
    ("--config.rl.reward.name=accuracy", "config.rl.reward.name must be one of dcg_scaled, ndcg,"),
    ("--config.rl.advantage=gpro", "config.rl.advantage must be one of grpo, dr_grpo, rloo, not 'gpro'"),
    ("--config.rl.kl=k1", "config.rl.kl must be one of none, k2, k3, not 'k1'"),
    ("--config.rl.ratio=sequence", "config.rl.ratio is sequence, but rl.normalise is token, which weighs"),
    ("--config.index.policy=newest", "config.index.policy must be one of none, round_robin,"),
    ("--config.index.kind=faiss", "config.index.kind must be one of exact, scann, not 'faiss'"),
    ("--config.model.remat=some", "config.model.remat must be one of none, dots, full, not 'some'"),
    ("--config.model.attention=flash", "config.model.attention must be one of xla, splash, cudnn, not 'flash'"),
    ("--config.model.attention=splash", "config.model.attention='splash' does not run on cpu in float32"),
    ("--config.model.compute_dtype=fp32", "config.model.compute_dtype must be one of float32, bfloat16"),
    ("--config.data.on_error=ignore", "config.data.on_error must be one of strict, skip, not 'ignore'"),
    # adapters
    ("--config.lora.rank=-1", "config.lora.rank must be at least 0, not -1"),
    ("--config.lora.alpha=0", "config.lora.alpha must be above 0, not 0.0"),
    ("--config.lora.dropout=1", "config.lora.dropout must be at least 0 and below 1, not 1.0"),
    ("--config.lora.targets=q,w", "config.lora.targets must name each of q, k, v, o, gate, up, down at most once"),
    ("--config.lora.targets=q,q", "at most once, and nothing else, not ('q', 'q')"),
    ("--config.lora.targets= --config.lora.rank=8", "config.lora.targets is empty, but lora.rank is 8"),
    ("--config.lora.rank=8", "config.lora.rank is 8, but config.init_from is empty; an adapter needs a base"),
    ("--config.evaluate.max_ability_kl=-1", "config.evaluate.max_ability_kl must be at least 0, not -1.0"),
    # rewards
    ("--config.rl.reward.name=ndgc", "or a function of yours as package.module.function, not 'ndgc' (did you mean"),
    ("--config.rl.reward.name=ndcg:0.5,margin", "config.rl.reward.name gives margin no weight; in a mix each has one"),
    ("--config.rl.reward.name=ndcg:half", "config.rl.reward.name gives ndcg the weight 'half', which is not a number"),
    ("--config.rl.reward.name=ndcg:1,mrr:-1", "gives mrr the weight -1, which must be above 0 and finite"),
    ("--config.rl.reward.name=mrr:1,mrr:1", "config.rl.reward.name names mrr twice"),
    ("--config.rl.reward.name=mrr:1,mine.format:1", "names mine.format, but format is another figure of the logs"),
    ("--config.rl.reward.name=nowhere.reward", "names nowhere.reward, but nowhere cannot be imported (ModuleNotFound"),
    ("--config.rl.reward.name=math.reward", "names math.reward, but math has no function reward"),
    ("--config.rl.reward.name=math.isqrt", "names math.isqrt, which must take (rows, scores, relevant, positive_"),
    ("--config.rl.reward.on_nan=skip", "config.rl.reward.on_nan must be one of stop, drop, not 'skip'"),
    # choices of the algorithm
    ("--config.rl.dynamic_sampling=-1", "config.rl.dynamic_sampling must be at least 0, not -1"),
    ("--config.rl.overlong=cut", "config.rl.overlong must be one of keep, mask, soft, not 'cut'"),
    (
        "--config.rl.overlong=soft --config.rl.overlong_window=6",
        "config.rl.overlong_window (6) must not exceed data.max_thought_tokens (5)",
    ),
    ("--config.rl.epochs=0", "config.rl.epochs must be at least 1, not 0"),
    ("--config.rl.importance_cap=0.5", "config.rl.importance_cap must be at least 1, for weights around 1 are right"),
    ("--config.rl.reference_decay=1", "config.rl.reference_decay must be at least 0 and below 1, not 1.0"),
    (
        "--config.rl.reference_decay=0.9 --config.rl.kl_weight=0",
        "config.rl.reference_decay is 0.9, but rl.kl_weight is 0, so nothing looks at the reference; set",
    ),
    (
        "--config.rl.reference_decay=0.9 --config.model.param_dtype=bfloat16",
        "config.rl.reference_decay is 0.9, but in model.param_dtype=bfloat16 its small steps would be rounded away",
    ),
    ("--config.evaluate.collapse.evaluations=-1", "config.evaluate.collapse.evaluations must be at least 0, not -1"),
    ("--config.evaluate.collapse.ndcg=2", "config.evaluate.collapse.ndcg must be between 0 and 1, not 2.0"),
    # values
    ("--config.rl.top_p=0.9", "config.rl.top_p must be 1, for truncated sampling biases the policy ratio"),
    ("--config.rl.temperature=0", "config.rl.temperature must be above 0"),
    ("--config.rl.group_size=1", "config.rl.group_size must be at least 2, for an advantage compares"),
    ("--config.index.budget=2", "config.index.budget must be between 0 and 1, not 2.0"),
    ("--config.rl.reward.max_tokens=9", "config.rl.reward.max_tokens (9) must not exceed data.max_thought_tokens (5)"),
]

# What a config's file may say: it is the user's own code.
_FILES = [
    ("def get_config(arg='tiny'):\n    return {", "bad/mine.py:2: '{' was never closed"),
    ("import nowhere", "bad/mine.py:1: ModuleNotFoundError: No module named 'nowhere'"),
    ("size = 3", "--config: bad/mine.py defines no function get_config(arg)"),
    ("def get_config():\n    return {}", "get_config of bad/mine.py must return a ConfigDict, not a dict"),
    (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'sizes': {1, 2}})",
        "bad/mine.py: config.sizes is a set; use numbers, strings, booleans, None, or tuples",
    ),
]


def _file(text: str, says: str) -> Mistake:
    def spoil() -> None:
        pathlib.Path("bad").mkdir()
        pathlib.Path("bad/mine.py").write_text(text)

    return command("train --config=bad/mine.py", says, spoil, f"a config file with {code(text)}")


_EVALUATE = [
    ("", "--workdir is missing; name the folder of a run"),
    ("--workdir=nowhere", "--workdir: there is no nowhere/config.json; name the folder of a run"),
    ("--workdir=run --stage=dpo", "--stage must be sft or rl, not 'dpo'"),
    ("--workdir=run --stage=rl", "there are no checkpoints at run/checkpoints/rl; train first"),
    ("--workdir=run --split=seen,nothing", "--split: data has no 'nothing'; it has seen, train, unseen, valid"),
    ("--workdir=run --data=nowhere", "data folder nowhere does not exist"),
    ("--workdir=run --splits=seen", "unknown flag --splits (did you mean --split?)"),
    ("--workdir=run --config.evaluate.batch_size=0", "config.evaluate.batch_size must be at least 1"),
    ("--workdir=strange", "does not fit this config"),
    ("--workdir=untrained", "untrained holds no checkpoint; train it first or name another run"),
    ("run --budgets=4,x", "--budgets must be whole numbers"),
    ("run --conditions=direct,thinking", "there is no 'thinking'; choose some of direct"),
    ("run --format=html", "--format must be one of text, markdown, json, latex"),
    ("published", "--data is missing: published is no run, which would name its own"),
    ("published --data=data", "--split is missing: published is no run"),
]
_STUDY = [
    ("colour", "there is no study 'colour'; name one"),
    ("refresh --seeds=0,x", "--seeds must be different whole numbers"),
    ("refresh --seeds=1,1", "--seeds must be different"),
    ("refresh --out=page.txt", "must end in .md"),
    ("refresh --out=file/page.md", "--out: cannot write to file/page.md: "),
    ("refresh --config.index.policy=full", "config.index.policy must be one of round_robin, "),
    ("refresh --config.rl.steps=0", "config.rl.steps leaves nothing to study"),
    ("refresh --config.init_from=nowhere", "nowhere holds no checkpoint of a stage; name"),
    ("refresh --config.init_from=a,b", "names 2 runs for 3 seeds"),
    ("reward --config.rl.reward.k=0", "config.rl.reward.k must be at least 1"),
]
_RESUMED = [
    ("--config.seed=1", "holds a run with config.seed=0, not 1; name another --workdir or remove that folder"),
    ("--config.rl.group_size=2", "holds a run with config.rl.group_size=4, not 2;"),
    ("--config.rl.steps=8", "holds a run with config.rl.steps=4, not 8;"),
    ("--accept=rl.step", "--accept: there is no 'rl.step' (did you mean rl.steps?)"),
]

MISTAKES = [
    *(command(f"train {words}", says) for words, says in _TRAIN),
    *(command(f"train --workdir=run {words}", says) for words, says in _RESUMED),
    *(_file(text, says) for text, says in _FILES),
    *(command(f"evaluate {words}".strip(), says) for words, says in _EVALUATE),
    *(command(f"study {words}", says) for words, says in _STUDY),
]
