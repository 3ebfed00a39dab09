"""Which meshes and how many chunks of gradient caching are worth a compilation, by rough arithmetic.

Only an order of trials comes from here; the compiler says what fits.
"""

import math
from collections.abc import Iterator

from r3jax.model.qwen2 import ModelConfig, parameter_table

STATE = 16  # bytes a weight in training: fp32 weight, two moments, gradient
REFERENCE = 4  # and of a frozen copy in fp32
ROOM = 0.5  # of the memory that the state may take before activations
TRIALS = 4


def weights(model: ModelConfig) -> int:
    """Number of weights."""
    return sum(math.prod(shape) for shape, _ in parameter_table(model).values())


def splits(model: ModelConfig, chips: int) -> list[tuple[int, int]]:
    """Every (fsdp, tensor) that divides the model and the chips."""
    tensors = [n for n in (1, 2, 4, 8) if not any(x % n for x in (chips, model.kv_heads, model.ffn, model.vocab))]
    return [
        (fsdp, tensor)
        for tensor in tensors
        for fsdp in range(1, chips // tensor + 1)
        if (chips // tensor) % fsdp == 0 and model.width % fsdp == 0
    ]


def meshes(model: ModelConfig, chips: int, memory: float, per_weight: float) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) that hold a state of `per_weight` bytes for each weight, the best first.

    As little of `tensor` as possible, for it moves activations at every layer; then the shortest `fsdp` that leaves
    half of the memory to activations: gathering weights costs every chip the same bytes whatever its length, and short
    rings are near. What is left is `data`.
    """
    found = []
    for fsdp, tensor in splits(model, chips):
        share = weights(model) * per_weight / (fsdp * tensor) / memory
        if share < 1:
            found.append(
                (share > ROOM, tensor, -fsdp if share > ROOM else fsdp, (chips // (fsdp * tensor), fsdp, tensor))
            )
    seen = set()
    for _, tensor, _, mesh in sorted(found):
        if tensor not in seen:  # one of each: another length of fsdp changes little
            seen.add(tensor)
            yield mesh


def chunks(model: ModelConfig, rows: int, tokens: int, left: float, tensor: int) -> int:
    """The smallest number of chunks, a divisor of a chip's `rows`, whose activations should fit into `left` bytes.

    tokens: of all those rows. Kept for the backward pass is each layer's input; the widest layer, the scores of its
    attention, a chunk's logits and the whole table of the vocabulary come on top.
    """
    widest = 2 * (8 * model.width + 6 * model.ffn // tensor)
    # A chunk's logits; the vocabulary's table gathered in bf16, and its gradient in fp32.
    fixed = model.vocab // tensor * (1024 * 10 + model.width * 6)
    for count in (n for n in range(1, rows + 1) if rows % n == 0):
        if tokens / count * (2 * model.layers * model.width + widest) + fixed < left:
            return count
    return rows
