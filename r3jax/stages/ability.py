"""Does the model still talk as its base did? KL(base || model) at the answers of ordinary chats, by teacher forcing.

The base is what the run began with, its adapter off; without LoRA stage 2's own reference is another one, the end of
stage 1. Its log-probabilities are computed once and kept in a file, so that no copy of the weights is needed to
compare with it. That is 4 bytes per answer token and row of the vocabulary: some 300 MB for Qwen-2.5.

Axes: B chats of a batch, L length, W longest answer, T answer tokens of all chats, V vocabulary.
"""

import os
import pathlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.model.encoder import bucket_of, pad
from r3jax.model.qwen2 import ModelConfig, head, hidden_states
from r3jax.model.sharding import BATCH, batch_parts, own_rows, place, put_batch, to_host
from r3jax.processes import in_turn
from r3jax.stages.tokens import answer_window
from r3jax.text.prompts import ChatFormat

CHATS_AT_ONCE = 8


class Ability:
    """Ordinary chats, and in `file` how the base answers them."""

    def __init__(
        self,
        chats: Sequence[tuple[str, str]],
        chat: ChatFormat,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        file: pathlib.Path,
    ):
        self.model, self.mesh, self.file = model, mesh, file
        rows = [chat.conversation(*turns) for turns in chats]
        self.tokens = sum(len(ids) - start for ids, start in rows)
        self._width = max(len(ids) - start for ids, start in rows)
        length, parts = bucket_of(max(len(ids) for ids, _ in rows)), batch_parts(mesh)
        size = -(-CHATS_AT_ONCE // parts) * parts
        self._batches = []
        for i in range(0, len(rows), size):
            some = rows[i : i + size]
            tokens, lengths = pad([ids for ids, _ in some], length, size)
            starts = np.ones(size, np.int32)  # a missing row has length 1 and so no answer
            starts[: len(some)] = [start for _, start in some]
            self._batches.append((tokens, starts, lengths))

    def remember(self, base) -> None:
        """Writes the base's log-probabilities [T, V] in fp32; all of the file or none of it."""
        found = []
        for batch in self._batches:
            logp, mask = to_host(self._read(base, batch))
            found.append(logp[mask])
        in_turn(partial(self._write, np.concatenate(found)))

    def _write(self, found: np.ndarray, first: bool) -> None:
        if not first:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(self.file.name + ".part")
        with part.open("wb") as f:
            np.save(f, found)
        os.replace(part, self.file)

    def kl(self, params) -> float:
        """KL(base || model) over the whole vocabulary, mean over the answers' tokens, in nats.

        Raises UserError if the file is not there any more.
        """
        try:
            base = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError) as e:
            raise UserError(f"{self.file} cannot be read ({e}); put it back, or name another --workdir.") from None
        total, done = 0.0, 0
        for batch in self._batches:
            logp, mask = self._read(params, batch)
            here = to_host(mask)
            theirs = np.zeros((*here.shape, base.shape[-1]), np.float32)
            theirs[here] = base[done : done + here.sum()]
            with jax.set_mesh(self.mesh):
                total += float(_kl(logp, put_batch(self.mesh, own_rows(self.mesh, theirs)), mask))
            done += int(here.sum())
        return total / done

    def _read(self, params, batch):
        with jax.set_mesh(self.mesh):
            return _answers(
                params, *put_batch(self.mesh, own_rows(self.mesh, batch)), model=self.model, width=self._width
            )


@partial(jax.jit, static_argnames=("model", "width"))
def _answers(params, tokens, starts, lengths, *, model: ModelConfig, width: int):
    """Log-probabilities [B, W, V] where the answers are predicted, and which of them count [B, W]."""
    hidden = hidden_states(params, model, tokens, lengths)
    positions, _, mask = answer_window(tokens, starts, lengths, width)
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    return jax.nn.log_softmax(head(params, model)(picked)), mask


@jax.jit
def _kl(logp, base, mask):
    """The sum of KL(base || model) over the tokens that count. A program of its own: equal weights give 0 exactly."""
    base = place(base, P(BATCH, None, "tensor"))
    return jnp.where(mask, (jnp.exp(base) * (base - logp)).sum(-1), 0.0).sum()
