"""Which meshes and how many chunks of gradient caching are worth a compilation, by rough arithmetic.

Only an order of trials comes from here; the compiler says what fits.
"""

import math
from collections.abc import Iterator

from r3jax.model.qwen2 import ModelConfig, parameter_table

STATE = 16  # bytes a weight: fp32 weight, two moments, gradient
ROOM = 0.5  # of the memory that the state may take before activations
TRIALS = 4


def weights(model: ModelConfig) -> int:
    """Number of weights."""
    return sum(math.prod(shape) for shape, _ in parameter_table(model).values())


def meshes(model: ModelConfig, chips: int, memory: float, reference: bool) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) that hold the state, the best first.

    As little of `tensor` as possible, for it moves activations at every layer; then the shortest `fsdp` that leaves
    half of the memory to activations: gathering weights costs every chip the same bytes whatever its length, and short
    rings are near. What is left is `data`.
    """
    per_chip = weights(model) * (STATE + 4 * reference)
    found = []
    for tensor in (1, 2, 4, 8):
        if chips % tensor or any(n % tensor for n in (model.kv_heads, model.ffn, model.vocab)):
            continue
        rest = chips // tensor
        lengths = [n for n in range(1, rest + 1) if rest % n == 0 and model.width % n == 0]
        for fsdp in lengths:
            share = per_chip / (fsdp * tensor) / memory
            if share < 0.9:
                found.append((share > ROOM, tensor, fsdp, (rest // fsdp, fsdp, tensor)))
    seen = set()
    for _, tensor, _, mesh in sorted(found):
        if tensor not in seen:  # one of each: another length of fsdp changes little
            seen.add(tensor)
            yield mesh


def chunks(model: ModelConfig, rows: int, tokens: int, left: float, tensor: int) -> int:
    """The smallest number of chunks, a divisor of a chip's `rows`, whose activations should fit into `left` bytes.

    tokens: of all those rows. Kept for the backward pass is each layer's input; the widest layer, the scores of its
    attention and a chunk's logits come on top.
    """
    widest = 2 * (8 * model.width + 6 * model.ffn // tensor)
    fixed = 1024 * model.vocab // tensor * 10
    for count in (n for n in range(1, rows + 1) if rows % n == 0):
        if tokens / count * (2 * model.layers * model.width + widest) + fixed < left:
            return count
    return rows
