"""Checkpoints in the shapes of Qwen-2.5, made by transformers and imported: the same words, states and probabilities.

Weights are random, but such that every part matters and the best token leads clearly.
"""

import dataclasses
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from configs.base import QWEN2_5
from r3jax.model.hugging_face import load_hugging_face
from r3jax.model.hugging_face_config import read_config
from r3jax.model.qwen2 import ModelConfig, hidden_states, logits
from r3jax.model.sampler import sample
from r3jax.model.sharding import make_mesh, put_batch
from tests.tiny_model import reference

PROMPTS, NEW = 16, 64
FIELDS = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied")


def shape(size: str, **changes) -> ModelConfig:
    """The published sizes, with changes."""
    return ModelConfig(**(dict(zip(FIELDS, QWEN2_5[f"qwen2_5_{size}"], strict=True)) | changes))


def scaled(size: str, by: int) -> ModelConfig:
    """The published head counts and proportions; two layers, everything else `by` times smaller."""
    c = shape(size)
    return dataclasses.replace(c, layers=2, width=c.width // by, head_dim=c.head_dim // by, ffn=c.ffn // by, vocab=512)


SHAPES = {
    "1_5b": (scaled("1_5b", 16), (1, 1, 1)),
    "3b": (scaled("3b", 16), (1, 1, 1)),
    "7b": (scaled("7b", 16), (1, 2, 4)),
    "72b": (scaled("72b", 16), (1, 1, 1)),
}


def checkpoint(config: ModelConfig, folder: pathlib.Path) -> Qwen2ForCausalLM:
    """transformers' decoder, saved in a folder. Small embeddings: a tied model would repeat what it reads."""
    model = reference(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    return model


def prompts_of(config: ModelConfig, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen right-padded prompts of different lengths, and their lengths."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, longest, PROMPTS).astype(np.int32)
    return rng.integers(0, config.vocab, (PROMPTS, longest), dtype=np.int32), lengths


def their_words(model: Qwen2ForCausalLM, prompts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[PROMPTS, NEW] greedy tokens by transformers, from one left-padded batch."""
    mask = np.arange(prompts.shape[1])[::-1] < lengths[:, None]
    rows = np.zeros_like(prompts)
    for i, n in enumerate(lengths):
        rows[i, -n:] = prompts[i, :n]
    out = model.generate(
        torch.tensor(rows, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, prompts.shape[1] :].numpy()


def joined(prompts: np.ndarray, lengths: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of prompt and continuation, and their lengths."""
    rows = np.zeros((len(prompts), prompts.shape[1] + NEW), np.int32)
    for i, n in enumerate(lengths):
        rows[i, : n + NEW] = [*prompts[i, :n], *words[i]]
    return rows, lengths + NEW


def log_probs(scores, rows: np.ndarray) -> np.ndarray:
    """Log-probability of each token but the first, in fp32."""
    logp = jax.nn.log_softmax(jnp.asarray(scores, jnp.float32)[:, :-1])
    return np.asarray(jnp.take_along_axis(logp, rows[:, 1:, None], -1)[..., 0])


@partial(jax.jit, static_argnames="config")
def read_all(params, config, tokens, lengths):
    hidden = hidden_states(params, config, tokens, lengths)
    return hidden, logits(params, config, hidden)


def logits_of(model: Qwen2ForCausalLM, rows: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """transformers' last hidden states and logits, as fp32."""
    with torch.no_grad():
        ids, mask = (torch.tensor(x, dtype=torch.long) for x in (rows, valid))
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1].float().numpy(), out.logits.float().numpy()


def check(
    model: Qwen2ForCausalLM, config: ModelConfig, mesh: jax.sharding.Mesh, folder: pathlib.Path, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """fp32: words, states and log-probabilities. Returns the rows that were read and written, and their lengths."""
    read = dataclasses.replace(config, **read_config(folder))
    assert read == config
    params = load_hugging_face(folder, read, mesh, None)
    prompts, lengths = prompts_of(config, longest)
    want = their_words(model, prompts, lengths)
    assert len(np.unique(want)) > 3 * PROMPTS  # they do write
    unused = int(np.setdiff1d(np.arange(config.vocab), want)[0])

    with jax.set_mesh(mesh):
        done = sample(
            params,
            *put_batch(mesh, (prompts, lengths, np.arange(PROMPTS, dtype=np.int32))),
            jax.random.key(0),
            config=config,
            group=1,
            max_new=NEW + 1,
            temperature=0.0,
            embed_id=unused,
            stop_ids=(),
        )
    np.testing.assert_array_equal(np.asarray(done.tokens)[:, 0, :NEW], want)

    rows, ends = joined(prompts, lengths, want)
    valid = np.arange(rows.shape[1]) < ends[:, None]

    with jax.set_mesh(mesh):
        hidden, scores = jax.device_get(read_all(params, config, *put_batch(mesh, (rows, ends))))
    their_hidden, their_scores = logits_of(model, rows, valid)
    error = np.linalg.norm((hidden - their_hidden)[valid], axis=-1) / np.linalg.norm(their_hidden[valid], axis=-1)
    assert error.max() < 1e-3
    known = valid[:, 1:]
    assert np.abs(log_probs(scores, rows) - log_probs(their_scores, rows))[known].max() < 1e-3

    return rows, ends


def check_bf16(
    model: Qwen2ForCausalLM,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
    rows: np.ndarray,
    ends: np.ndarray,
) -> None:
    """bf16: log-probabilities of `rows`, beside transformers' in bf16, and in fp32 with the same (rounded) weights."""
    valid = np.arange(rows.shape[1]) < ends[:, None]
    config = dataclasses.replace(config, compute_dtype="bfloat16", param_dtype="bfloat16")
    params = load_hugging_face(folder, config, mesh, None)
    with jax.set_mesh(mesh):
        _, scores = jax.device_get(read_all(params, config, *put_batch(mesh, (rows, ends))))
    _, low_scores = logits_of(model.to(torch.bfloat16), rows, valid)
    _, true_scores = logits_of(model.float(), rows, valid)
    ours, low, true = (log_probs(x, rows)[valid[:, 1:]] for x in (scores, low_scores, true_scores))
    error, cost, gap = (np.abs(x).mean() for x in (ours - true, low - true, ours - low))
    print(f"bf16: from fp32 ours {error:.4f} nat, transformers' {cost:.4f}; from each other {gap:.4f}")
    assert error < 0.01 and abs((ours - low).mean()) < 0.01
    # Two independent errors of that size: from each other they may be root 2 of it.
    assert error < 1.15 * cost and gap < 1.5 * cost


# 1_5b stands for tied weights, 7b for untied ones; the other two differ from them by their proportions alone.
OFTEN = ("1_5b", "7b")
CASES = [pytest.param(*x, id=name, marks=() if name in OFTEN else pytest.mark.slow) for name, x in SHAPES.items()]


@pytest.mark.parametrize(("config", "mesh"), CASES)
def test_the_same_words_states_and_probabilities(tmp_path, config, mesh):
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    model = checkpoint(config, tmp_path)
    check_bf16(model, config, mesh, tmp_path, *check(model, config, mesh, tmp_path, longest=24))


@pytest.mark.slow
def test_the_whole_0_5b(tmp_path):
    """Of the true shape: 24 layers, width 896, vocabulary 151,936."""
    config, mesh = shape("0_5b"), make_mesh(devices=jax.devices()[:1])
    model = checkpoint(config, tmp_path)
    rows, ends = check(model, config, mesh, tmp_path, longest=40)
    # So deep, weights that stir as those do make much of any rounding (transformers' bf16 is .06 nat from its fp32):
    # here they are as transformers draws them.
    model = Qwen2ForCausalLM(model.config).eval()
    model.save_pretrained(tmp_path)
    check_bf16(model, config, mesh, tmp_path, rows, ends)
