"""Packing: several short rows in one long one, so that hardly any padding is computed.

Rows of a batch are put into packs of one length, whole and one after the other; a token sees its own row only. What a
row would give by itself it gives in a pack, up to rounding. What rows begin with in common, an instruction or a prompt,
is computed once a group: packs follow such a beginning and see it too. Packs are made on the host and per group of
rows: a group is what one device computes of one chunk (gradient caching), so nothing ever crosses devices.

A group's tokens are its beginnings end to end and then its packs end to end: places count from there.

Axes: B rows of each kind, N groups, M = B / N rows of a group, P packs of a group, L pack length, U beginnings of a
group, C their length, T = U C + P L tokens of a group, W window, D width, G texts of a prompt.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from r3jax.model.attention import Begun, visible
from r3jax.model.encoder import bucket_of, normalise
from r3jax.model.qwen2 import Decoder, ModelConfig
from r3jax.model.sharding import BATCH, out, place
from r3jax.processes import gather

_UNIT = 8  # tokens of a row of the model's, where packs follow beginnings: see `begun`


def pack_length(longest: int) -> int:
    """A quarter more than the longest row: longer packs waste less and cost more attention."""
    return bucket_of(longest + longest // 4)


class Beginnings(NamedTuple):
    """What packs follow."""

    tokens: Any  # [N, U, C], right-padded
    lengths: Any  # [N, U]
    owner: Any  # [N, P]: which of them stands before each pack


class Packs(NamedTuple):
    """Rows laid out in packs, each leaf [N, P, L]."""

    tokens: Any
    positions: Any  # within the token's own text, from 0
    segments: Any  # which row of its pack, from 1; 0 is padding
    beginnings: Any = None  # None where packs follow none


def pack(
    kinds: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    length: int,
    shards: int,
    chunks: int = 1,
    head: Sequence[int] = (),
    agree: Callable[[int], int] | None = None,
    few_shapes: bool = True,
) -> tuple[Packs, list[np.ndarray]]:
    """Packs right-padded rows (numpy); best fit, the longest first.

    Args:
      kinds: (tokens [B, any width], lengths [B]) of each kind of row; row i of every kind is in the same group.
      length: of a pack; no row may have more of its own. See `pack_length`.
      shards: into how many parts this process's rows are split over devices.
      chunks: into how many parts each of those is split by gradient caching, which takes every `chunks`-th row.
      head: ids that every row begins with: each group's beginning, and packs hold what follows. A row that is no longer
        means nothing, and has one token there.
      agree: from this process's number of packs to the largest over all processes; by default it asks them.
      few_shapes: whether P is rounded up, so that jit sees few shapes; `joined` does it for the whole.

    Returns:
      Packs of shards * chunks groups, and for each kind where its rows begin, [B]: a place of their group. With a head
      that is as far before what a row has of its own as if the head stood there.
    """
    count, common, room = len(kinds[0][1]), len(head), bucket_of(len(head))
    if count % (shards * chunks):
        raise ValueError(f"{count} rows cannot be split into {shards} shards of {chunks} chunks.")
    own = [np.maximum(lengths - common, 1) for _, lengths in kinds]
    longest = max(int(sizes.max(initial=1)) for sizes in own)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into packs of {length}.")
    groups = np.arange(count).reshape(shards, -1, chunks).transpose(0, 2, 1).reshape(shards * chunks, -1)
    placed = [_best_fit(np.concatenate([sizes[rows] for sizes in own]), length) for rows in groups]
    most = (agree or _largest)(max(used for _, _, used in placed))
    packs = _empty(len(groups), _rounded(most) if few_shapes else most, length)
    begins = [np.zeros(count, np.int32) for _ in kinds]
    for n, (rows, (starts, numbers, _)) in enumerate(zip(groups, placed, strict=True)):
        for kind, ((ids, _), begin) in enumerate(zip(kinds, begins, strict=True)):
            part = slice(kind * len(rows), (kind + 1) * len(rows))
            begin[rows] = starts[part] + room - common
            _fill(packs, n, starts[part], numbers[part], ids[rows, common:], own[kind][rows], common)
    if not common:
        return packs, begins
    ids = np.tile(np.pad(np.array(head, np.int32), (0, room - common)), (len(groups), 1, 1))
    owner = np.zeros(packs.tokens.shape[:2], np.int32)
    beginnings = Beginnings(ids, np.full(ids.shape[:2], common, np.int32), owner)
    return packs._replace(beginnings=beginnings), begins


def joined(made: Sequence[tuple[Packs, list[np.ndarray]]]) -> tuple[Packs, list[np.ndarray]]:
    """What several calls of `pack` made, of one length and of the same groups, as though it were made by one: all with
    a head, or none.

    They are asked for without `few_shapes`: the whole is rounded up, by packs of padding.
    """
    all_packs, length = [packs for packs, _ in made], made[0][0].tokens.shape[2]
    counts = [packs.tokens.shape[1] for packs in all_packs]
    firsts = np.cumsum([0, *counts[:-1]]) * length
    more = [(0, 0), (0, _rounded(sum(counts)) - sum(counts))]

    def whole(leaves, padding):
        return np.pad(np.concatenate(leaves, axis=1), padding)

    laid = Packs(*(whole(leaves, [*more, (0, 0)]) for leaves in zip(*(packs[:3] for packs in all_packs), strict=True)))
    if all_packs[0].beginnings is not None:
        begun = [packs.beginnings for packs in all_packs]
        sizes = [x.tokens.shape[2] for x in begun]
        ids = [np.pad(x.tokens, [(0, 0), (0, 0), (0, max(sizes) - n)]) for x, n in zip(begun, sizes, strict=True)]
        beginnings = Beginnings(
            np.concatenate(ids, axis=1),
            np.concatenate([x.lengths for x in begun], axis=1),
            whole([np.full_like(x.owner, i) for i, x in enumerate(begun)], more),
        )
        laid = laid._replace(beginnings=beginnings)
        firsts = firsts + len(made) * max(sizes) - np.array(sizes)
    return laid, [start + first for (_, starts), first in zip(made, firsts, strict=True) for start in starts]


def after_prompts(
    prompts: np.ndarray,
    starts: np.ndarray,
    texts: np.ndarray,
    lengths: np.ndarray,
    length: int,
    agree: Callable[[int], int] | None = None,
) -> tuple[Packs, np.ndarray]:
    """Texts that follow a prompt, packed behind it: the prompt is computed once. Each prompt is a group (N = B).

    Args:
      prompts, starts: right-padded [B, C] and their lengths [B].
      texts, lengths: what follows each, right-padded [B, G, any width] and [B, G].
      length, agree: as of `pack`.

    Returns:
      Packs, and where each text would begin if its prompt stood right before it [B, G].
    """
    placed = [_best_fit(np.maximum(each, 1), length) for each in lengths]
    most = (agree or _largest)(max(used for _, _, used in placed))
    packs = _empty(len(prompts), _rounded(most), length)
    for n, (places, numbers, _) in enumerate(placed):
        _fill(packs, n, places, numbers, texts[n], lengths[n], starts[n])
    owner = np.zeros(packs.tokens.shape[:2], np.int32)
    beginnings = Beginnings(prompts[:, None].astype(np.int32), starts[:, None].astype(np.int32), owner)
    begins = np.stack([places for places, _, _ in placed]) + prompts.shape[1] - starts[:, None]
    return packs._replace(beginnings=beginnings), begins.astype(np.int32)


def _empty(groups: int, count: int, length: int) -> Packs:
    return Packs(*np.zeros((3, groups, count, length), np.int32))


def _fill(packs: Packs, group: int, places, numbers, texts, lengths, first: int) -> None:
    """Lays the texts, each as long as `lengths` says, out at their places; their positions begin with `first`."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target = np.asarray(places)[owner] + offset
    leaves = (texts[owner, offset], first + offset, np.asarray(numbers)[owner])
    for leaf, values in zip(packs[:3], leaves, strict=True):
        leaf[group].reshape(-1)[target] = values


def _best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where each row begins, its number in its pack (from 1), and how many packs of `size` there are."""
    starts, numbers = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    free: list[list[tuple[int, int]]] = [[] for _ in range(size + 1)]  # by room left: (pack, rows in it)
    used = 0
    for row in np.argsort(-lengths, kind="stable"):
        need = int(lengths[row])
        room = next((r for r in range(need, size) if free[r]), size)
        if room == size:
            chosen, rows = used, 0
            used += 1
        else:
            chosen, rows = free[room].pop()
        starts[row] = chosen * size + size - room
        numbers[row] = rows + 1
        free[room - need].append((chosen, rows + 1))
    return starts, numbers, used


def _rounded(count: int) -> int:
    """At most an eighth more, of a few packs a third: each number of packs is a shape of its own to compile."""
    step = max(1, (1 << count.bit_length()) // (16 if count > 16 else 4))
    return -(-count // step) * step


def _largest(most: int) -> int:
    """The largest over all processes."""
    return int(gather(np.array(most)).max())


def packed_states(params, config: ModelConfig, packs: Packs, dropout: jax.Array | None = None) -> Float[Array, "N T D"]:
    """Hidden states of a group's beginnings and packs, end to end; those of padding mean nothing.

    `dropout` is a random key: with one, an adapter drops inputs as its config says.
    """
    count, _, length = packs.tokens.shape
    rngs = None if dropout is None else {"dropout": dropout}

    given = [_rows(x, (-1, length)) for x in packs[:3]] if packs.beginnings is None else begun(packs)
    hidden = Decoder(config).apply({"params": params}, *given, rngs=rngs)[0]
    return jnp.reshape(hidden, (count, -1, config.width), out_sharding=out(P(BATCH, None, None)))


def begun(packs: Packs) -> tuple[Int[Array, "R 8"], Int[Array, "R 8"], Begun]:
    """Tokens and positions of all groups, and what sees what. A group's T tokens are cut into short rows: along one
    axis of thousands XLA sums the gradients of norms on one core of a CPU."""
    texts, lengths, owner = packs.beginnings
    groups, _, size = texts.shape
    places = jnp.broadcast_to(jnp.arange(size), texts.shape)
    valid = places < lengths[..., None]
    before = jnp.take_along_axis(valid, owner[..., None], axis=1)
    segments = _rows(packs.segments, (-1, packs.segments.shape[2]))
    seen = Begun(visible(_rows(valid, (-1, size))), visible(segments, _rows(before, (-1, size))), owner)

    def laid(first, then):
        group = jnp.concatenate([_rows(x, (groups, -1)) for x in (first, then)], axis=1)
        return _rows(group, (-1, math.gcd(group.shape[1], _UNIT)))

    return laid(texts, packs.tokens), laid(place(places, P(BATCH, None, None)), packs.positions), seen


def _rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jnp.reshape(x, shape, out_sharding=out(P(BATCH, None)))


def pick(states: Float[Array, "N T D"], places: Int[Array, "B W"]) -> Float[Array, "B W D"]:
    """The states at some places of each row; a place counts from the beginning of the row's group."""
    count, width = states.shape[0], places.shape[1]
    spec = P(BATCH, None, None)
    grouped = jnp.reshape(places, (count, -1, 1), out_sharding=out(spec))
    picked = jnp.take_along_axis(states, grouped, axis=1)
    return jnp.reshape(picked, (places.shape[0], width, -1), out_sharding=out(spec))


def last_vectors(
    states: Float[Array, "N T D"], begins: Int[Array, " B"], lengths: Int[Array, " B"]
) -> Float[Array, "B D"]:
    """Unit vectors in fp32: each row's last state."""
    return normalise(pick(states, (begins + lengths - 1)[:, None])[:, 0])
