"""The models and texts that the benchmarks share: random weights in our exporter's form, and the bundled commands.

`write` makes a Hugging Face folder by `r3jax.export`; we and the peers read the same files. Random weights cost what
trained ones cost, but for how long texts get: see `stop_ids`.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# layers, width, heads, kv heads, head dim, ffn, vocabulary rows
SIZES = {
    "tiny": (2, 128, 4, 2, 32, 512, 4096),
    "25m": (8, 384, 6, 2, 64, 1536, 20480),
    "0.5b": (24, 896, 14, 2, 64, 4864, 151936),
    "1.5b": (28, 1536, 12, 2, 128, 8960, 151936),
}
DATA = "data/tldr-commands"
SEED = 0


def config(size: str, **changes):
    """Our ModelConfig of a size, tied and in float32 where not told otherwise."""
    from r3jax.model.qwen2 import ModelConfig

    return ModelConfig(*SIZES[size], **changes)


def products(size: str, rows: float, *, logits: float = 0, last: bool = True) -> dict[str, float]:
    """Operations of a forward pass over so many tokens, by part, of products with weights.

    logits: of how many tokens they are wanted.
    last: whether the last layer is more than keys and values, all of it that an encoder needs of most tokens.
    """
    layers, width, heads, kv_heads, head_dim, ffn, vocab = SIZES[size]
    whole = layers - (not last)
    attention = layers * 2 * kv_heads * head_dim + whole * 2 * heads * head_dim
    each = {"MLP": rows * 3 * whole * width * ffn, "projections of attention": rows * width * attention}
    each |= {"logits": logits * width * vocab} if logits else {}
    return {part: 2.0 * count for part, count in each.items()}


def last_layer(size: str) -> bool:
    """Whether our encoder computes the whole of the last layer: see `r3jax.model.qwen2.last_states`."""
    from r3jax.model.qwen2 import UNROLLED

    return SIZES[size][0] > UNROLLED


@contextlib.contextmanager
def folder(size: str) -> Iterator[str]:
    """A temporary folder with a model of the size, its tokenizer and its sentence-transformers files."""
    with tempfile.TemporaryDirectory(prefix=f"r3jax-bench-{size}-") as name:
        write(pathlib.Path(name), size)
        yield name


def write(target: pathlib.Path, size: str) -> None:
    import jax

    from r3jax import export
    from r3jax.data import beir
    from r3jax.model import params
    from r3jax.model.sharding import make_mesh
    from r3jax.text.prompts import ChatFormat, Prompts
    from r3jax.text.settings import Settings
    from r3jax.text.tokenizer import train_bpe

    texts, prompts = beir.load(DATA), Prompts()
    words = [prompts.direct_system, prompts.reasoning_system] * 500
    chat = ChatFormat(train_bpe(texts.doc_texts[:4000] + words, 4096), prompts)
    model, mesh = config(size), make_mesh()
    with jax.set_mesh(mesh):
        weights = params.init(model, mesh, SEED, chat.tokenizer.embed_id)
        what = export.Exported(size, model, chat, Settings(prompts, 64, 256, 255, lowercase=False), "")
        export.fill(target, weights, what, 2**40)


def chat(name: str):
    """The chat format of such a folder."""
    from r3jax.text import settings, tokenizer
    from r3jax.text.prompts import ChatFormat

    path = pathlib.Path(name)
    return ChatFormat(tokenizer.load(path), settings.read(path).prompts)


@dataclasses.dataclass(frozen=True)
class Ours:
    """A folder as we read it."""

    model: Any
    params: Any
    mesh: Any
    chat: Any


def ours(name: str, devices=None, **changes) -> Ours:
    """Our model of such a folder on this process's devices, or on some; `changes` of its ModelConfig."""
    import jax

    from r3jax import weights
    from r3jax.model.hugging_face_config import read_config
    from r3jax.model.qwen2 import ModelConfig
    from r3jax.model.sharding import make_mesh

    path, mesh, words = pathlib.Path(name), make_mesh(devices=devices), chat(name)
    model = ModelConfig(**(read_config(path) | changes))
    with jax.set_mesh(mesh):
        return Ours(model, weights.load_published(path, model, mesh, words.tokenizer), mesh, words)


def theirs(name: str, dtype: str = "float32", device: str = "cpu"):
    """transformers' model of such a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    return in_memory(AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval().to(device))


def qwen2_config(shape: Sequence, tied: bool = True):
    """transformers' config of a shape as in SIZES."""
    from transformers import Qwen2Config

    layers, width, heads, kv_heads, head_dim, ffn, vocab = shape
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )


def in_memory(model):
    """A torch model whose weights are no longer pages of a file but, as ours, memory of the process."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def prompts(name: str, count: int) -> list[list[int]]:
    """Token rows of reasoning prompts about commands."""
    from r3jax.data import beir

    return chat(name).reasoning_prompts(beir.load(DATA).query_texts[:count], 64)


def stop_ids(vocab: int, mean: int, own: set[int]) -> list[int]:
    """Tokens that end a text, so many that one in `mean` of random weights' does, besides the model's `own`.

    Random weights choose among all tokens alike: lengths are then geometric, as different as a trained model's are.
    """
    chosen = np.random.default_rng(SEED).choice(vocab, vocab // mean, replace=False)
    return sorted(own | set(chosen.tolist()))
