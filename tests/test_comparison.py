"""The comparison that ends a run: conditions by model, paired tests, refresh figures."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy import stats

from r3jax.evaluation.trec import read_run
from r3jax.results.comparison import QUESTIONS, compare, p_values, refresh_figures
from r3jax.results.conditions import MODEL_CONDITIONS, Measured
from tests import fixtures


def measured(scores) -> Measured:
    values = {f"q{i}": float(s) for i, s in enumerate(scores)}
    return Measured(run={}, per_query={"ndcg@10": values}, summary={"ndcg@10": float(np.mean(scores))})


def test_p_values_are_paired_one_sided_and_by_query():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    found = {
        "bm25": measured(base),
        "untrained": measured(base + 5),  # not trained: never the best trained condition
        "sft_direct": measured(base + 0.001 * rng.normal(size=200)),
        "sft_reasoning": measured(base + 0.02 + 0.1 * rng.normal(size=200)),
        "rl_reasoning": measured(base + 0.05 + 0.1 * rng.normal(size=200)),
    }
    answers = p_values(found)
    assert list(answers) == [
        "rl_reasoning > sft_reasoning",
        "rl_reasoning > sft_direct",
        "sft_reasoning > sft_direct",
        "best trained > bm25",
    ]
    for question, p in answers.items():
        left, right = question.replace("best trained", "rl_reasoning").split(" > ")
        a, b = (list(found[name].per_query["ndcg@10"].values()) for name in (left, right))
        t = stats.ttest_rel(a, b, alternative="greater").pvalue
        assert p == pytest.approx(t, abs=0.01)
    # Pairs go by query, in whatever order the queries were measured.
    backwards = dict(reversed(found["bm25"].per_query["ndcg@10"].items()))
    found["bm25"] = dataclasses.replace(found["bm25"], per_query={"ndcg@10": backwards})
    assert p_values(found)["best trained > bm25"] == answers["best trained > bm25"]


def test_questions_that_cannot_be_asked_are_left_out():
    same = measured([0.1, 0.5])
    assert p_values({"bm25": same}) == {}
    assert p_values({"bm25": same, "untrained": same}) == {}
    assert p_values({"sft_direct": same, "sft_reasoning": same}) == {"sft_reasoning > sft_direct": 1.0}
    # When the best trained condition is one of a pair, it is not held against itself.
    assert all(left != right for left, right in QUESTIONS)


def test_compare_measures_each_model_on_each_split(tmp_path):
    parts = fixtures.parts(tmp_path)
    with jax.set_mesh(parts.mesh):
        params = parts.initial_params()
        asked = []

        def encode(p, on_rows):
            asked.append(p)
            return parts.encode_corpus(p, on_rows)

        models = ((name, params) for name in ("untrained", "sft"))
        found = compare(parts.dataset, ("unseen", "seen"), models, parts.reader, encode, tmp_path)
    assert len(asked) == 2  # the corpus once for each model
    names = ["bm25", "untrained", *(f"sft_{name}" for name in MODEL_CONDITIONS)]
    assert list(found["splits"]) == ["unseen", "seen"]
    for split, conditions in found["splits"].items():
        assert list(conditions) == names
        assert conditions["untrained"]["ndcg@10"] == conditions["sft_direct"]["ndcg@10"]  # the same weights
        assert set(found["p_values"][split]) == {"sft_reasoning > sft_direct", "best trained > bm25"}
        for name in names:
            run = read_run(tmp_path / "trec" / f"{split}.{name}.run")
            assert len(run) == 20
            thoughts = tmp_path / "thoughts" / f"{split}.{name}.jsonl"
            assert thoughts.is_file() == (name == "sft_reasoning")  # the others have none of their own
    json.dumps(found)  # plain numbers throughout
    cards = json.loads((tmp_path / "examples.json").read_text())
    assert [c["split"] for c in cards] == ["unseen"] * 20 + ["seen"] * 20


def test_refresh_figures_come_from_the_log(tmp_path):
    lines = [
        {"stage": "sft", "step": 1, "loss": 1.0},
        {"stage": "rl", "step": 1, "index/share": 0.02},
        {"stage": "rl", "step": 2, "index/share": 0.04, "probe/reward_error": 0.002},
        {"stage": "rl", "step": 3, "index/share": 0.06, "probe/reward_error": None},
        {"stage": "rl", "step": 4, "index/share": 0.08, "probe/reward_error": 0.004},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert refresh_figures(path, "hybrid") == pytest.approx(
        {
            "policy": "hybrid",
            "probe_steps": 2,
            "mean_abs_reward_error": 0.003,
            "max_abs_reward_error": 0.004,
            "mean_share_reencoded": 0.05,
            "max_share_reencoded": 0.08,
        }
    )
    path.write_text(json.dumps(lines[0]) + "\n")
    assert refresh_figures(path, "none")["mean_abs_reward_error"] is None
