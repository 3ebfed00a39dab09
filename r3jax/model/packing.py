"""Packing: several short rows in one long one, so that hardly any padding is computed.

Rows of a batch are put into packs of one length, whole and one after the other; a token sees its own row only. What a
row would give by itself it gives in a pack, up to rounding. What rows begin with in common, an instruction or a prompt,
is computed once: it stands before packs, and they see it too. Packs are made on the host and per group of rows, which
one device computes in one chunk (gradient caching), so nothing ever crosses devices.

A group's tokens are its beginnings, end to end, and then its packs: places count from there.

Axes: B rows of each kind, N groups, M = B / N rows of a group, E beginnings of a group, C tokens of one, P packs of a
group, L pack length, T = E C + P L tokens of a group, W window, D width, G texts of a prompt.
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
from r3jax.model.sharding import BATCH, out
from r3jax.processes import gather

_UNIT = 8  # tokens of a row of the model's, where packs follow a beginning: see `begun`


def pack_length(longest: int) -> int:
    """A quarter more than the longest row: longer packs waste less and cost more attention."""
    return bucket_of(longest + longest // 4)


class Beginning(NamedTuple):
    """What stands before packs: in each beginning one text or several, end to end."""

    tokens: Any  # [N, E, C]
    positions: Any  # within the token's own text, from 0
    segments: Any  # which text, from 1; 0 is padding
    after: Any  # [N, P]: which beginning a pack stands behind
    follows: Any  # [N, P, L]: which of its texts a token of the pack goes on from


class Packs(NamedTuple):
    """Rows laid out in packs, each leaf [N, P, L]."""

    tokens: Any
    positions: Any  # within the token's own text, from 0
    segments: Any  # which row of its pack, from 1; 0 is padding
    before: Beginning | None = None

    def computed(self) -> int:
        """Tokens that are computed, without padding."""
        return sum(int((x.segments > 0).sum()) for x in (self, self.before) if x is not None)


def pack(
    kinds: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    length: int,
    shards: int,
    chunks: int = 1,
    heads: Sequence[Sequence[int]] = (),
    agree: Callable[[int], int] | None = None,
) -> tuple[Packs, list[np.ndarray]]:
    """Packs right-padded rows (numpy); best fit, the longest first.

    Args:
      kinds: (tokens [B, any width], lengths [B]) of each kind of row; row i of every kind is in the same group.
      length: of a pack; no row may have more of its own. See `pack_length`.
      shards: into how many parts this process's rows are split over devices.
      chunks: into how many parts each of those is split by gradient caching, which takes every `chunks`-th row.
      heads: ids that every row of a kind begins with, of each kind: they stand before the packs, which hold what
        follows. A row that is no longer than its head means nothing, and has one token there.
      agree: from this process's number of packs to the largest over all processes; by default it asks them.

    Returns:
      Packs of shards * chunks groups, and for each kind where its rows begin, [B]: a place of their group. With a head
      that is as far before what a row has of its own as if the head stood there.
    """
    count = len(kinds[0][1])
    groups = _groups(count, shards, chunks)
    heads = [tuple(head) for head in heads] or [()] * len(kinds)
    texts = [head for head in dict.fromkeys(heads) if head]
    own = [np.maximum(lengths - len(head), 1) for (_, lengths), head in zip(kinds, heads, strict=True)]
    ids = [_cut(tokens, len(head), length) for (tokens, _), head in zip(kinds, heads, strict=True)]
    firsts = np.array([len(head) for head in heads])
    follows = np.array([1 + texts.index(head) if head else 0 for head in heads])
    each = len(groups[0])
    rows = [
        _Behind(
            texts,
            np.concatenate([x[members] for x in ids]),
            np.concatenate([x[members] for x in own]),
            np.repeat(firsts, each),
            np.repeat(follows, each),
        )
        for members in groups
    ]
    packs, placed = _laid_out([[x] for x in rows], bucket_of(sum(map(len, texts))), length, agree)
    begins = [np.zeros(count, np.int32) for _ in kinds]
    for members, [places] in zip(groups, placed, strict=True):
        for begin, first, of_kind in zip(begins, firsts, places.reshape(len(kinds), each), strict=True):
            begin[members] = of_kind - first
    return packs, begins


def pack_after(
    prompts: tuple[np.ndarray, np.ndarray],
    texts: tuple[np.ndarray, np.ndarray],
    *,
    room: int,
    length: int,
    shards: int,
    chunks: int,
    agree: Callable[[int], int] | None = None,
) -> tuple[Packs, np.ndarray, np.ndarray]:
    """Texts packed behind their prompts, each of which is computed once; prompts are packed too.

    Args:
      prompts: right-padded [B, any width] and their lengths [B].
      texts: what follows each, right-padded [B, G, any width] and their lengths [B, G].
      room: C, tokens of a beginning; no prompt may have more. In longer ones less is empty, of packs too, for the texts
        of its prompts share them; but each token sees so many keys more. See `pack_length`.
      length, shards, chunks, agree: as of `pack`.

    Returns:
      Packs of shards * chunks groups; where each prompt ends [B]: the place of its last token; and where each text
      would begin if its prompt stood right before it [B, G].
    """
    ids, starts = prompts
    count, group = texts[1].shape
    own = _cut(texts[0].reshape(count * group, -1), 0, length).reshape(count, group, length)
    groups = _groups(count, shards, chunks)
    beginnings, ends = [], np.zeros(count, np.int32)
    for members in groups:
        first, _, used = _best_fit(starts[members], room)
        ends[members] = first + starts[members] - 1
        order = np.argsort(first)
        beginnings.append(np.split(members[order], np.searchsorted(first[order], room * np.arange(1, used))))
    most = min(_rounded((agree or _largest)(max(map(len, beginnings)))), len(groups[0]))

    def rows(m):
        numbers, firsts = (np.repeat(x, group) for x in (1 + np.arange(len(m)), starts[m]))
        texts_before = [ids[b, : starts[b]] for b in m]
        return _Behind(texts_before, own[m].reshape(-1, length), texts[1][m].ravel(), firsts, numbers)

    nobody = np.zeros(0, np.int64)
    beginnings = [each + [nobody] * (most - len(each)) for each in beginnings]
    packs, placed = _laid_out([[rows(m) for m in each] for each in beginnings], room, length, agree)
    begins = np.zeros((count, group), np.int32)
    for each, places in zip(beginnings, placed, strict=True):
        members = np.concatenate(each)
        begins[members] = np.concatenate(places).reshape(-1, group) - starts[members, None]
    return packs, ends, begins


def _groups(count: int, shards: int, chunks: int) -> np.ndarray:
    """The rows of each group [N, M]: gradient caching takes every `chunks`-th of a shard's."""
    if count % (shards * chunks):
        raise ValueError(f"{count} rows cannot be split into {shards} shards of {chunks} chunks.")
    return np.arange(count).reshape(shards, -1, chunks).transpose(0, 2, 1).reshape(shards * chunks, -1)


def _cut(ids: np.ndarray, first: int, width: int) -> np.ndarray:
    """Columns from `first` on, so many, filled up with zeros."""
    part = ids[:, first : first + width]
    return np.pad(part, ((0, 0), (0, width - part.shape[1])))


class _Behind(NamedTuple):
    """A beginning, and the rows of packs behind it."""

    texts: Sequence[Sequence[int] | np.ndarray]  # of the beginning
    ids: np.ndarray  # of the rows [R, L]
    lengths: np.ndarray  # [R]
    firsts: np.ndarray  # position of each row's first token [R]
    follows: np.ndarray  # which of the texts, from 1, each goes on from [R]; 0 for none


def _laid_out(groups: list[list[_Behind]], room: int, length: int, agree) -> tuple[Packs, list[list[np.ndarray]]]:
    """Packs, and the place of each row's first token, by group and beginning. `room`: tokens of a beginning."""
    fits = [[_best_fit(np.maximum(behind.lengths, 1), length) for behind in group] for group in groups]
    most = (agree or _largest)(max(sum(used for _, _, used in fit) for fit in fits))
    most = min(_rounded(most), sum(len(behind.lengths) for behind in groups[0]))
    count, each = len(groups), len(groups[0])
    packed, after = np.zeros((4, count, most * length), np.int32), np.zeros((count, most), np.int32)
    begun, placed = np.zeros((3, count, each * room), np.int32), []
    for n, (group, fit) in enumerate(zip(groups, fits, strict=True)):
        first, places = 0, []
        for e, (behind, (starts, numbers, used)) in enumerate(zip(group, fit, strict=True)):
            after[n, first : first + used] = e
            starts, first = first * length + starts, first + used
            row, offset = _each_token(behind.lengths)
            values = (behind.ids[row, offset], behind.firsts[row] + offset, numbers[row], behind.follows[row])
            packed[:, n, starts[row] + offset] = values
            places.append(each * room + starts)
            text, offset = _each_token([len(text) for text in behind.texts])
            if len(text):
                here = slice(e * room, e * room + len(text))
                begun[:, n, here] = np.concatenate(behind.texts), offset, 1 + text
        placed.append(places)
    tokens, positions, segments, follows = packed.reshape(4, count, most, length)
    if not room:
        return Packs(tokens, positions, segments), placed
    ids, there, texts = begun.reshape(3, count, each, room)
    return Packs(tokens, positions, segments, Beginning(ids, there, texts, after, follows)), placed


def _each_token(lengths) -> tuple[np.ndarray, np.ndarray]:
    """Which row each token is of, end to end, and its place there."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    return row, np.arange(len(row)) - (ends - lengths)[row]


def _best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where each row begins, its number in its pack (from 1), and how many packs of `size` there are."""
    if lengths.max(initial=0) > size:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into packs of {size}.")
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
    """Hidden states of each group's tokens; those of padding mean nothing.

    `dropout` is a random key: with one, an adapter drops inputs as its config says.
    """
    count, _, length = packs.tokens.shape
    rngs = None if dropout is None else {"dropout": dropout}
    given = [_rows(x, (-1, length)) for x in packs[:3]] if packs.before is None else begun(packs)
    hidden = Decoder(config).apply({"params": params}, *given, rngs=rngs)[0]
    return jnp.reshape(hidden, (count, -1, config.width), out_sharding=out(P(BATCH, None, None)))


def begun(packs: Packs) -> tuple[Int[Array, "R U"], Int[Array, "R U"], Begun]:
    """Tokens and positions of all groups, and what sees what. A group's T tokens are cut into short rows: along one
    axis of thousands XLA sums the gradients of norms on one core of a CPU."""
    before, (count, most, length) = packs.before, packs.tokens.shape
    assert before is not None
    texts = jnp.take_along_axis(before.segments, before.after[..., None], axis=1)  # of each pack's beginning
    follows = texts[:, :, None, :] == before.follows[..., None]
    follows = jnp.reshape(follows, (count * most, length, -1), out_sharding=out(P(BATCH, None, None)))
    first, then = (_rows(x, (-1, x.shape[2])) for x in (before.segments, packs.segments))
    after = before.after[..., None] == jnp.arange(before.tokens.shape[1])
    seen = Begun(visible(first), visible(then, follows), after)

    def laid(first, then):
        group = jnp.concatenate([_rows(x, (count, x.shape[1] * x.shape[2])) for x in (first, then)], axis=1)
        return _rows(group, (-1, math.gcd(group.shape[1], _UNIT)))

    return laid(before.tokens, packs.tokens), laid(before.positions, packs.positions), seen


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
