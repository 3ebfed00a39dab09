"""State on disk: the last few checkpoints and the best one, each verified when it is read.

Orbax writes in the background and renames a step into place when all of it is there, so a kill during a save
leaves the one before. What Orbax does not see are flipped bits (they restore silently) and a damaged newest
step: `verify` sees them, and `restore` goes back, newest to oldest, to the first that is whole. That one stays until
another has been read back: what is only written is not known to be good.
Leaves are stored under their path's name ("params.embed"), so that a part of the state can be read alone.
"""

import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from r3jax.errors import UserError
from r3jax.processes import gather, is_spread, leads, rank
from r3jax.run.verify import DamagedError, agree, checksums, first_line, seal, unseal

PyTree = Any
DESCRIPTION = pathlib.Path("meta", "metadata")  # of a checkpoint: shapes and checksums, the caller's meta, the score


class Checkpointer:
    """The checkpoints of one stage in one folder; steps are counted in optimiser steps.

    Args:
      folder: where they lie; made if missing (not for read_only).
      keep_last: how many of the newest to keep.
      best_key: name of the metric whose highest value keeps one best checkpoint besides; None keeps none.
      read_only: for evaluation beside a running training: writes and cleans nothing.
    """

    def __init__(
        self,
        folder: pathlib.Path | str,
        keep_last: int,
        best_key: str | None = None,
        read_only: bool = False,
    ):
        self.folder = pathlib.Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"there are no checkpoints at {folder}; train first, or name another --workdir.")
        if not read_only:
            _hush_late_writes()
        self._keep_last, self._best_key = keep_last, best_key
        self._scores: dict[int, float | None] = {}
        self._whole: int | None = None  # the step that was read back and verified
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )
        self._manager.reached_preemption = lambda step: False  # `Stop` alone asks for notices, by numbers of its own

    def latest(self) -> int | None:
        """The newest step on disk (whole or not), None without any."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best `best_key` metric, None if no step has it."""
        if self._best_key is None:
            raise ValueError("best() needs a best_key")
        return self._best(self._manager.all_steps())

    def save(
        self, step: int, state: PyTree, *, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to write one checkpoint; returns once the state may be changed or donated again.

        Steps on disk that are not older than `step` are removed first: they are damaged ones that `restore`
        passed over, or come from a future that this run has left.

        Args:
          step: the number of optimiser steps done.
          state: a tree of jax arrays (sharded as they are) and numpy arrays (the same on every process; copied).
          meta: what fits into JSON, the same on every process except `meta["data"]`, the state of this
            process's data iterator.
          metrics: values by name; the best checkpoint is chosen among those that hold a finite `best_key`.

        Raises:
          UserError: if this or the previous checkpoint could not be written, a full disk for one.
        """
        if any(old >= step for old in self._manager.all_steps()):
            self.wait()
            for old in [s for s in self._manager.all_steps() if s >= step]:
                self._manager.delete(old)
        names, leaves, _ = _named(state)
        leaves = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves]
        self._scores[step] = self._value(metrics)
        with jax.transfer_guard("allow"):
            shapes = {
                name: [list(leaf.shape), str(leaf.dtype), check]
                for name, leaf, check in zip(names, leaves, checksums(leaves), strict=True)
            }
            meta = {**meta, "data": _gather(json.dumps(meta.get("data")))}
            content = {"meta": meta, "leaves": shapes, "score": self._scores[step]}
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(dict(zip(names, leaves, strict=True))),
                        meta=ocp.args.JsonSave(seal(content)),
                    ),
                    force=True,
                )
            except Exception as e:
                raise self._unwritable(e) from e

    def amend(self, step: int, meta: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Adds to a checkpoint's meta, once it is on disk, and gives it metrics: all of that or, after a kill, nothing.

        The arrays are not touched. Raises UserError if its description cannot be read or written.
        """
        self.wait()
        file = self.folder / str(step) / DESCRIPTION
        try:
            content = unseal(file)
        except DamagedError as e:
            raise UserError(f"checkpoint {step} was damaged since it was written: {e}; give the command again.") from e
        self._scores[step] = content["score"] = self._value(metrics)
        content["meta"] |= meta
        if leads():
            part = file.with_name(file.name + ".part")
            try:
                part.write_text(json.dumps(seal(content)), encoding="utf-8")
                os.replace(part, file)
            except OSError as e:
                raise self._unwritable(e) from e

    def check_room(self, state: PyTree, most: int) -> None:
        """Raises UserError where the disk has no room for what there will be at a time: the newest, the best, the one
        that the run went on from, the next.

        state: a tree of arrays, or of their shapes. most: how many checkpoints there can be in all.
        """
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        needed = min(self._keep_last + 2 + (self._whole is not None), most) * size
        held = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.folder).free
        if needed > held + free:
            raise UserError(
                f"--workdir: the checkpoints in {self.folder} need {needed / 1e9:.3g} GB and its disk has "
                f"{free / 1e9:.3g} GB left; make room, lower config.checkpoint.keep or name another --workdir."
            )

    def restore(self, step: int | None, target: PyTree, partial: bool = False) -> tuple[PyTree, dict]:
        """Reads a checkpoint and verifies it.

        Args:
          step: which; None takes the newest that is whole and says on stderr why newer ones are passed over.
          target: a tree like the saved one: a `jax.ShapeDtypeStruct` with a sharding (of any mesh) or a
            jax.Array for each jax leaf, a numpy array for each numpy leaf; values are not used. What `processes.spread`
            made may be numpy in either and differ in the zeros that fill it up.
          partial: if True, the checkpoint may hold more than the target asks for.

        Returns:
          (state like target, meta as saved, `meta["data"]` being this process's own).

        Raises:
          UserError: no checkpoint, none that is whole, or one whose leaves differ from the target's.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps or steps[0] not in self._manager.all_steps():
            what = "checkpoint" if step is None else f"checkpoint {step}"
            raise UserError(f"there is no {what} in {self.folder}.")
        reasons = []
        for candidate in steps:
            try:
                with jax.transfer_guard("allow"):
                    restored = self._restore(candidate, target, partial)
            except DamagedError as e:
                reasons.append(f"checkpoint {candidate} in {self.folder} is damaged: {e}")
                continue
            if reasons and leads():
                print(f"warning: {'; '.join(reasons)}; going on from step {candidate}", file=sys.stderr)
            if not partial:
                self._whole = candidate
            return restored
        fix = "move the folder away to start anew" if step is None else "remove it to use the others"
        raise UserError(f"{'; '.join(reasons)}; {'no whole one is left; ' if step is None else ''}{fix}.")

    def wait(self) -> None:
        """Returns when the last save is on disk; raises a UserError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._unwritable(e) from e

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _restore(self, step: int, target: PyTree, partial: bool) -> tuple[PyTree, dict]:
        """One attempt; every process comes to the same result, so that all fall back together."""
        content, why = None, ""
        try:
            content = unseal(self.folder / str(step) / DESCRIPTION)
        except DamagedError as e:
            why = str(e)
        agree(why)
        assert content is not None
        names, leaves, treedef = _named(target)
        self._same(content["leaves"], dict(zip(names, leaves, strict=True)), step, partial)
        abstract = {n: _abstract(n, x) for n, x in zip(names, leaves, strict=True)}
        args = ocp.args.PyTreeRestore(
            abstract, restore_args={n: _restore_args(x) for n, x in abstract.items()}, partial_restore=partial
        )
        try:
            # Not by the manager: it waits for processes that may have failed to read what this one could.
            flat = ocp.PyTreeCheckpointHandler().restore(self.folder / str(step) / "state", args=args)
            found = [flat[name] for name in names]
        except Exception as e:  # Orbax and tensorstore raise bare exceptions for damaged files
            why = first_line(e)
        agree(why)
        for name, leaf, check in zip(names, found, checksums(found), strict=True):
            shape, *rest = content["leaves"][name]
            if (list(leaf.shape) != shape and not is_spread(leaf)) or [str(leaf.dtype), check] != rest:
                why = why or f"{name} does not match its checksum"
        agree(why)
        meta = content["meta"]
        return treedef.unflatten(found), {**meta, "data": _own(meta["data"], self.folder)}

    def _same(self, saved: dict, target: dict[str, Any], step: int, partial: bool) -> None:
        """Raises a UserError that names the first leaf in which the checkpoint and the target differ."""
        where = f"checkpoint {step} in {self.folder} does not fit this config:"
        for name, leaf in target.items():
            if name not in saved:
                raise UserError(f"{where} it has no {name}.")
            shape, dtype, _ = saved[name]
            # a numpy leaf may have grown or shrunk since: an index's tree does
            grows = isinstance(leaf, np.ndarray) or is_spread(leaf)
            fits = len(shape) == leaf.ndim if grows else tuple(shape) == tuple(leaf.shape)
            if not fits or dtype != str(leaf.dtype):
                wanted = f"{leaf.dtype}{list(leaf.shape)}"
                raise UserError(f"{where} {name} is {dtype}{shape} there and {wanted} here.")
        extra = [] if partial else [name for name in saved if name not in target]
        if extra:
            raise UserError(f"{where} it has {extra[0]}, which is not used here.")

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which checkpoints to keep: the newest, the best, and the one known to be whole."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in {*steps[-self._keep_last :], self._best(steps), self._whole} for step in steps]

    def _best(self, steps: Sequence[int]) -> int | None:
        """The step with the highest score, the later one of two alike; None where none has any."""
        if self._best_key is None:
            return None
        for step in set(steps) - set(self._scores):
            self._scores[step] = self._score(step)
        known = [(score, step) for step in steps if (score := self._scores[step]) is not None]
        return max(known)[1] if known else None

    def _value(self, metrics: Mapping[str, float] | None) -> float | None:
        value = (metrics or {}).get(self._best_key or "", math.nan)
        return float(value) if math.isfinite(value) else None

    def _score(self, step: int) -> float | None:
        """The score of a checkpoint on disk; one that is damaged has none."""
        folder = self.folder / str(step)
        try:
            content = unseal(folder / DESCRIPTION)
            if "score" in content:
                return content["score"]
            # A run from before scores were sealed: Orbax keeps them in a file of their own.
            return json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))[self._best_key]
        except (DamagedError, OSError, ValueError, LookupError, TypeError):
            return None

    def _unwritable(self, error: Exception) -> Exception:
        """A UserError if it was the disk: an OSError, or tensorstore's ValueError, which quotes the system."""
        said = re.search(r"([^:]*) \[os_error_code", str(error))
        if not said and not isinstance(error, OSError):
            return error
        why = said[1].strip() if said else first_line(error)
        return UserError(
            f"a checkpoint could not be written to {self.folder}: {why}; the one before is intact: make room and give "
            "the same command again."
        )


def _hush_late_writes() -> None:
    """Keeps a failed save to its one sentence.

    When one array cannot be written, Orbax raises that and closes its event loop; tensorstore's threads then tell the
    closed loop of the others' ends, and Python prints a trace for each, which nobody can catch.
    """
    before = sys.unraisablehook
    if before.__module__ == __name__:
        return

    def report(what: Any) -> None:
        if what.object is not None or str(what.exc_value) != "Event loop is closed":
            before(what)

    sys.unraisablehook = report


def _named(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Each leaf's dotted name, the leaves, and the tree's definition."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return names, [leaf for _, leaf in paths], treedef


def _abstract(name: str, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    if getattr(leaf, "sharding", None) is None:
        raise ValueError(f"target leaf {name} is neither a numpy array nor does it carry a sharding")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    strict = not is_spread(leaf)  # else zeros at the end are added or left out
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=strict)


def _gather(text: str) -> list[str]:
    """The text of every process, in their order."""
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = gather(np.array(raw.size))
    rows = gather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [rows[i, :n].tobytes().decode() for i, n in enumerate(sizes)]


def _own(texts: list[str], folder: pathlib.Path) -> Any:
    """This process's entry; with another number of processes only where all entries are the same."""
    if len(texts) == jax.process_count():
        return json.loads(texts[rank()])
    if len(set(texts)) > 1:
        raise UserError(f"{folder} was written by {len(texts)} processes; start as many to read it on.")
    return json.loads(texts[0])
