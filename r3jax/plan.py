"""What a run costs on chips that are not here."""

import pathlib
from functools import cached_property

import jax
from ml_collections import ConfigDict

from r3jax import assembly, weights
from r3jax.data.beir import Dataset
from r3jax.model import lora
from r3jax.model import params as model_params
from r3jax.model.sharding import batch_parts, make_mesh
from r3jax.planning import programs
from r3jax.text import tokenizer as tokenizers
from r3jax.text.prompts import ChatFormat, Prompts


class Longest(assembly.Parts):
    """Parts of a run on texts that are all longer than the config reads, with nothing on disk."""

    thinker = None
    most_positives = 1

    @cached_property
    def source(self):
        return [{"query": self.dataset.query_texts[0], "query_row": 0, "positives": [0], "thought": self.dataset.doc_texts[0]}]


def longest_parts(config: ConfigDict, mesh) -> Longest:
    d = config.data
    prompts = Prompts(**config.prompts)
    size = config.rl.reward.k + 1 if "rl" in config else 1
    text = " and" * max(d.max_doc_tokens, d.max_query_tokens, d.max_thought_tokens)
    dataset = Dataset("plan", ["d"] * size, [text] * size, ["q"], [text], {}, {}, [], "")
    tokenizer = tokenizers.train_bpe([text, *vars(prompts).values()], 2000)
    chat = ChatFormat(tokenizer, prompts)
    return Longest(config, pathlib.Path(), mesh, dataset, chat, weights.model_config(config, tokenizer))


def programs_of(config, mesh):
    here = make_mesh(devices=jax.devices("cpu")[:1])
    parts = longest_parts(config, here)
    stages = {name: assembly.make_stage(name, parts, None) for name in ("sft", "rl") if name in config}
    object.__setattr__(parts, "mesh", mesh)
    params = model_params.abstract(parts.model, mesh)
    def state(name):
        s = assembly.abstract_stage_state(name, parts)
        return s.replace(reference=params) if parts.model.lora else s
    def rows(n, chunks):
        k = batch_parts(mesh) * chunks
        return -(-n // k) * k
    out = []
    c = config
    transform = assembly.sft.PairTransform(parts.source, parts.dataset, parts.chat, parts.lengths, 0.0)
    out.append(programs.supervised(stages["sft"], state("sft"), mesh, transform, parts.source[0], rows(c.sft.batch_size, c.sft.chunks)))
    w = state("rl").weights if not parts.model.lora else lora.join(params, state("rl").params)
    out.append(programs.rollout(stages["rl"], w, mesh, rows(c.rl.prompts, 1)))
    out.append(programs.encoding(parts.model, w, mesh, c.evaluate.batch_size, parts.chat.direct_extra + c.data.max_doc_tokens))
    out.append(programs.policy_update(stages["rl"], state("rl"), mesh, rows(c.rl.prompts, c.rl.chunks)))
    return out
