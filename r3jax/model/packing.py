"""Packing: several short rows in one long one, so that hardly any padding is computed.

Rows of a batch are put into packs of one length, whole and one after the other; a token sees its own row only. What a
row would give by itself it gives in a pack, up to rounding. Texts with one beginning can share it (`share_beginnings`):
such a row branches, and a token sees what all branches share and its own. Packs are made on the host and per group of
rows: a group is what one device computes of one chunk (gradient caching), so nothing ever crosses devices.

Axes: B rows of each kind, N groups, M = B / N rows of a group, P packs of a group, L pack length, W window, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from r3jax.model.encoder import bucket_of, normalise
from r3jax.model.qwen2 import Decoder, ModelConfig
from r3jax.model.sharding import BATCH, out
from r3jax.processes import gather


def pack_length(longest: int) -> int:
    """A quarter more than the longest row: longer packs waste less and cost more attention."""
    return bucket_of(longest + longest // 4)


class Packs(NamedTuple):
    """Rows laid out in packs, each leaf [N, P, L]."""

    tokens: Any
    positions: Any  # within the token's own text, from 0
    segments: Any  # which row of its pack, from 1; 0 is padding
    branches: Any = None  # which branch of its row, from 1; 0 is what all of them share. None: no row branches


class Branching(NamedTuple):
    """Rows that branch, right-padded."""

    tokens: np.ndarray  # [B, any width]
    lengths: np.ndarray  # [B]
    positions: np.ndarray  # as tokens, of `Packs`
    branches: np.ndarray


Kind = tuple[np.ndarray, np.ndarray] | Branching


def pack(
    kinds: Sequence[Kind],
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
      kinds: (tokens [B, any width], lengths [B]) of each kind of row, or all of them `Branching`; row i of every kind
        is in the same group.
      length: of a pack; no row may be longer. See `pack_length`.
      shards: into how many parts this process's rows are split over devices.
      chunks: into how many parts each of those is split by gradient caching, which takes every `chunks`-th row.
      head: ids that every row begins with, put once into each pack; the rows are then branches of one that fills the
        pack. Rows no longer than the head have no place of their own, and none may be `Branching`.
      agree: from this process's number of packs to the largest over all processes; by default it asks them.
      few_shapes: whether P is rounded up, so that jit sees few shapes; `joined` does it for the whole.

    Returns:
      Packs of shards * chunks groups, and for each kind where its rows
      begin, [B]: in the packs of the row's group, laid end to end. With a head that place is as far before what a row
      has of its own as if the head stood there.
    """
    count = len(kinds[0][1])
    if count % (shards * chunks):
        raise ValueError(f"{count} rows cannot be split into {shards} shards of {chunks} chunks.")
    longest = max(int(lengths.max(initial=1)) for _, lengths, *_ in kinds)
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into packs of {length}.")
    groups = np.arange(count).reshape(shards, -1, chunks).transpose(0, 2, 1).reshape(shards * chunks, -1)
    common = len(head)
    own = [np.maximum(lengths - common, 1) for _, lengths, *_ in kinds]
    placed = [_best_fit(np.concatenate([sizes[rows] for sizes in own]), length - common) for rows in groups]
    most = (agree or _largest)(max(used for _, _, used in placed))
    most = _rounded(most) if few_shapes else most

    shape = (len(groups), most * length)
    tokens, positions, segments, branches = (np.zeros(shape, np.int32) for _ in range(4))
    begins = [np.zeros(count, np.int32) for _ in kinds]
    for n, (rows, (starts, numbers, _)) in enumerate(zip(groups, placed, strict=True)):
        starts = starts // (length - common) * length + starts % (length - common)
        for kind, ((ids, _, *inside), begin) in enumerate(zip(kinds, begins, strict=True)):
            part = slice(kind * len(rows), (kind + 1) * len(rows))
            begin[rows] = starts[part]
            sizes = own[kind][rows]
            owner = np.repeat(np.arange(len(rows)), sizes)
            offset = common + np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            target = starts[part][owner] + offset
            tokens[n, target] = ids[rows[owner], offset]
            positions[n, target] = inside[0][rows[owner], offset] if inside else offset
            segments[n, target] = 1 if common else numbers[part][owner]
            if inside or common:
                branches[n, target] = inside[1][rows[owner], offset] if inside else numbers[part][owner]
    leaves = [tokens, positions, segments, *([branches] if common or isinstance(kinds[0], Branching) else [])]
    packs = Packs(*(x.reshape(len(groups), most, length) for x in leaves))
    if common:
        packs.tokens[:, :, :common] = head
        packs.positions[:, :, :common] = np.arange(common)
        packs.segments[:, :, :common] = 1
    return packs, begins


def joined(made: Sequence[tuple[Packs, list[np.ndarray]]]) -> tuple[Packs, list[np.ndarray]]:
    """What several calls of `pack` made, of one length and of the same groups, as though it were made by one.

    They are asked for without `few_shapes`: the whole is rounded up, by packs of padding.
    """
    all_packs, begins, before = [], [], 0
    for packs, starts in made:
        all_packs.append(packs)
        begins += [start + before for start in starts]
        before += packs.tokens.shape[1] * packs.tokens.shape[2]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *all_packs)
    count = whole.tokens.shape[1]
    more = ((0, 0), (0, _rounded(count) - count), (0, 0))
    return jax.tree.map(lambda leaf: np.pad(leaf, more), whole), begins


def share_beginnings(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, size: int
) -> tuple[list[Branching], np.ndarray]:
    """Texts that begin alike as rows that hold the beginning once: a G-th of the work on long prompts.

    Args:
      tokens, lengths: right-padded texts [B, G, any width] and [B, G].
      starts: how many tokens the G texts share [B].
      size: how many texts to a row; it divides G.

    Returns:
      G / size kinds of rows for `pack`, and where each text goes on in its row [B, G]: at the place of token `starts`.
    """
    count, group, _ = tokens.shape
    own = lengths - starts[:, None]
    kinds, goes_on = [], np.zeros((count, group), np.int32)
    for first in range(0, group, size):
        mine = slice(first, first + size)
        ends = starts[:, None] + np.cumsum(own[:, mine], axis=1)
        goes_on[:, mine] = ends - own[:, mine]
        ids, positions, branches = np.zeros((3, count, ends.max()), np.int32)
        for b, start in enumerate(starts):
            ids[b, :start], positions[b, :start] = tokens[b, first, :start], np.arange(start)
            for branch, text in enumerate(range(first, first + size), 1):
                place, n = goes_on[b, text], own[b, text]
                ids[b, place : place + n] = tokens[b, text, start : start + n]
                positions[b, place : place + n] = start + np.arange(n)
                branches[b, place : place + n] = branch
        kinds.append(Branching(ids, ends[:, -1].astype(np.int32), positions, branches))
    return kinds, goes_on


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
    """Hidden states of packs, those of a group end to end (T = P L); those of padding mean nothing.

    `dropout` is a random key: with one, an adapter drops inputs as its config says.
    """
    count, most, length = packs.tokens.shape
    spec = P(BATCH, None)
    flat = jax.tree.map(lambda x: jnp.reshape(x, (count * most, length), out_sharding=out(spec)), packs)
    rngs = None if dropout is None else {"dropout": dropout}
    hidden = Decoder(config).apply({"params": params}, *flat, rngs=rngs)[0]
    return jnp.reshape(hidden, (count, most * length, -1), out_sharding=out(P(BATCH, None, None)))


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
