"""What a config's fields may hold: one table, checked before any work starts.

Each row names the fields it looks at (dotted), a predicate over their values, and what the user is told. A
row with a field that the config does not have is skipped, so one table serves every config. In sentences
{0}, {1} are the values of the named fields. A predicate that raises ValueError says the sentence itself.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from r3jax.errors import UserError
from r3jax.model.attention import KERNELS
from r3jax.model.hub import is_hub_id
from r3jax.model.lora import TARGETS
from r3jax.model.qwen2 import REMAT
from r3jax.rl.algorithms import ADVANTAGES, KLS, NORMALISERS, OVERLONG, RATIOS
from r3jax.rl.mix import ON_NAN, Retrieval
from r3jax.search.index import KINDS, LEAST_TREE
from r3jax.search.refresh import POLICIES


@dataclasses.dataclass(frozen=True)
class Rule:
    fields: tuple[str, ...]
    holds: Callable[..., bool]
    sentence: str


def at_least(low: float, *fields: str, why: str = "") -> list[Rule]:
    return [Rule((f,), lambda v: v >= low, f"must be at least {low}{why}, not {{0}}") for f in fields]


def above(low: float, *fields: str, why: str = "") -> list[Rule]:
    return [Rule((f,), lambda v: v > low, f"must be above {low}{why}, not {{0}}") for f in fields]


def between(low: float, high: float, *fields: str) -> list[Rule]:
    return [Rule((f,), lambda v: low <= v <= high, f"must be between {low} and {high}, not {{0}}") for f in fields]


def one_of(field: str, *options: str) -> list[Rule]:
    return [Rule((field,), lambda v: v in options, f"must be one of {', '.join(options)}, not {{0!r}}")]


def _has(name: str) -> Callable[[str], bool]:
    return lambda path: (pathlib.Path(path) / name).is_file()


def _has_split(path: str, split: str) -> bool:
    file = pathlib.Path(path) / "qrels" / f"{split}.tsv"
    return bool(split) and (file.is_file() or file.with_name(f"{split}.jsonl").is_file())


def _is_here(name: str) -> bool:
    """Whether it can be looked into now: a name on the hub only when it was fetched."""
    return pathlib.Path(name).is_dir() or not is_hub_id(name)


def _has_weights(path: str) -> bool:
    folder = pathlib.Path(path)
    return (folder / "checkpoints").is_dir() or any(folder.glob("*.safetensors"))


def _has_tokenizer(path: str) -> bool:
    """As a run of ours keeps it, or as a Hugging Face folder does."""
    return _has("tokenizer/tokenizer.json")(path) or _has("tokenizer.json")(path)


RULES: list[Rule] = [
    Rule(("name",), lambda v: v not in ("", ".", "..") and "/" not in v, "must be a name without a slash, not {0!r}"),
    *between(0, 2**31 - 2, "seed"),  # stage 2 uses the next one
    Rule(
        ("init_from", "from_scratch"),
        lambda v, scratch: bool(v) or scratch,
        "is empty; give the folder of a Qwen-2.5 checkpoint, or set config.from_scratch=True for random weights",
    ),
    Rule(
        ("init_from",),
        lambda v: not v or pathlib.Path(v).is_dir() or is_hub_id(v),
        "names {0!r}, which does not exist; give the folder of a run or of a Hugging Face checkpoint",
    ),
    Rule(
        ("init_from",),
        lambda v: not v or not _is_here(v) or _has_weights(v),
        "names {0!r}, which holds neither checkpoints/ (a run) nor *.safetensors (a Hugging Face checkpoint)",
    ),
    Rule(
        ("init_from", "tokenizer.path"),
        lambda v, own: not v or own or not _is_here(v) or _has_tokenizer(v),
        "names {0!r}, which holds no tokenizer.json; set config.tokenizer.path to a folder that does",
    ),
    # data
    Rule(("data.path",), lambda v: pathlib.Path(v).is_dir(), "names {0!r}, which is not a folder"),
    Rule(
        ("data.path",),
        _has("corpus.jsonl"),
        "names {0!r}, which holds no corpus.jsonl (a BEIR data set does)",
    ),
    Rule(
        ("data.path",),
        _has("queries.jsonl"),
        "names {0!r}, which holds no queries.jsonl (a BEIR data set does)",
    ),
    *one_of("data.on_error", "strict", "skip"),
    Rule(
        ("data.train_split", "data.path"),
        lambda s, p: _has_split(p, s),
        "is {0!r}, but {1}/qrels/{0}.tsv is not there",
    ),
    Rule(
        ("data.validation_split", "data.path"),
        lambda s, p: _has_split(p, s),
        "is {0!r}, but {1}/qrels/{0}.tsv is not there",
    ),
    Rule(("data.eval_splits",), lambda splits: len(splits) > 0, "must name at least one split of data.path"),
    Rule(
        ("data.eval_splits", "data.path"),
        lambda splits, p: all(_has_split(p, s) for s in splits),
        "is {0}, but {1}/qrels does not hold a .tsv file for each",
    ),
    Rule(
        ("data.train_split", "data.eval_splits"),
        lambda train, held_out: train not in held_out,
        "is {0!r}, which data.eval_splits holds too; an evaluation on training queries shows nothing",
    ),
    Rule(
        ("data.validation_split", "data.train_split", "data.eval_splits"),
        lambda v, train, held_out: v != train and v not in held_out,
        "is {0!r}, which trains or evaluates too; what chooses the weights must be a split of its own",
    ),
    *at_least(1, "data.max_query_tokens", "data.max_doc_tokens", "data.max_thought_tokens"),
    *at_least(0, "data.workers", "data.thought_query_terms", "data.thought_document_terms"),
    # tokenizer: 256 bytes and a handful of special tokens are the least that a byte-level BPE can have
    *at_least(300, "tokenizer.vocab_size"),
    Rule(
        ("tokenizer.path",),
        lambda v: not v or _has_tokenizer(v),
        "names {0!r}, which is not a folder with a tokenizer.json",
    ),
    # model
    *at_least(1, "model.layers", "model.width", "model.heads", "model.kv_heads", "model.head_dim", "model.ffn"),
    *at_least(1, "model.vocab"),
    *above(1, "model.rope_theta"),
    *above(0, "model.norm_eps"),
    *at_least(1, "model.rope_factor", why=" (1 is plain RoPE, above is YaRN)"),
    *at_least(1, "model.rope_original_length", "model.max_positions"),
    Rule(("model.head_dim",), lambda v: v % 2 == 0, "must be even, for rotary positions turn pairs, not {0}"),
    Rule(
        ("model.heads", "model.kv_heads"),
        lambda n, k: n % k == 0,
        "({0}) must be a multiple of model.kv_heads ({1})",
    ),
    Rule(
        ("model.vocab", "tokenizer.vocab_size", "tokenizer.path", "init_from"),
        lambda rows, tokens, *given: any(given) or rows >= tokens,  # one that is given has its own size
        "({0} rows) must be at least tokenizer.vocab_size ({1})",
    ),
    *one_of("model.compute_dtype", "float32", "bfloat16"),
    *one_of("model.param_dtype", "float32", "bfloat16"),
    *one_of("model.remat", *REMAT),
    *one_of("model.attention", *KERNELS),
    # adapters
    *at_least(0, "lora.rank"),
    *above(0, "lora.alpha"),
    Rule(("lora.dropout",), lambda v: 0 <= v < 1, "must be at least 0 and below 1, not {0}"),
    Rule(
        ("lora.targets",),
        lambda v: set(v) <= set(TARGETS) and len(set(v)) == len(v),
        f"must name each of {', '.join(TARGETS)} at most once, and nothing else, not {{0}}",
    ),
    Rule(
        ("lora.targets", "lora.rank"),
        lambda targets, rank: not rank or len(targets) > 0,
        "is empty, but lora.rank is {1}; name what to adapt, or set config.lora.rank=0",
    ),
    Rule(
        ("lora.rank", "init_from"),
        lambda rank, source: not rank or bool(source),
        "is {0}, but config.init_from is empty; an adapter needs a base that has learnt something",
    ),
    # mesh
    *[
        Rule((f,), lambda v: v == -1 or v >= 1, "must be at least 1, or -1 for all devices left, not {0}")
        for f in ("mesh.data", "mesh.fsdp", "mesh.tensor")
    ],
    Rule(
        ("mesh.data", "mesh.fsdp", "mesh.tensor"),
        lambda *sizes: sizes.count(-1) <= 1,
        "and mesh.fsdp and mesh.tensor are {0}, {1}, {2}; only one of them may be -1",
    ),
    Rule(
        ("mesh.tensor", "model.kv_heads"),
        lambda t, k: t == -1 or k % t == 0,
        "({0}) must divide model.kv_heads ({1}), for a head is never cut",
    ),
    # stage 1
    *at_least(1, "sft.chunks"),
    *at_least(0, "sft.steps", "sft.warmup", "sft.weight_decay", "sft.margin"),
    *at_least(2, "sft.batch_size", why=", for the other queries' documents are the negatives"),
    *above(0, "sft.learning_rate", "sft.clip_norm", "sft.temperature"),
    *at_least(0, "sft.ce_weight", "sft.kl_weight", "sft.infonce_weight", "sft.triplet_weight"),
    Rule(
        ("sft.ce_weight", "sft.kl_weight", "sft.infonce_weight", "sft.triplet_weight", "sft.steps"),
        lambda *v: v[-1] == 0 or any(v[:-1]),
        "and the other three weights of sft are all 0, so stage 1 would learn nothing",
    ),
    *between(0, 1, "sft.corrupt_thoughts", "sft.pseudo_queries"),
    # stage 2
    *at_least(0, "rl.steps", "rl.warmup", "rl.weight_decay"),
    *at_least(1, "rl.prompts", "rl.chunks", "rl.epochs", "rl.reward.k", "rl.reward.max_tokens"),
    *at_least(0, "rl.probe_every", "rl.dynamic_sampling"),
    *at_least(1, "rl.importance_cap", why=", for weights around 1 are right"),
    *at_least(2, "rl.group_size", why=", for an advantage compares completions of the same query"),
    *above(0, "rl.temperature", "rl.learning_rate", "rl.clip_norm", "rl.contrastive_temperature"),
    Rule(("rl.top_p",), lambda v: v == 1, "must be 1, for truncated sampling biases the policy ratio, not {0}"),
    Rule(("rl.top_k",), lambda v: v == 0, "must be 0, for truncated sampling biases the policy ratio, not {0}"),
    *one_of("rl.advantage", *ADVANTAGES),
    *one_of("rl.ratio", *RATIOS),
    *one_of("rl.normalise", *NORMALISERS),
    Rule(
        ("rl.ratio", "rl.normalise"),
        lambda ratio, normalise: ratio != "sequence" or normalise == "sequence",
        "is sequence, but rl.normalise is {1}, which weighs a rollout by its length; set rl.normalise=sequence",
    ),
    *one_of("rl.kl", *KLS),
    *above(0, "rl.clip_low", "rl.clip_high"),
    Rule(("rl.clip_low",), lambda v: v < 1, "must be below 1, not {0}"),
    *at_least(0, "rl.kl_weight", "rl.hard_negatives", "rl.contrastive_weight"),
    Rule(
        ("rl.kl", "rl.kl_weight"),
        lambda kind, weight: kind != "none" or not weight,
        "is none, but rl.kl_weight is {1}; set rl.kl_weight=0, or k2 or k3",
    ),
    Rule(("rl.reference_decay",), lambda v: 0 <= v < 1, "must be at least 0 and below 1, not {0}"),
    Rule(
        ("rl.reference_decay", "rl.kl_weight"),
        lambda decay, weight: not decay or weight > 0,
        "is {0}, but rl.kl_weight is 0, so nothing looks at the reference; set a weight, or rl.reference_decay=0",
    ),
    Rule(
        ("rl.reference_decay", "lora.rank"),
        lambda decay, rank: not decay or not rank,
        "is {0}, but with lora.rank={1} the reference is the base that the adapter needs as it is; set it to 0",
    ),
    Rule(
        ("rl.reference_decay", "model.param_dtype"),
        lambda decay, dtype: not decay or dtype == "float32",
        "is {0}, but in model.param_dtype={1} its small steps would be rounded away; use float32, or 0",
    ),
    *one_of("rl.overlong", *OVERLONG),
    *at_least(1, "rl.overlong_window"),
    Rule(
        ("rl.overlong_window", "rl.overlong", "data.max_thought_tokens"),
        lambda window, kind, limit: kind != "soft" or window <= limit,
        "({0}) must not exceed data.max_thought_tokens ({2})",
    ),
    Rule(("rl.reward.name",), lambda v: bool(Retrieval(v)), "must name a reward, not {0!r}"),
    *one_of("rl.reward.on_nan", *ON_NAN),
    *at_least(0, "rl.reward.retrieval", "rl.reward.format", "rl.reward.length", "rl.reward.min_tokens"),
    Rule(
        ("rl.reward.min_tokens", "rl.reward.max_tokens"),
        lambda low, high: low <= high,
        "({0}) must not exceed rl.reward.max_tokens ({1})",
    ),
    Rule(
        ("rl.reward.max_tokens", "data.max_thought_tokens"),
        lambda wanted, limit: wanted <= limit,
        "({0}) must not exceed data.max_thought_tokens ({1})",
    ),
    Rule(
        ("rl.reward.retrieval", "rl.reward.format", "rl.reward.length"),
        lambda *v: any(v),
        "and the other two weights of rl.reward are all 0, so every completion would be as good as another",
    ),
    # index
    *one_of("index.kind", *KINDS),
    *one_of("index.policy", *POLICIES),
    *between(0, 1, "index.budget", "index.rebuild_below", "index.round_robin_share"),
    *at_least(LEAST_TREE, "index.tree_above", why=", for a tree has to be trained on something"),
    *at_least(0, "index.max_age", "index.probes", "index.fresh_negatives"),
    Rule(
        ("index.max_age", "index.budget", "index.policy"),
        lambda age, budget, policy: not age or policy == "full" or (policy != "none" and age * budget >= 2 - 1e-9),
        "({0}) asks for every document once in so many steps, which index.budget={1} with policy {2} cannot give "
        "with half of it; "
        "raise either, or set config.index.max_age=0 for no bound",
    ),
    Rule(
        ("index.max_age", "index.budget", "index.policy", "rl.dynamic_sampling"),
        lambda age, budget, policy, rounds: not age or policy == "full" or age * budget >= (2 - 1e-9) * (1 + rounds),
        "({0}) asks for every document once in so many steps, which index.budget={1} cannot give where a step's first "
        "round may spend its share alone, for rl.dynamic_sampling is {3}; raise either, or set config.index.max_age=0",
    ),
    *at_least(1, "index.over_retrieve"),
    Rule(
        ("index.over_retrieve", "rl.reward.k"),
        lambda candidates, k: candidates >= k,
        "({0} candidates) must be at least rl.reward.k ({1}), for the reward ranks the best k of them",
    ),
    # state and what the user sees
    *at_least(1, "checkpoint.every", "checkpoint.keep", "log.every", "evaluate.batch_size"),
    *at_least(0, "log.samples_every", "evaluate.every", "evaluate.thoughts", "evaluate.max_ability_kl"),
    *at_least(0, "evaluate.collapse.evaluations", "processes.hang"),
    *between(0, 1, "evaluate.collapse.token_rate", "evaluate.collapse.ndcg"),
]


def check(values: Mapping[str, Any]) -> None:
    """Raises a UserError for the first rule that the values (dotted key to leaf) break."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key} must be a finite number, not {value}.")
    for rule in RULES:
        if not all(f in values for f in rule.fields):
            continue
        given = [values[f] for f in rule.fields]
        try:
            holds = rule.holds(*given)
        except (TypeError, AttributeError):  # a config file that puts text where a number belongs, or the reverse
            holds = False
        except ValueError as e:
            raise UserError(f"config.{rule.fields[0]} {e}.") from None
        if not holds:
            raise UserError(f"config.{rule.fields[0]} {rule.sentence.format(*given)}.")
