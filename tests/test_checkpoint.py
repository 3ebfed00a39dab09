"""Checkpoints: exact round trips on a mesh, damage found and passed over, the best kept over restarts."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.errors import UserError
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.verify import checksums, seal, unseal
from tests.damage import survive


def place(value, mesh, *spec):
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def make_state(seed=0, shape=(4, 2)):
    """A small state of all kinds: sharded, bf16, scalar, optimiser tuples, numpy."""
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"))
    rng = np.random.default_rng(seed)
    params = {
        "embed": place(rng.normal(size=(16, 8)).astype(np.float32), mesh, "fsdp", "tensor"),
        "block": {"scale": place(rng.normal(size=8).astype(jnp.bfloat16), mesh, "tensor")},
    }
    with jax.set_mesh(mesh):
        opt = jax.jit(optax.adam(1e-3).init)(params)
    index = {"vectors": rng.normal(size=(5, 4)).astype(np.float32), "versions": np.arange(5) + seed}
    return {"params": params, "opt": opt, "step": place(np.int32(seed), mesh), "index": index}


def target_of(state):
    def abstract(x):
        if isinstance(x, np.ndarray):
            return np.zeros_like(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(abstract, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def flip_bit(folder: pathlib.Path, step: int, item: str):
    """Flips one bit in the middle of the largest file that holds an item's content."""
    where = {"state": "state/**/d/*", "meta": "meta/metadata"}[item]
    path = max((folder / str(step)).glob(where), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    store = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2):
        store.save(step, make_state(step), meta={"offset": {"a": step}, "data": {"next": step}})
    store.close()
    return tmp_path


def test_what_was_saved_comes_back_bit_for_bit(two):
    store = Checkpointer(two, keep_last=2)
    assert store.latest() == 2
    for asked, step in ((None, 2), (1, 1)):
        state, meta = store.restore(asked, target_of(make_state()))
        assert_same(state, make_state(step))
        assert meta == {"offset": {"a": step}, "data": {"next": step}}
        assert state["params"]["embed"].sharding.spec == P("fsdp", "tensor")


def test_another_mesh_gets_the_same_values(two):
    state, _ = Checkpointer(two, keep_last=2).restore(None, target_of(make_state(shape=(1, 1))))
    assert_same(state, make_state(2))
    assert state["params"]["embed"].sharding.mesh.size == 1


def test_a_part_can_be_read_alone(two):
    target = {"params": target_of(make_state())["params"]}
    store = Checkpointer(two, keep_last=2, read_only=True)
    state, _ = store.restore(None, target, partial=True)
    assert_same(state, {"params": make_state(2)["params"]})
    with pytest.raises(UserError, match="which is not used here"):
        store.restore(None, target)


def test_the_state_may_be_changed_while_it_is_written(tmp_path):
    state, store = make_state(3), Checkpointer(tmp_path, keep_last=1)
    scale = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    store.save(3, state, meta={})
    state["index"]["vectors"][:] = -1
    state["params"] = scale(state["params"])
    restored, _ = store.restore(3, target_of(make_state()))
    assert_same(restored, make_state(3))


@pytest.mark.parametrize("item", ["state", "meta"])
def test_damage_is_found_and_the_older_one_taken(two, item, capfd):
    if item == "state":
        (file,) = (two / "2" / "state" / "d").iterdir()
        file.write_bytes(file.read_bytes()[:-9])
    else:
        flip_bit(two, 2, "meta")
    store = Checkpointer(two, keep_last=2)
    state, meta = store.restore(None, target_of(make_state()))
    assert_same(state, make_state(1))
    assert meta["data"] == {"next": 1}
    warning = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1
    assert "checkpoint 2 in" in warning[0] and "going on from step 1" in warning[0]
    # the run that goes on writes step 2 anew
    store.save(2, make_state(7), meta={})
    assert_same(store.restore(None, target_of(make_state()))[0], make_state(7))


def test_a_flipped_bit_that_the_format_does_not_see_is_found(tmp_path, capfd):
    store, rng = Checkpointer(tmp_path, keep_last=2), np.random.default_rng(0)
    noise = {step: {"x": rng.normal(size=50_000).astype(np.float32)} for step in (1, 2)}
    for step in (1, 2):
        store.save(step, noise[step], meta={})
    store.wait()
    flip_bit(tmp_path, 2, "state")
    assert_same(store.restore(None, noise[1])[0], noise[1])
    assert "is damaged: x does not match its checksum; going on from step 1" in capfd.readouterr().err


def test_damage_to_any_one_file_restores_no_wrong_value(tmp_path):
    state = make_state()
    assert survive(tmp_path, [make_state(1), make_state(2)], target_of(state), 12, random.Random(1)) > 2


def test_an_empty_newest_step_is_passed_over(two):
    (two / "3").mkdir()
    state, _ = Checkpointer(two, keep_last=2).restore(None, target_of(make_state()))
    assert_same(state, make_state(2))


def test_none_left_is_an_error_that_says_why(two):
    flip_bit(two, 1, "meta")
    flip_bit(two, 2, "meta")
    with pytest.raises(UserError, match="checkpoint 2 .* is damaged: .*checkpoint 1 .*move the folder away"):
        Checkpointer(two, keep_last=2).restore(None, target_of(make_state()))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t["params"].update(extra=t["step"]), r"does not fit this config: it has no params\.extra"),
        (lambda t: t["index"].pop("versions"), r"it has index\.versions, which is not used here"),
        (
            lambda t: t["index"].update(vectors=np.zeros((5, 4), np.float64)),
            r"index\.vectors is float32\[5, 4\] there and float64\[5, 4\] here",
        ),
        (
            lambda t: t["params"]["block"].update(scale=jax.ShapeDtypeStruct((8,), jnp.float32)),
            r"params\.block\.scale is bfloat16\[8\] there and float32\[8\] here",
        ),
    ],
)
def test_another_config_is_refused_by_the_leaf(two, change, sentence):
    target = target_of(make_state())
    change(target)
    with pytest.raises(UserError, match=sentence):
        Checkpointer(two, keep_last=2).restore(None, target)


def test_a_target_without_a_place_is_a_mistake_of_the_caller(two):
    target = target_of(make_state())
    target["step"] = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match="target leaf step"):
        Checkpointer(two, keep_last=2).restore(None, target)


def test_nothing_there(tmp_path):
    store = Checkpointer(tmp_path, keep_last=1)
    assert store.latest() is None
    with pytest.raises(UserError, match="there is no checkpoint in"):
        store.restore(None, {})
    with pytest.raises(UserError, match="there is no checkpoint 4 in"):
        store.restore(4, {})
    with pytest.raises(UserError, match="there are no checkpoints at"):
        Checkpointer(tmp_path / "nowhere", keep_last=1, read_only=True)


def test_the_best_outlives_restarts(tmp_path):
    figures = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.4, 6: 0.3}
    state = {"x": np.zeros(2)}
    for step, figure in figures.items():  # a restart before each save
        store = Checkpointer(tmp_path, keep_last=2, best_key="ndcg")
        store.save(step, state, meta={}, metrics={"ndcg": figure, "loss": 1.0})
        store.close()
    store = Checkpointer(tmp_path, keep_last=2, best_key="ndcg")
    assert store.best() == 2 and store.latest() == 6
    assert {int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()} == {2, 5, 6}


def test_the_last_one_known_to_be_whole_stays_until_another_is(two, capfd):
    def left():
        return {int(p.name) for p in two.iterdir() if p.name.isdigit()}

    target = target_of(make_state())
    flip_bit(two, 2, "meta")
    for saves, whole, kept in (((3, 4), 1, {1, 4}), ((5, 6), 4, {4, 6})):
        store = Checkpointer(two, keep_last=1)
        assert_same(store.restore(None, target)[0], make_state(whole))
        store.restore(None, {"step": target["step"]}, partial=True)
        for step in saves:
            store.save(step, make_state(step), meta={})
        store.close()
        assert left() == kept


def test_without_metrics_there_is_no_best(tmp_path):
    store = Checkpointer(tmp_path, keep_last=1, best_key="ndcg")
    for step in (1, 2):
        store.save(step, {"x": np.zeros(2)}, meta={})
    store.wait()
    assert store.best() is None and store.latest() == 2
    assert {p.name for p in tmp_path.iterdir() if p.name.isdigit()} == {"2"}


def test_figures_may_follow_a_checkpoint(tmp_path):
    store = Checkpointer(tmp_path, keep_last=1, best_key="ndcg")
    for step, figure in {1: 0.5, 2: 0.3, 3: 0.4}.items():
        store.save(step, {"x": np.full(2, step)}, meta={"data": step, "due": True})
        store.amend(step, {"due": False}, {"ndcg": figure})
    store.close()
    store = Checkpointer(tmp_path, keep_last=1, best_key="ndcg")
    assert (store.best(), store.latest()) == (1, 3)
    for step in (1, 3):
        state, meta = store.restore(step, {"x": np.zeros(2, int)})
        assert (state["x"] == step).all() and meta == {"data": step, "due": False}


def test_a_run_from_before_scores_were_sealed_keeps_its_best(tmp_path):
    store = Checkpointer(tmp_path, keep_last=3, best_key="ndcg")
    for step in (1, 2):
        store.save(step, {"x": np.zeros(2)}, meta={})
    store.close()
    for step, figure in ((1, 0.9), (2, 0.1)):  # as Orbax writes them
        file = tmp_path / str(step) / "meta" / "metadata"
        content = unseal(file)
        del content["score"]
        file.write_text(json.dumps(seal(content)))
        (tmp_path / str(step) / "metrics").mkdir()
        (tmp_path / str(step) / "metrics" / "metrics").write_text(json.dumps({"ndcg": figure}))
    assert Checkpointer(tmp_path, keep_last=3, best_key="ndcg", read_only=True).best() == 1


def test_a_damaged_one_that_was_asked_for_is_not_replaced_in_silence(two):
    flip_bit(two, 2, "meta")
    with pytest.raises(UserError, match="checkpoint 2 in .* is damaged: .*; remove it to use the others"):
        Checkpointer(two, keep_last=2).restore(2, target_of(make_state()))


def test_a_disk_without_room_is_named_before_it_is_full(tmp_path, monkeypatch):
    store, state = Checkpointer(tmp_path, keep_last=2), {"x": np.zeros(250_000)}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 5 * 10**6))
    store.check_room(state, most=2)
    with pytest.raises(UserError, match="need 0.008 GB"):  # two, the best, the next
        store.check_room(state, most=100)
    store.save(1, state, meta={})
    store.restore(1, state)
    with pytest.raises(UserError, match="need 0.01 GB and its disk has 0.005 GB left"):  # and that one
        store.check_room(state, most=100)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": Failed: No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, error):
    def full():
        raise error

    store = Checkpointer(tmp_path, keep_last=1)
    monkeypatch.setattr(store._manager, "wait_until_finished", full)
    with pytest.raises(UserError, match="could not be written to .*No space left on device; the one before is intact"):
        store.wait()


def test_checksums_do_not_depend_on_the_place():
    state, one = make_state(5), make_state(5, shape=(1, 1))
    host = [np.asarray(x) for x in jax.tree.leaves(state)]
    expected = [int(sum(np.frombuffer(x.tobytes(), f"u{min(4, x.itemsize)}").tolist()) % 2**32) for x in host]
    assert checksums(jax.tree.leaves(state)) == checksums(jax.tree.leaves(one)) == checksums(host) == expected
    assert checksums([np.array([True, False, True])]) == checksums([jnp.array([True, False, True])]) == [2]


KILLED = """
    import os, signal, sys, threading, time
    import numpy as np
    from r3jax.run.checkpoint import Checkpointer
    store = Checkpointer(sys.argv[1], keep_last=3)
    big = lambda step: {"x": np.full(4_000_000, step)}
    store.save(1, big(1), meta={"step": 1})
    store.wait()
    threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 1000):
        store.save(step, big(step), meta={"step": step})
"""


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3])
def test_a_kill_during_a_save_leaves_a_whole_one(tmp_path, seconds):
    code = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(seconds)]
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(code, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    state, meta = Checkpointer(tmp_path, keep_last=3).restore(None, {"x": np.zeros(4_000_000, int)})
    assert (state["x"] == meta["step"]).all()
    assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name]


def test_a_failed_save_leaves_no_traces_of_its_late_writes(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    for _ in range(2):  # a second one adds nothing
        Checkpointer(tmp_path, keep_last=1).close()
    late = types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(object=None, exc_value=RuntimeError("something else"))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert reported == [other]
