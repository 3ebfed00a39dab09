"""Decoding: the cache of one batch, and a step that reads one new token of each sample.

Axes: B batch, K kv heads, H head dim, P prompt length, G samples per prompt, T new tokens, D width.
"""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int

from r3jax.model.qwen2 import Block, Embed, ModelConfig, RMSNorm
from r3jax.model.sharding import few


@flax.struct.dataclass
class KVCache:
    """Keys and values of one decoding batch: B prompts, G samples each; one entry per layer.

    The prompt's part is stored once and shared by its samples. Tokens lie side by side within a head, which is how
    attention multiplies them: the other way round a step copies the whole cache first.
    """

    prompt_k: tuple[Float[Array, "B K P H"], ...]
    prompt_v: tuple[Float[Array, "B K P H"], ...]
    prompt_valid: Bool[Array, "B P"]
    new_k: tuple[Float[Array, "B G K T H"], ...]
    new_v: tuple[Float[Array, "B G K T H"], ...]


def decode_step(
    params, config: ModelConfig, tokens: Int[Array, "B G"], positions: Int[Array, "B G"], cache: KVCache, slot
) -> tuple[Float[Array, "B G D"], KVCache]:
    """One new token for each sample, written to `slot` of the cache. `params` as `unstack` returns them."""
    gathered = not few(tokens.size, config.width)
    x: Any = Embed(config, gathered).apply({"params": params["embed"]}, tokens)
    new = []
    for i, layer in enumerate(params["layers"]):
        memory = (cache.prompt_k[i], cache.prompt_v[i], cache.prompt_valid, cache.new_k[i], cache.new_v[i])
        x, kv = Block(config, gathered).apply({"params": layer}, x, positions, None, None, memory, slot)
        new.append(kv)
    x = RMSNorm(config).apply({"params": params["final_norm"]}, x)
    new_k, new_v = zip(*new, strict=True)
    return x, cache.replace(new_k=new_k, new_v=new_v)
