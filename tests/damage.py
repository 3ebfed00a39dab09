"""What can befall one file of a checkpoint, and the proof that it restores no wrong value."""

import pathlib
import random
import shutil

import jax
import numpy as np

from r3jax.run.checkpoint import DESCRIPTION, Checkpointer

HOW = ("delete", "truncate", "flip")
BEST = "figure"


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, relative to it, in one order."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damage(file: pathlib.Path, how: str, draw: random.Random) -> None:
    """Deletes a file, cuts it short somewhere, or flips one of its bits."""
    raw = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "truncate":
        raw = raw[: draw.randrange(len(raw))]
    else:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    file.write_bytes(raw)


def bits(tree) -> list[tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return [(path, np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for path, x in leaves]


def survive(folder: pathlib.Path, states: list, target, count: int, draw: random.Random) -> int:
    """Saves two states, then damages the newer one `count` times, each time anew; how often the older was taken.

    Each restore must give one of the two, whole, with its own meta; the best is the newer or, if that is not there
    any more, the older.
    """
    whole, metas = folder / "whole", [{"data": [step, "a"], "log": {"metrics.jsonl": step}} for step in (1, 2)]
    store = Checkpointer(whole, keep_last=2, best_key=BEST)
    for step, (state, meta) in enumerate(zip(states, metas, strict=True), 1):
        store.save(step, state, meta=meta, metrics={BEST: step / 10})
    store.close()
    cases = [(file, how) for file in files(whole / "2") for how in HOW]
    draw.shuffle(cases)
    cases[:0] = [(DESCRIPTION, how) for how in HOW]  # never harmless, whatever else is drawn
    cases += [(draw.choice(files(whole / "2")), "flip") for _ in range(count - len(cases))]
    fallen = 0
    for file, how in cases[:count]:
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        damage(copy / "2" / file, how, draw)
        store = Checkpointer(copy, keep_last=2, best_key=BEST)
        state, meta = store.restore(None, target)
        which = metas.index(meta)
        assert bits(state) == bits(states[which]), f"{how} {file}"
        assert store.best() in ((2,) if which == 1 else (1, 2)), f"{how} {file}"
        fallen += which == 0
        store.close()
        shutil.rmtree(copy)
    return fallen
