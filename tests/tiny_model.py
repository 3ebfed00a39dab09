"""Decoders of a few thousand weights for tests of the model, and transformers' own with the same weights."""

import jax
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from r3jax.model import params as model_params
from r3jax.model.qwen2 import ModelConfig, parameter_table


def sizes(**changes) -> ModelConfig:
    """Two layers, two query heads on each of two kv heads; `heads * head_dim` is not the width."""
    fields = dict(layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=32, vocab=24, tied=True)
    return ModelConfig(**(fields | changes))


def weights(config: ModelConfig, seed: int = 0) -> dict:
    """Random weights at which every parameter matters: biases are not 0 and scales not 1."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name, (shape, _) in parameter_table(config).items():
        draw = rng.normal(size=shape)
        if name.endswith("bias"):
            draw *= 0.5
        elif name.endswith("scale"):
            draw = 1 + 0.2 * draw
        elif name.endswith("table"):
            draw *= 0.4  # logits a few nats apart
        else:
            draw *= config.width**-0.5
        flat[name] = draw.astype(config.param_dtype)
    return jax.tree.map(jax.numpy.asarray, model_params.unflatten(flat))


def rope_parameters(config: ModelConfig) -> dict:
    """As transformers 5 writes them."""
    if config.rope_factor == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
    }


def reference(config: ModelConfig, seed: int = 0) -> Qwen2ForCausalLM:
    """transformers' decoder of these sizes, with random weights, biases and scales."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_parameters=rope_parameters(config),
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
            elif weight.ndim == 1:
                weight.normal_(1, 0.2)
            else:
                weight.normal_(0, 1 if "embed" in name else config.width**-0.5)
    return model


def state_dict(model: Qwen2ForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def padded(rng: np.random.Generator, lengths, width: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows right-padded with random ids, which must not matter, and their lengths."""
    tokens = rng.integers(0, vocab, (len(lengths), width), dtype=np.int32)
    return tokens, np.asarray(lengths, np.int32)
