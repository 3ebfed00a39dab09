"""The trainer from command line to report; a run that is stopped and started again equals one that is not."""

import json
import os
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from r3jax import assembly, loop, train
from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.model.sharding import make_mesh
from r3jax.results import curves
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from r3jax.run.peers import Peers
from tests import fixtures

CONDITIONS = ("direct", "reasoning", "averaged", "empty", "shuffled", "copied")
TRAINED = [f"{stage}_{how}" for stage in ("sft", "rl") for how in CONDITIONS]
METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(row: dict) -> dict:
    """A line of metrics.jsonl without what differs between two equal runs."""
    return {k: v for k, v in row.items() if not k.startswith("time") and k != "tokens_per_second"}


@pytest.fixture(scope="module")
def finished():
    folder, said = fixtures.finished_run()
    return folder / "run", json.loads((folder / "run" / "results.json").read_text()), said


def test_results_hold_every_condition_with_its_figures(finished):
    _, results, _ = finished
    assert set(results["splits"]) == {"seen", "unseen"}
    for split, conditions in results["splits"].items():
        assert list(conditions) == ["bm25", "untrained", *TRAINED]
        for name, figures in conditions.items():
            assert figures["queries"] == 20 and figures["ms_per_query"] > 0
            assert all(0 <= figures[m] <= 1 for m in METRICS)
            assert (figures["thought_tokens"] is not None) == name.endswith(("reasoning", "averaged"))
        p = results["p_values"][split]
        assert {
            "rl_reasoning > sft_reasoning",
            "rl_reasoning > rl_empty",
            "rl_reasoning > rl_shuffled",
        } <= set(p)
        assert "best trained > bm25" in p and all(0 <= value <= 1 for value in p.values())
    # Stage 1 has learnt something: a chance ranking of 200 documents has a recall@100 of one half.
    assert results["splits"]["seen"]["sft_direct"]["recall@100"] > 0.6


def test_results_hold_cost_and_refresh(finished):
    _, results, _ = finished
    assert results["seconds"] > sum(results["stage_seconds"].values()) > 0
    assert set(results["stage_seconds"]) == {"sft", "rl", "evaluate"}
    assert 2e8 < results["peak_rss_bytes"] < 6 * 2**30
    refresh = results["refresh"]
    assert refresh["policy"] == "hybrid" and refresh["probe_steps"] == 2
    assert 0 < refresh["max_share_reencoded"] <= 0.1
    assert 0 <= refresh["mean_abs_reward_error"] <= refresh["max_abs_reward_error"]


def test_the_kl_to_the_base_is_reported_for_both_stages(finished):
    """The base is the run's start in both, though stage 2's own reference is the end of stage 1."""
    folder, results, said = finished
    kl = results["ability_kl"]
    assert kl["untrained"] == 0 and kl["sft"] > 1e-3 and kl["rl"] > 1e-3
    for stage in ("sft", "rl"):
        measured = [
            r["eval/ability_kl"]
            for r in lines(folder / "metrics.jsonl")
            if r["stage"] == stage and r.get("eval/ability_kl") is not None
        ]
        assert min(abs(value - kl[stage]) for value in measured) < 1e-4 * kl[stage]  # the best step's
    assert f"KL to the base on ordinary chats, nats per token: untrained 0.0000, sft {kl['sft']:.4f}" in said


def test_what_a_run_leaves_on_disk(finished):
    folder, _, said = finished
    rows = lines(folder / "metrics.jsonl")
    for stage, steps in (("sft", 40), ("rl", 4)):
        logged = [r["step"] for r in rows if r["stage"] == stage and "loss" in r]
        assert logged == list(range(1, steps + 1))
        last = [r for r in rows if r["stage"] == stage and "eval/ndcg@10/reasoning" in r]
        assert last[-1]["step"] == steps
        assert any((folder / "checkpoints" / stage).glob(str(steps)))
    rl = [r for r in rows if r["stage"] == "rl" and "loss" in r]
    for key in (
        "reward/mean",
        "completion/length_mean",
        "completion/token_rate",
        "index/share",
        "index/age_max",
    ):
        assert all(np.isfinite(r[key]) for r in rl)
    for r in rl:
        parts = sum(r[f"time/{name}"] for name in ("rollout", "search", "encode", "reward", "update"))
        assert parts <= r["time/step"]
    assert {r["step"] for r in lines(folder / "samples.jsonl")} == {2, 4}
    assert len(list((folder / "trec").glob("*.run"))) == 2 * 14
    assert len(json.loads((folder / "examples.json").read_text())) == 40
    assert "<html" in (folder / "report.html").read_text() and list((folder / "tensorboard").rglob("*tfevents*"))
    assert (folder / "tokenizer" / "tokenizer.json").exists() and (folder / "thoughts.jsonl").exists()
    assert json.loads((folder / "config.json").read_text())["rl"]["steps"] == 4
    assert "stage sft: 40 steps" in said and "stage 1 runs before stage 2" in said
    assert "rl_reasoning" in said and f"report: {folder / 'report.html'}" in said


def test_the_ledger_has_each_training_record_once_an_epoch(finished):
    folder, _, _ = finished
    rows = lines(folder / "ledger.jsonl")
    for stage, batch, steps in (("sft", 16, 40), ("rl", 8, 4)):
        taken = [row["rows"] for row in rows if row["stage"] == stage]
        assert list(map(len, taken)) == [batch] * steps
        queries = sum(taken, [])
        for epoch in (queries[i : i + 120] for i in range(0, len(queries), 120)):
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(120))


def test_samples_are_of_the_step_they_name(finished):
    folder, _, _ = finished
    data = beir.load(run_config.load_saved(folder / run_config.SAVED_NAME).data.path)
    taken = {row["step"]: row["rows"] for row in lines(folder / "ledger.jsonl") if row["stage"] == "rl"}
    for sample in lines(folder / "samples.jsonl"):
        assert sample["query"] in {data.query_texts[row] for row in taken[sample["step"]]}


def test_the_page_draws_what_a_run_logs(finished):
    folder, _, _ = finished
    logged = {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    plots = [curves._EVAL, curves._TIME, *curves._TERMS, *curves._REWARD, *curves._INDEX]
    assert {key for plot in plots for key in plot.keys} - logged == set()
    assert {key for plot in curves._CHOSEN for key in plot.keys} & logged == set()  # test_rl.py has these


HEALTH = {
    "reward": ("mean", "std", "retrieval", "retrieval_std", "format", "format_std", "length", "length_std"),
    "policy": ("flat_groups", "kl", "entropy", "clip_low", "clip_high", "logp_gap", "ratio"),
    "completion": ("length_mean", "length_min", "length_max", "cut", "token_rate"),
    "time": ("rollout", "encode", "search", "reward", "update", "step"),
    "index": ("reencoded", "share", "age_mean", "age_max", "probe_drift", "probe_recall", "rebuilds"),
}


def test_each_step_of_stage_2_tells_its_health(finished):
    """Every signal is a finite number at every step, and those that belong together agree."""
    rows = [r for r in lines(finished[0] / "metrics.jsonl") if r["stage"] == "rl" and "time/step" in r]
    assert rows
    for r in rows:
        for name in ("grad_norm", "tokens_per_second", *(f"{a}/{b}" for a, names in HEALTH.items() for b in names)):
            assert np.isfinite(r[name]), name
        assert r["completion/length_min"] <= r["completion/length_mean"] <= r["completion/length_max"]
        assert r["completion/token_rate"] + r["completion/cut"] <= 1 + 1e-6  # some end with another token
        assert sum(r[f"time/{part}"] for part in HEALTH["time"][:-1]) <= r["time/step"]
        assert r["policy/entropy"] > 0 and r["policy/kl"] >= 0
    probed = [r for r in rows if "probe/reward_error" in r]
    assert probed and all(0 <= r["probe/stale_recall"] <= 1 for r in probed)


def test_a_changed_data_set_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished[0].parent, tmp_path / "copy")
    corpus = folder / "data" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("show", "exhibit", 1))
    given = fixtures.flags(finished[0].parent, **fixtures.FINISHED)
    flags = [flag.replace(str(finished[0].parent), str(folder)) for flag in given]
    config = folder / "run" / "config.json"
    config.write_text(config.read_text().replace(str(finished[0].parent), str(folder)))
    with pytest.raises(UserError, match="config.data.path: .* has changed since this run began"):
        train.main([*flags, f"--workdir={folder / 'run'}"])


def test_a_finished_run_given_again_trains_nothing(finished, tmp_path, capsys):
    whole, results, _ = finished
    folder = shutil.copytree(whole, tmp_path / "run")
    before = [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    train.main([*fixtures.flags(whole.parent, **fixtures.FINISHED), f"--workdir={folder}"])
    assert [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")] == before
    again = json.loads((folder / "results.json").read_text())
    assert again["p_values"] == results["p_values"] and again["refresh"] == results["refresh"]
    assert again["seconds"] > sum(results["stage_seconds"][stage] for stage in ("sft", "rl"))
    assert "rl: going on from step 4 of 4" in capsys.readouterr().out


def test_with_init_from_stage_1_is_skipped(finished, tmp_path):
    folder, results, _ = finished
    argv = [*fixtures.flags(folder.parent, init_from=folder, rl__steps=1), f"--workdir={tmp_path / 'run'}"]
    train.main(argv)
    conditions = json.loads((tmp_path / "run" / "results.json").read_text())["splits"]["seen"]
    assert [name for name in conditions if name.startswith("sft")] == []
    start, end = conditions["start_direct"], results["splits"]["seen"]["rl_direct"]
    assert {m: start[m] for m in METRICS} == pytest.approx({m: end[m] for m in METRICS})  # its weights
    kept = [(f / "tokenizer" / "tokenizer.json").read_bytes() for f in (folder, tmp_path / "run")]
    assert kept[0] == kept[1]


def test_room_is_asked_for_all_that_is_saved(finished, tmp_path, monkeypatch):
    """The index too."""
    seen = []
    for name, at in (("check_room", 0), ("save", 1)):
        real = getattr(Checkpointer, name)

        def told(self, *given, real=real, at=at, **named):
            seen.append([(x.shape, x.dtype) for x in jax.tree.leaves(given[at])])
            return real(self, *given, **named)

        monkeypatch.setattr(Checkpointer, name, told)
    monkeypatch.setattr(train, "compare", lambda *_: sys.exit("trained"))
    argv = [*fixtures.flags(finished[0].parent, init_from=finished[0], rl__steps=1), f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="trained"):
        train.main(argv)
    asked, saved = seen
    assert asked == saved


def test_what_takes_long_beside_the_steps_gives_signs_of_life(finished, tmp_path, monkeypatch):
    """Else a job of several processes would be taken for one that hangs."""
    beats, heard = [], {}

    def listening(name, work):
        def listened(*given):
            before = len(beats)
            result = work(*given)
            heard[name] = len(beats) - before
            return result

        return listened

    monkeypatch.setattr(Peers, "beat", lambda peers: beats.append(1))
    monkeypatch.setattr(loop, "validate", listening("validate", loop.validate))
    monkeypatch.setattr(train, "compare", listening("compare", train.compare))
    few = {"rl__steps": 1, "evaluate__thoughts": 0, "data__eval_splits": "unseen"}
    argv = [*fixtures.flags(finished[0].parent, init_from=finished[0], **few), f"--workdir={tmp_path / 'run'}"]
    train.main(argv, listening("stage", assembly.make_stage))
    corpus = -(-200 // fixtures.MICRO["evaluate.batch_size"])  # batches
    assert heard["stage"] == corpus and heard["validate"] >= corpus + 2
    assert heard["compare"] >= 2 * (1 + corpus + 5)  # of two models: weights, documents, conditions


# A stage, interrupted after two steps, in one process.


def state_of(stage, state) -> dict:
    return {"train": state, "host": stage.host_state()}


def same_bits(a, b):
    for (path, x), (other, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (a, b)), strict=True):
        assert path == other
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes(), f"{jax.tree_util.keystr(path)} differs"


@pytest.mark.parametrize(
    "name, mesh, changes",
    [
        pytest.param("sft", (1, 1, 1), {}, marks=pytest.mark.slow),  # the next two are more than it
        ("sft", (1, 4, 2), {}),
        ("sft", (1, 1, 1), {"data__workers": 2}),
        pytest.param("rl", (1, 1, 1), {}, marks=pytest.mark.slow),
        ("rl", (1, 4, 2), {}),
        ("rl", (1, 1, 1), {"rl__epochs": 2}),
    ],
)
def test_two_and_two_steps_equal_four_bit_for_bit(tmp_path, name, mesh, changes):
    parts = fixtures.parts(tmp_path, mesh, **changes)
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1)
    with jax.set_mesh(parts.mesh):
        params = parts.initial_params()
        stage, state = assembly.make_stage(name, parts, params), assembly.first_state(name, parts, params)
        for step in range(1, 5):
            batch, _ = stage.next_batch(state, step)
            state, metrics = stage.update(state, batch)
            if step == 2:
                checkpointer.save(2, state_of(stage, state), meta={"data": stage.stream_state()})
        other = assembly.make_stage(name, parts, None)
        target = {"train": assembly.abstract_stage_state(name, parts), "host": other.host_state()}
        restored, meta = checkpointer.restore(None, target)
        again = restored["train"]
        other.resume(restored["host"], meta["data"])
        for step in (3, 4):
            batch, _ = other.next_batch(again, step)
            again, metrics_again = other.update(again, batch)
        checkpointer.close()
        stage.close()
        other.close()
        same_bits(jax.device_get(state_of(other, again)), jax.device_get(state_of(stage, state)))
        same_bits(jax.device_get(metrics_again), jax.device_get(metrics))


# Runs that are killed.


def command(folder, workdir):
    more = {"sft__steps": 24, "rl__steps": 9, "checkpoint__every": 3, "evaluate__every": 0}
    return ["-m", "r3jax.train", *fixtures.flags(folder, **more), f"--workdir={workdir}"]


def finish(folder, workdir) -> str:
    """Runs to the end; what it printed. The terminal shows nothing but our own lines."""
    process = fixtures.run_python(*command(folder, workdir))
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == "", errors
    return said


def kill_in(folder, workdir, stage: str, seconds: float) -> int:
    """Starts a run and kills it so long after a new checkpoint of a stage appears; its last whole step."""
    steps = workdir / "checkpoints" / stage

    def whole():
        return max((int(p.name) for p in steps.glob("*") if p.name.isdigit()), default=0)

    begin, process = whole(), fixtures.run_python(*command(folder, workdir))
    try:
        while whole() <= begin:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        time.sleep(seconds)
        assert process.poll() is None, "the run was over before it was killed: give it more steps"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return whole()


def last_state(folder, workdir, stage: str):
    """Everything that the last checkpoint of a stage holds, on the host."""
    devices = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    parts = assembly.parts(run_config.load_saved(workdir / run_config.SAVED_NAME), workdir, devices)
    with jax.set_mesh(devices):
        target = {
            "train": assembly.abstract_stage_state(stage, parts),
            "host": assembly.make_stage(stage, parts, None).host_state(),
        }
        checkpointer = Checkpointer(workdir / "checkpoints" / stage, 1, read_only=True)
        state, meta = checkpointer.restore(None, target)
        checkpointer.close()
        return jax.device_get(state), meta["data"]


def same_run(folder, killed, whole):
    """Weights, optimiser, index and data iterator bit for bit; logs and results apart from times."""
    for stage in ("sft", "rl"):
        (a, data_a), (b, data_b) = (last_state(folder, w, stage) for w in (killed, whole))
        same_bits(a, b)
        assert data_a == data_b
    assert list(map(timeless, lines(killed / "metrics.jsonl"))) == list(map(timeless, lines(whole / "metrics.jsonl")))
    for name in ("samples.jsonl", "ledger.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert (killed / "examples.json").read_bytes() == (whole / "examples.json").read_bytes()
    results = [json.loads((w / "results.json").read_text()) for w in (killed, whole)]
    assert results[0]["p_values"] == results[1]["p_values"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set, and a run on it in a process of its own that nobody stopped."""
    folder = tmp_path_factory.mktemp("kills")
    fixtures.write_dataset(folder / "data")
    finish(folder, folder / "whole")
    return folder


def test_a_run_killed_in_each_stage_ends_like_one_never_killed(whole, tmp_path):
    moment, killed = random.Random(0), tmp_path / "killed"
    assert kill_in(whole, killed, "sft", moment.uniform(0, 0.4)) < 24
    at = kill_in(whole, killed, "rl", moment.uniform(0, 0.4))
    assert at < 9
    said = finish(whole, killed)
    assert "stage sft" not in said
    assert any(f"stage rl: going on from step {step} of 9" in said for step in range(3, 9))
    same_run(whole, killed, whole / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again(whole, tmp_path, seed):
    moment, killed = random.Random(seed), tmp_path / "killed"
    kills = 0
    for _ in range(8):
        process = fixtures.run_python(*command(whole, killed))
        time.sleep(moment.uniform(4, 9))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert kills > 0
    finish(whole, killed)
    same_run(whole, killed, whole / "whole")
