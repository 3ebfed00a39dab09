"""State on disk: the last few checkpoints and the best one, each verified when it is read.

Orbax writes in the background and renames a step into place when all of it is there, so a kill during a save
leaves the one before. What Orbax does not see are flipped bits (they restore silently) and a damaged newest
step: each leaf carries a checksum, and `restore` goes back, newest to oldest, to the first that is whole.
Leaves are stored under their path's name ("params.embed"), so that a part of the state can be read alone.
"""

import json
import math
import pathlib
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from r3jax.errors import UserError

PyTree = Any


class DamagedError(Exception):
    """A checkpoint that cannot be read or does not match its checksums; says why."""


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
        self._best_key = best_key
        keep: list = [LatestN(keep_last)]
        best_fn = None
        if best_key is not None:
            # best_fn beside the policy: without it a restarted manager reads no metrics and drops the best
            best_fn = lambda metrics: metrics[best_key]  # noqa: E731
            keep.append(BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(keep),
                best_fn=best_fn,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """The newest step on disk (whole or not), None without any."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the best `best_key` metric, None if no step has it."""
        if self._best_key is None:
            raise ValueError("best() needs a best_key")
        return self._manager.best_step()

    def save(
        self, step: int, state: PyTree, *, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to write one checkpoint; returns once the state may be changed or donated again.

        Steps on disk that are not older than `step` are removed first: they are damaged ones that `restore`
        passed over, or come from a future that this run has left.

        Args:
          step: the number of optimiser steps done.
          state: a tree of jax arrays (sharded as they are) and numpy arrays (which are copied).
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
        with jax.transfer_guard("allow"):
            shapes = {
                name: [list(leaf.shape), str(leaf.dtype), check]
                for name, leaf, check in zip(names, leaves, checksums(leaves), strict=True)
            }
            content = {"meta": {**meta, "data": _gather(json.dumps(meta.get("data")))}, "leaves": shapes}
            text = json.dumps(content, sort_keys=True)
            if metrics is not None:
                value = metrics.get(self._best_key or "", math.nan)
                metrics = {k: float(v) for k, v in metrics.items()} if math.isfinite(value) else None
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(dict(zip(names, leaves, strict=True))),
                        meta=ocp.args.JsonSave({"text": text, "crc": zlib.crc32(text.encode())}),
                    ),
                    metrics=metrics,
                    force=True,
                )
            except OSError as e:
                raise self._unwritable(e) from e

    def restore(self, step: int | None, target: PyTree, partial: bool = False) -> tuple[PyTree, dict]:
        """Reads a checkpoint and verifies it.

        Args:
          step: which; None takes the newest that is whole and says on stderr why newer ones are passed over.
          target: a tree like the saved one: a `jax.ShapeDtypeStruct` with a sharding (of any mesh) or a
            jax.Array for each jax leaf, a numpy array for each numpy leaf; values are not used.
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
            if reasons and jax.process_index() == 0:
                print(f"warning: {'; '.join(reasons)}; going on from step {candidate}", file=sys.stderr)
            return restored
        raise UserError(f"{'; '.join(reasons)}; no whole one is left; move the folder away to start anew.")

    def wait(self) -> None:
        """Returns when the last save is on disk; raises a UserError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except OSError as e:
            raise self._unwritable(e) from e

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _restore(self, step: int, target: PyTree, partial: bool) -> tuple[PyTree, dict]:
        """One attempt; every process comes to the same result, so that all fall back together."""
        content, why = None, ""
        try:
            kept = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if zlib.crc32(kept["text"].encode()) != kept["crc"]:
                raise ValueError("its description does not match its checksum")
            content = json.loads(kept["text"])
        except Exception as e:  # whatever a damaged file makes of it
            why = _first_line(e)
        _agree(why)
        assert content is not None
        names, leaves, treedef = _named(target)
        self._same(content["leaves"], dict(zip(names, leaves, strict=True)), step, partial)
        abstract = {n: _abstract(n, x) for n, x in zip(names, leaves, strict=True)}
        args = ocp.args.PyTreeRestore(
            abstract, restore_args={n: _restore_args(x) for n, x in abstract.items()}, partial_restore=partial
        )
        try:
            flat = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
            found = [flat[name] for name in names]
            for name, check in zip(names, checksums(found), strict=True):
                if check != content["leaves"][name][2]:
                    raise ValueError(f"{name} does not match its checksum")
        except Exception as e:  # Orbax and tensorstore raise bare exceptions for damaged files
            why = _first_line(e)
        _agree(why)
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
            fits = len(shape) == leaf.ndim if isinstance(leaf, np.ndarray) else tuple(shape) == tuple(leaf.shape)
            if not fits or dtype != str(leaf.dtype):
                wanted = f"{leaf.dtype}{list(leaf.shape)}"
                raise UserError(f"{where} {name} is {dtype}{shape} there and {wanted} here.")
        extra = [] if partial else [name for name in saved if name not in target]
        if extra:
            raise UserError(f"{where} it has {extra[0]}, which is not used here.")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"a checkpoint could not be written to {self.folder}: {_first_line(error)}.")


def checksums(leaves: list[Any]) -> list[int]:
    """One uint32 for each array: the wrap-around sum of its bits, the same however it is sharded."""
    on_device = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    sums = jax.device_get(_device_sums([leaves[i] for i in on_device]))
    result = {i: int(s) for i, s in zip(on_device, sums, strict=True)}
    return [result[i] if i in result else _host_sum(np.asarray(leaf)) for i, leaf in enumerate(leaves)]


@jax.jit
def _device_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        words = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _host_sum(x: np.ndarray) -> int:
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * min(4, x.dtype.itemsize)}")
    return int(np.sum(words, dtype=np.uint32))


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
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _agree(why: str) -> None:
    """Raises DamagedError on all processes if one of them has a reason."""
    bad = bool(why)
    if jax.process_count() > 1:
        bad = bool(np.any(multihost_utils.process_allgather(np.array(bad))))
    if bad:
        raise DamagedError(why or "another process could not read it")


def _gather(text: str) -> list[str]:
    """The text of every process, in their order."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(raw.size)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: raw.size] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [rows[i, :n].tobytes().decode() for i, n in enumerate(sizes)]


def _own(texts: list[str], folder: pathlib.Path) -> Any:
    """This process's entry; with another number of processes only where all entries are the same."""
    if len(texts) == jax.process_count():
        return json.loads(texts[jax.process_index()])
    if len(set(texts)) > 1:
        raise UserError(f"{folder} was written by {len(texts)} processes; start as many to read it on.")
    return json.loads(texts[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
