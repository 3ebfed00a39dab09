"""Training an adapter: only it changes, off is the reference in both stages, meshes, chunks, resumed runs."""

import json

import jax
import numpy as np
import pytest

from r3jax import assembly, evaluate, train, weights
from r3jax.errors import UserError
from r3jax.model import lora
from r3jax.model import params as model_params
from r3jax.run.checkpoint import Checkpointer
from tests import fixtures
from tests.test_train import same_bits, state_of

LORA = {"lora__rank": 4, "lora__alpha": 8, "sft__weight_decay": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def base(folder):
    """Host weights of a model that writes completions of different lengths."""
    return fixtures.trained_params(fixtures.parts(folder))


def begin(parts, base, name):
    start = fixtures.placed(base, parts)
    return assembly.make_stage(name, parts, start), assembly.first_state(name, parts, start)


def play(parts, base, name: str, steps: int):
    """The metrics of each of the first steps of a stage, and the state after them."""
    rows = []
    with jax.set_mesh(parts.mesh):
        stage, state = begin(parts, base, name)
        for step in range(1, steps + 1):
            with jax.transfer_guard("disallow"):
                batch, _ = stage.next_batch(state, step)
                state, metrics = stage.update(state, batch)
            rows.append({key: float(value) for key, value in metrics.items()})
    return rows, jax.device_get(state)


@pytest.fixture(scope="module", params=["sft", "rl"])
def played(request, folder, base):
    parts = fixtures.parts(folder, **LORA)
    return request.param, parts, *play(parts, base, request.param, 3)


def test_only_the_adapter_changes(played, base):
    name, parts, _, state = played
    same_bits(state.reference, base)
    with jax.set_mesh(parts.mesh):
        new = jax.device_get(lora.init(fixtures.placed(base, parts), parts.model, parts.mesh, 0))
    assert jax.tree.structure(new) == jax.tree.structure(state.params)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(state.params), strict=True
    ):
        assert np.abs(before - after).max() > 1e-4, path
    table = lora.adapter_table(parts.model)
    assert model_params.flatten(state.params).keys() == table.keys()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * sum(int(np.prod(shape)) for shape, _ in table.values())


def test_the_kl_term_is_that_to_the_adapter_off(played):
    name, _, rows, _ = played
    key = "loss/kl" if name == "sft" else "policy/kl"
    assert abs(rows[0][key]) < 1e-6 < 1e-5 < rows[2][key]


def test_the_policy_is_the_one_that_sampled(folder, base):
    """With an adapter, and where the config's dropout is stage 1's alone."""
    rows, _ = play(fixtures.parts(folder, **LORA, lora__dropout=0.5), base, "rl", 2)
    for row in rows:
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-5) and row["policy/logp_gap"] < 1e-5


@pytest.mark.parametrize("mesh, chunks", [((1, 4, 2), 2)])
def test_chunks_and_meshes_change_nothing(played, folder, base, mesh, chunks):
    name, _, rows, state = played
    parts = fixtures.parts(folder, mesh, **LORA, **{f"{name}__chunks": chunks})
    found, after = play(parts, base, name, 1)
    for key, value in rows[0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-3, abs=2e-5), key
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_dropout_draws_anew_each_step_and_learns(folder, base):
    dry, _ = play(fixtures.parts(folder, **LORA), base, "sft", 2)
    wet, _ = play(fixtures.parts(folder, **LORA, lora__dropout=0.5, sft__chunks=2), base, "sft", 2)
    # At the start B is 0, so that nothing is dropped that counts; B's gradient sees it.
    assert wet[0]["loss"] == pytest.approx(dry[0]["loss"], rel=1e-5)
    assert wet[0]["grad_norm"] != pytest.approx(dry[0]["grad_norm"], rel=1e-3)
    assert wet[1]["loss"] != pytest.approx(dry[1]["loss"], rel=1e-5) and np.isfinite(wet[1]["loss"])


@pytest.mark.parametrize("name, mesh", [pytest.param("sft", (1, 1, 1), marks=pytest.mark.slow), ("rl", (1, 4, 2))])
def test_two_and_two_steps_equal_four_bit_for_bit(tmp_path, base, name, mesh):
    parts = fixtures.parts(tmp_path, mesh, **LORA, lora__dropout=0.2)
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1)
    with jax.set_mesh(parts.mesh):
        assembly.keep_start(parts, fixtures.placed(base, parts))
        stage, state = begin(parts, base, name)
        for step in range(1, 5):
            state, metrics = stage.update(state, stage.next_batch(state, step)[0])
            if step == 2:
                kept = state_of(stage, assembly.to_keep(state, parts))
                checkpointer.save(2, kept, meta={"data": stage.stream_state()})
        held = {p.name for p in (tmp_path / "checkpoints" / "2" / "state").rglob("*")}
        assert not any("kernel" in p for p in held)  # the base is not in it
        other = assembly.make_stage(name, parts, None)
        target = {"train": assembly.abstract_stage_state(name, parts), "host": other.host_state()}
        found, meta = checkpointer.restore(None, target)
        again = assembly.restored(found["train"], parts)
        other.resume(found["host"], meta["data"])
        for step in (3, 4):
            again, metrics_again = other.update(again, other.next_batch(again, step)[0])
        checkpointer.close()
        same_bits(jax.device_get(state_of(other, again)), jax.device_get(state_of(stage, state)))
        same_bits(jax.device_get(metrics_again), jax.device_get(metrics))


# Whole runs.


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def logged(folder, key: str) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if row.get(key) is not None]


FEW = {"sft__steps": 6, "sft__learning_rate": 5e-3, "rl__steps": 2, "evaluate__every": 3, "checkpoint__every": 3}


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """A run that trained an adapter on the end of the finished run."""
    trained, _ = fixtures.finished_run()
    folder = tmp_path_factory.mktemp("adapter")
    flags = fixtures.flags(trained, "sft", init_from=trained / "run", **LORA, **FEW)
    train.main([*flags, f"--workdir={folder / 'run'}"])
    return trained, folder / "run", flags


def test_a_run_keeps_its_base_once_and_reports_the_kl_to_it(stage_1):
    _, run, flags = stage_1
    assert (run / "checkpoints" / "base" / "0").is_dir()
    report = results(run)
    assert report["ability_kl"]["rl"] == 0 < 1e-4 < report["ability_kl"]["sft"]
    assert logged(run, "eval/ability_kl")[-1] > 1e-4
    assert report["splits"]["seen"]["sft_direct"]["recall@100"] > 0.5
    before = (run / "metrics.jsonl").read_bytes()
    train.main([*flags, f"--workdir={run}"])  # the same command again: resumed at its end, evaluated anew
    again = results(run)
    assert again["ability_kl"] == report["ability_kl"] and again["p_values"] == report["p_values"]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_evaluator_reads_base_and_adapter(stage_1, tmp_path):
    _, run, _ = stage_1
    evaluate.main([f"--workdir={run}", "--split=seen", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "evaluation.json").read_text())["splits"]["seen"]["sft_direct"]
    assert found["ndcg@10"] == results(run)["splits"]["seen"]["sft_direct"]["ndcg@10"]


def test_stage_2_goes_on_with_the_adapter_of_stage_1(stage_1, tmp_path):
    trained, run, _ = stage_1
    flags = fixtures.flags(trained, init_from=run, **LORA, **FEW)
    train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    assert logged(tmp_path / "run", "policy/kl")[0] > 1e-5  # the reference is the adapter off, not stage 1's end
    found = results(tmp_path / "run")
    assert found["ability_kl"]["sft"] == pytest.approx(results(run)["ability_kl"]["sft"], rel=1e-4)
    assert found["splits"]["seen"]["sft_direct"]["mrr@10"] == results(run)["splits"]["seen"]["sft_direct"]["mrr@10"]
    parts = fixtures.parts(trained, init_from=run, **LORA)
    with jax.set_mesh(parts.mesh):
        models = [
            weights.load_params(f, parts.model, parts.mesh, s) for f, s in ((run, "sft"), (tmp_path / "run", "rl"))
        ]
        same_bits(*jax.device_get([lora.split(m)[0] for m in models]))


def test_an_adapter_may_be_merged_to_go_on_but_not_exchanged(stage_1):
    trained, run, _ = stage_1
    changes = {"init_from": run}
    plain = fixtures.parts(trained, **changes)
    on = fixtures.parts(trained, **changes, **LORA)
    with jax.set_mesh(plain.mesh):
        merged, both = plain.initial_params(), on.initial_params()
        assert lora.split(merged)[1] == {} and lora.split(both)[1] != {}
        np.testing.assert_allclose(plain.encode_corpus(merged), on.encode_corpus(both), atol=1e-5)
        with pytest.raises(UserError, match="was trained with config.lora.rank=4, alpha=8 and targets=q,k,v,o,gate"):
            fixtures.parts(trained, **changes, **(LORA | {"lora__rank": 2})).initial_params()


def test_the_frozen_base_is_stored_in_the_compute_dtype(folder):
    parts = fixtures.parts(folder, **LORA, model__compute_dtype="bfloat16")
    assert parts.model.param_dtype == "bfloat16"
    leaves = model_params.flatten(lora.abstract(parts.model, parts.mesh))
    assert {leaf.dtype.name for leaf in leaves.values()} == {"float32"}
    assert fixtures.parts(folder, model__compute_dtype="bfloat16").model.param_dtype == "float32"
