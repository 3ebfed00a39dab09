"""From a config to the parts of a run: mesh, data, tokenizer, weights, stages. Only entry points use it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection

import jax
import numpy as np
from ml_collections import ConfigDict

from r3jax import processes, weights
from r3jax.data import beir, chats, store, thoughts
from r3jax.errors import UserError, writing
from r3jax.model import attention, lora
from r3jax.model import params as model_params
from r3jax.model.hub import local_folder
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.sharding import batch_parts
from r3jax.reader import OnRows, Reader, nobody, unheard
from r3jax.rl.environment import Environment, RefreshConfig, RewardConfig
from r3jax.run import config as run_config
from r3jax.run import fingerprint
from r3jax.search.sharded import build as build_index
from r3jax.stages import policy, rl, sft
from r3jax.stages.ability import Ability
from r3jax.stages.mining import bm25_neighbours
from r3jax.stages.state import Stage, TrainState, abstract_state, new_state, optimiser
from r3jax.text import settings
from r3jax.text import tokenizer as tokenizers
from r3jax.text.prompts import ChatFormat, Prompts


def claim(workdir: pathlib.Path, config: ConfigDict, accept: Collection[str] = ()) -> bool:
    """Saves the config in the run's folder; True if a run has begun there, which has then the same config.

    accept: fields in which it may differ all the same.

    Raises UserError for another run's folder and for one that cannot be written. A run has begun with its
    first checkpoint: whoever mends a mistake before that may use the folder again.
    """
    path = workdir / run_config.SAVED_NAME
    begun = weights.last_stage(workdir) is not None
    if begun:
        fingerprint.refuse_config(workdir, run_config.load_saved(path), config, accept)
    with writing("--workdir", workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if processes.leads():
            run_config.save(config, path)
    return begun


def check_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for attention that does not run there, or a batch that cannot be split evenly."""
    attention.check(config.model.attention, mesh.devices.flat[0].platform, config.model.compute_dtype)
    parts = batch_parts(mesh)
    for stage, field in (("sft", "batch_size"), ("rl", "prompts")):
        if stage in config:
            size, chunks = config[stage][field], config[stage].chunks
            if size % (parts * chunks):
                raise UserError(
                    f"config.{stage}.{field}={size} must be a multiple of {parts * chunks}, for the mesh has "
                    f"{parts} parts (data x fsdp) and config.{stage}.chunks is {chunks}; python -m r3jax.plan finds "
                    "what fits."
                )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every entry point needs of a run: data, tokenizer and model sizes, on a mesh."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    dataset: beir.Dataset
    chat: ChatFormat
    model: ModelConfig
    beat: Callable[[], None] = unheard

    @functools.cached_property
    def thinker(self) -> thoughts.Thinker | None:
        """Who writes supervised thoughts; None where the data set brings them, or none are wanted."""
        d = self.config.data
        if self.dataset.thoughts or not d.thought_query_terms + d.thought_document_terms:
            return None
        return thoughts.Thinker(
            self.dataset,
            query_terms=d.thought_query_terms,
            document_terms=d.thought_document_terms,
            split=d.train_split,
            is_word=lambda term: len(self.chat.tokenizer.encode(f" {term}")) == 1,
        )

    @functools.cached_property
    def source(self) -> store.TrainingSource:
        """The training records, written to the cache once; thoughts that are made for them go to the run."""
        d = self.config.data
        found = self.dataset.thoughts
        if self.thinker is not None:
            found = thoughts.build(self.dataset, self.thinker, d.train_split)
            if processes.leads():
                thoughts.write(found, self.workdir / "thoughts.jsonl")
        cache = pathlib.Path(d.cache)
        return processes.in_turn(lambda first: store.training_source(self.dataset, d.train_split, cache, found))

    @functools.cached_property
    def most_positives(self) -> int:
        """Of any training query."""
        return max(map(len, self.dataset.positives(self.config.data.train_split).values()))

    @functools.cached_property
    def grades(self) -> dict[int, list[int]]:
        """Of the positives of each training query, by its row."""
        data = self.dataset
        return {data.query_row[query]: found for query, found in data.grades(self.config.data.train_split).items()}

    @functools.cached_property
    def documents(self) -> list[list[int]]:
        """Token rows of the corpus."""
        return self.chat.documents(self.dataset.doc_texts, self.config.data.max_doc_tokens)

    @functools.cached_property
    def reader(self) -> Reader:
        c = self.config
        return Reader(
            model=self.model,
            mesh=self.mesh,
            chat=self.chat,
            max_query=c.data.max_query_tokens,
            max_new=c.data.max_thought_tokens + 1,
            thoughts=c.evaluate.get("thoughts", 0),  # runs from before it are read too
            batch_size=c.evaluate.batch_size,
            beat=self.beat,
        )

    @functools.cached_property
    def ability(self) -> Ability | None:
        """The general-ability check; None where no KL term, no adapter and no bound asks for it."""
        c = self.config
        held = [c[stage].kl_weight for stage in ("sft", "rl") if stage in c]
        if not (self.model.lora or any(held) or c.evaluate.max_ability_kl):
            return None
        return Ability(chats.CHATS, self.chat, self.model, self.mesh, self.workdir / "ability" / "base.npy")

    @property
    def lengths(self) -> sft.Lengths:
        d = self.config.data
        return sft.Lengths(d.max_query_tokens, d.max_doc_tokens, d.max_thought_tokens)

    def encode_corpus(self, params, on_rows: OnRows = nobody) -> np.ndarray:
        """Unit vectors [N, D] of the corpus under `params`; of several processes, each one's share of the rows."""
        return self.reader.encode(params, self.documents, on_rows, processes.here().share(len(self.documents)))

    def initial_params(self):
        """Random weights, or those that init_from names; UserError if they do not fit the config."""
        source = self.config.init_from
        if not source:
            return model_params.init(self.model, self.mesh, self.config.seed, self.chat.tokenizer.embed_id)
        folder = local_folder(source)
        given = (folder, self.model, self.mesh, self.chat.tokenizer)
        if weights.is_run(source):
            return weights.of_another_run(*given)
        return weights.load_published(*given, words=self.config.tokenizer.path)


def parts(
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    data: str | None = None,
    begun: bool = True,
    beat: Callable[[], None] = unheard,
) -> Parts:
    """Reads the data set and the tokenizer, and fixes the model's sizes.

    `data` is another data set's folder than the config's. The tokenizer is built once and kept with the run;
    `begun` False builds it anew, for the kept one may be of another config. `beat` hears of each batch that is read.
    """
    d = config.data
    dataset = beir.load(data or d.path, on_error=d.on_error)
    if "rl" in config and not data and len(dataset.doc_ids) < config.rl.reward.k:
        raise UserError(
            f"config.rl.reward.k={config.rl.reward.k} must not exceed the {len(dataset.doc_ids)} documents of {d.path}."
        )
    tokenizer = processes.in_turn(lambda first: _tokenizer(config, workdir, dataset, begun or not first))
    chat = ChatFormat(tokenizer, Prompts(**config.prompts))
    model = weights.here(weights.model_config(config, tokenizer), mesh)
    return Parts(config, workdir, mesh, dataset, chat, model, beat)


def keep_start(p: Parts, start) -> None:
    """Keeps in the run's folder what it needs of the weights it began with: an adapter's base, the base's chats."""
    base, _ = lora.split(start)
    if p.model.lora:
        weights.save_base(p.workdir, base)
    if p.ability:
        p.ability.remember(base)


def keep_ability(p: Parts) -> None:
    """Keeps how a begun run's base answers the ordinary chats where that was not asked for when it began.

    Raises UserError as `Parts.initial_params` does, where the weights it began with are gone.
    """
    if p.ability and not p.ability.file.is_file():
        base = weights.load_base(p.workdir, p.model, p.mesh) if p.model.lora else p.initial_params()
        p.ability.remember(lora.split(base)[0])


def start_name(config: ConfigDict, plan: list[str]) -> str:
    """What to call the weights a run begins with, beside the stages of its plan."""
    if not weights.is_trained(config.init_from):
        return "untrained"
    stage = weights.trained_stage(pathlib.Path(config.init_from))
    return "start" if stage in plan else stage


def make_stage(name: str, p: Parts, start) -> Stage:
    """A stage of the config. `start` are the weights it begins with; None for one that will be resumed."""
    return (_sft if name == "sft" else _rl)(p, start)


def first_state(name: str, p: Parts, start) -> TrainState:
    """A stage's TrainState at step 0; under LoRA on the adapter that `start` holds, or a new one.

    So stage 2 goes on with stage 1's adapter, and the reference stays the adapter off. An adapter's state takes the
    base in `start` over.
    """
    tx, keep = _optimiser(name, p.config)
    if p.model.lora is None:
        return new_state(start, tx, p.mesh, keep)
    base, adapter = lora.split(start)
    adapter = adapter or lora.init(base, p.model, p.mesh, p.config.seed)
    return new_state(adapter, tx, p.mesh, False, base)


def abstract_stage_state(name: str, p: Parts) -> TrainState:
    """Shapes and shardings of what a checkpoint holds of a stage's TrainState (see `to_keep`)."""
    tx, keep = _optimiser(name, p.config)
    if p.model.lora is None:
        return abstract_state(model_params.abstract(p.model, p.mesh), tx, p.mesh, keep)
    return abstract_state(lora.abstract(p.model, p.mesh), tx, p.mesh, False)


def to_keep(state: TrainState, p: Parts) -> TrainState:
    """What a checkpoint holds of a state: not an adapter's base, which lies in the run's folder once."""
    return state.replace(reference=None) if p.model.lora else state


def restored(state: TrainState, p: Parts) -> TrainState:
    """The inverse of `to_keep`."""
    return state.replace(reference=weights.load_base(p.workdir, p.model, p.mesh)) if p.model.lora else state


def _optimiser(name: str, config: ConfigDict):
    c = config[name]
    tx = optimiser(
        learning_rate=c.learning_rate,
        warmup=c.warmup * c.get("epochs", 1),
        steps=c.steps * c.get("epochs", 1),
        weight_decay=c.weight_decay,
        clip_norm=c.clip_norm,
    )
    return tx, c.kl_weight > 0


def _sft(p: Parts, start) -> Stage:
    c = p.config
    tx, _ = _optimiser("sft", c)
    negatives = bm25_neighbours(p.dataset, c.data.train_split) if c.data.hard_negatives else None
    return sft.SFT(
        source=p.source,
        transform=sft.PairTransform(
            p.source,
            p.dataset,
            p.chat,
            p.lengths,
            corrupt_thoughts=c.sft.corrupt_thoughts,
            pseudo_queries=c.sft.pseudo_queries,
            think=p.thinker,
            negatives=negatives,
            most_positives=p.most_positives,
        ),
        chat=p.chat,
        model=p.model,
        mesh=p.mesh,
        tx=tx,
        steps=c.sft.steps,
        batch_size=c.sft.batch_size,
        chunks=c.sft.chunks,
        seed=c.seed,
        workers=c.data.workers,
        weights=sft.Weights(c.sft.ce_weight, c.sft.kl_weight, c.sft.infonce_weight, c.sft.triplet_weight),
        temperature=c.sft.temperature,
        margin=c.sft.margin,
    )


def _rl(p: Parts, start) -> Stage:
    c, r = p.config, p.config.rl
    tx, _ = _optimiser("rl", c)
    soft = r.overlong == "soft"
    terms = {name: r.reward[name] for name in ("retrieval", "format", "length")}
    reward = RewardConfig(
        r.reward.name,
        r.reward.k,
        terms | ({"overlong": 1.0} if soft else {}),
        r.reward.min_tokens,
        r.reward.max_tokens,
        overlong_window=r.overlong_window if soft else 0,
        limit=c.data.max_thought_tokens,
    )
    size = len(p.documents)
    refresh = RefreshConfig(
        policy=c.index.policy,
        budget=int(c.index.budget * size),
        over_retrieve=c.index.over_retrieve,
        max_age=c.index.max_age or None,
        share=c.index.round_robin_share,
        rebuild_below=c.index.rebuild_below,
        fresh_negatives=c.index.fresh_negatives,
        carry=c.index.carry,
    )
    if start is not None:
        vectors = p.encode_corpus(start)
    else:  # a stand-in: the checkpoint brings the index
        mine = processes.here().share(size)
        vectors = np.zeros((mine.stop - mine.start, p.model.width), np.float32)
        vectors[:, 0] = 1
    kind = c.index.kind if start is not None else "exact"
    index = build_index(vectors, size, 0, kind, tree_above=c.index.tree_above)
    return rl.RL(
        source=p.source,
        queries=p.dataset.query_texts,
        documents=p.documents,
        chat=p.chat,
        lengths=p.lengths,
        environment=Environment(index, reward, refresh, probes=c.index.probes, seed=c.seed),
        model=p.model,
        mesh=p.mesh,
        tx=tx,
        steps=r.steps,
        prompts=r.prompts,
        group=r.group_size,
        chunks=r.chunks,
        encode_batch=c.evaluate.batch_size,
        probe_every=r.probe_every,
        most_positives=p.most_positives,
        grades=p.grades,
        seed=c.seed + 1,  # another order and other noise than stage 1
        refill=r.dynamic_sampling,
        mask_overlong=r.overlong == "mask",
        on_nan=r.reward.on_nan,
        policy=policy.PolicyConfig(
            advantage=r.advantage,
            normalise=r.normalise,
            ratio=r.ratio,
            clip_low=r.clip_low,
            clip_high=r.clip_high,
            kl=r.kl,
            kl_weight=r.kl_weight,
            contrastive_weight=r.contrastive_weight,
            contrastive_temperature=r.contrastive_temperature,
            hard_negatives=r.hard_negatives,
            temperature=r.temperature,
            max_new=c.data.max_thought_tokens + 1,
            epochs=r.epochs,
            importance_cap=r.importance_cap,
            reference_decay=r.reference_decay,
        ),
    )


def _tokenizer(config: ConfigDict, workdir: pathlib.Path, dataset: beir.Dataset, begun: bool):
    kept = workdir / "tokenizer"
    if begun and (kept / "tokenizer.json").is_file():
        return tokenizers.load(kept)
    source = config.tokenizer.path or config.init_from
    if source:
        folder = pathlib.Path(source) if config.tokenizer.path else local_folder(source)
        inside = folder / "tokenizer"  # a run of ours keeps it there
        known = settings.read(folder)
        tokenizer = tokenizers.load(inside if inside.is_dir() else folder, lowercase=bool(known and known.lowercase))
    else:
        rows = [dataset.query_row[q] for q in dataset.positives(config.data.train_split)]
        texts = [dataset.query_texts[r] for r in rows] + dataset.doc_texts
        # The prompts are read with every text: count them often, so that their words become one token each.
        words = [config.prompts.direct_system, config.prompts.reasoning_system]
        t = config.tokenizer
        tokenizer = tokenizers.train_bpe(texts + words * (len(texts) // 10), t.vocab_size, t.lowercase)
    tokenizer.save(kept)
    return tokenizer
