"""Packing: several short rows in one long one, so that hardly any padding is computed.

Rows of a batch are put into packs of one length, whole and one after the other; a token sees its own row only. What a
row would give by itself it gives in a pack, up to rounding. What rows begin with in common, an instruction or a prompt,
is computed once: it stands before the packs of its group, and they see it too. Packs are made on the host and per group
of rows, which one device computes in one chunk (gradient caching), so nothing ever crosses devices.

A group's tokens are what stands before its packs, and then the packs end to end: places count from there.

Axes: B rows of each kind, N groups, M = B / N rows of a group, P packs of a group, L pack length, C tokens before them,
T = C + P L tokens of a group, W window, D width, G texts of a prompt.
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

TOGETHER = 256  # tokens of prompts, as long as they may be, of one group: all its packs have so many keys more
_UNIT = 8  # tokens of a row of the model's, where packs follow a beginning: see `begun`


def pack_length(longest: int) -> int:
    """A quarter more than the longest row: longer packs waste less and cost more attention."""
    return bucket_of(longest + longest // 4)


class Beginning(NamedTuple):
    """What stands before the packs of each group: one text or several, end to end."""

    tokens: Any  # [N, C]
    positions: Any  # within the token's own text, from 0
    segments: Any  # which text, from 1; 0 is padding
    follows: Any  # [N, P, L]: which of the texts a token of the packs goes on from


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
    if count % (shards * chunks):
        raise ValueError(f"{count} rows cannot be split into {shards} shards of {chunks} chunks.")
    heads = [tuple(head) for head in heads] or [()] * len(kinds)
    texts = [head for head in dict.fromkeys(heads) if head]
    own = [np.maximum(lengths - len(head), 1) for (_, lengths), head in zip(kinds, heads, strict=True)]
    longest = max(int(sizes.max(initial=1)) for sizes in own)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into packs of {length}.")
    ids = [_cut(tokens, len(head), length) for (tokens, _), head in zip(kinds, heads, strict=True)]
    firsts = np.array([len(head) for head in heads])
    follows = np.array([1 + texts.index(head) if head else 0 for head in heads])
    groups = np.arange(count).reshape(shards, -1, chunks).transpose(0, 2, 1).reshape(shards * chunks, -1)
    each = len(groups[0])
    rows = [
        (
            np.concatenate([x[members] for x in ids]),
            np.concatenate([x[members] for x in own]),
            np.repeat(firsts, each),
            np.repeat(follows, each),
        )
        for members in groups
    ]
    packs, placed = _laid_out(rows, [texts] * len(groups), bucket_of(sum(map(len, texts))), length, agree)
    begins = [np.zeros(count, np.int32) for _ in kinds]
    for members, places in zip(groups, placed, strict=True):
        for begin, first, of_kind in zip(begins, firsts, places.reshape(len(kinds), each), strict=True):
            begin[members] = of_kind - first
    return packs, begins


def prompts_together(longest: int, rows: int) -> int:
    """How many prompts of at most so many tokens make a group, of the rows of a device's chunk, which they divide.

    With more of them less of their texts' last packs is empty; but each text has the keys of all.
    """
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * longest <= TOGETHER))


def pack_after(
    prompts: tuple[np.ndarray, np.ndarray],
    texts: tuple[np.ndarray, np.ndarray],
    *,
    length: int,
    shards: int,
    chunks: int,
    together: int,
    agree: Callable[[int], int] | None = None,
) -> tuple[Packs, np.ndarray, np.ndarray]:
    """Texts packed behind their prompts, each of which is computed once.

    Args:
      prompts: right-padded [B, any width] and their lengths [B].
      texts: what follows each, right-padded [B, G, any width] and their lengths [B, G].
      length, shards, chunks, agree: as of `pack`.
      together: prompts of a group: of `prompts_together`.

    Returns:
      Packs of B / together groups; where each prompt ends [B]: the place of its last token; and where each text would
      begin if its prompt stood right before it [B, G].
    """
    ids, starts = prompts
    count, group = texts[1].shape
    own = _cut(texts[0].reshape(count * group, -1), 0, length).reshape(count, group, length)
    groups = np.arange(count).reshape(shards, -1, together, chunks).swapaxes(2, 3).reshape(-1, together)
    numbers = np.repeat(1 + np.arange(together), group)
    rows = [(own[m].reshape(-1, length), texts[1][m].ravel(), np.repeat(starts[m], group), numbers) for m in groups]
    before = [[ids[b, : starts[b]] for b in members] for members in groups]
    room = bucket_of((agree or _largest)(int(starts[groups].sum(1).max())))
    packs, placed = _laid_out(rows, before, room, length, agree)
    ends, begins = np.zeros(count, np.int32), np.zeros((count, group), np.int32)
    for members, places in zip(groups, placed, strict=True):
        ends[members] = np.cumsum(starts[members]) - 1
        begins[members] = places.reshape(together, group) - starts[members, None]
    return packs, ends, begins


def _cut(ids: np.ndarray, first: int, width: int) -> np.ndarray:
    """Columns from `first` on, so many, filled up with zeros."""
    part = ids[:, first : first + width]
    return np.pad(part, ((0, 0), (0, width - part.shape[1])))


def _laid_out(rows, before, room: int, length: int, agree) -> tuple[Packs, list[np.ndarray]]:
    """Packs, and the place of each row's first token, by group.

    Args:
      rows: of each group: ids [rows, L], lengths, position of the first token, and which text they follow, each [rows].
      before: of each group: the texts that stand before its packs, in `room` tokens.
    """
    placed = [_best_fit(np.maximum(lengths, 1), length) for _, lengths, *_ in rows]
    most = (agree or _largest)(max(used for _, _, used in placed))
    most = min(_rounded(most), len(rows[0][1]))
    tokens, positions, segments, follows = leaves = np.zeros((4, len(rows), most, length), np.int32)
    for n, ((ids, lengths, firsts, texts), (starts, numbers, _)) in enumerate(zip(rows, placed, strict=True)):
        row = np.repeat(np.arange(len(lengths)), lengths)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        values = (ids[row, offset], firsts[row] + offset, numbers[row], texts[row])
        for leaf, x in zip(leaves, values, strict=True):
            leaf[n].reshape(-1)[starts[row] + offset] = x
    packs, places = Packs(tokens, positions, segments), [room + starts for starts, _, _ in placed]
    if not room:
        return packs, places
    tokens, positions, segments = np.zeros((3, len(rows), room), np.int32)
    for n, texts in enumerate(before):
        end = 0
        for number, text in enumerate(texts, 1):
            here, end = slice(end, end + len(text)), end + len(text)
            tokens[n, here], positions[n, here], segments[n, here] = text, np.arange(len(text)), number
    return packs._replace(before=Beginning(tokens, positions, segments, follows)), places


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
    follows = before.segments[:, None, None, :] == before.follows[..., None]
    follows = jnp.reshape(follows, (count * most, length, -1), out_sharding=out(P(BATCH, None, None)))
    seen = Begun(visible(before.segments), visible(_rows(packs.segments, (-1, length)), follows))

    def laid(first, then):
        group = jnp.concatenate([first, _rows(then, (count, most * length))], axis=1)
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
