"""Ranking metrics against pytrec_eval."""

import math

import numpy as np
import pytest
import pytrec_eval

from r3jax.evaluation import metrics


def _random_case(rng):
    """One collection: graded qrels (negative too), a run full of ties, some too fine for float32."""
    documents = [f"d{i}" for i in rng.permutation(rng.integers(3, 160))] + ["é", "Z", "a-1", "a_1"]
    qrels, run = {}, {}
    for q in range(3):
        judged = rng.choice(documents, rng.integers(1, min(len(documents), 30)), replace=False)
        qrels[f"q{q}"] = {str(d): int(g) for d, g in zip(judged, rng.integers(-1, 4, len(judged)), strict=True)}
        found = rng.choice(documents, rng.integers(1, len(documents)), replace=False)
        scores = rng.integers(0, 6, len(found)) / 7.0
        if rng.random() < 0.5:
            scores = scores + rng.integers(0, 3, len(found)) * 10.0 ** -rng.integers(5, 12)
        run[f"q{q}"] = {str(d): float(s) for d, s in zip(found, scores, strict=True)}
    return run, qrels


def _reference(run, qrels):
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10,100", "recip_rank"})
    result = {name: {} for name in metrics.DEFAULT_METRICS}
    for query_id, values in evaluator.evaluate(run).items():
        result["ndcg@10"][query_id] = values["ndcg_cut_10"]
        result["recall@10"][query_id] = values["recall_10"]
        result["recall@100"][query_id] = values["recall_100"]
        first = values["recip_rank"]
        result["mrr@10"][query_id] = first if first > 1 / 10.5 else 0.0
    return result


def test_equals_pytrec_eval_on_a_thousand_runs_with_ties():
    rng = np.random.default_rng(0)
    worst, tied, beyond_ten = 0.0, 0, 0
    for _ in range(1000):
        run, qrels = _random_case(rng)
        mine, theirs = metrics.per_query(run, qrels), _reference(run, qrels)
        for name in metrics.DEFAULT_METRICS:
            assert mine[name].keys() == theirs[name].keys()
            worst = max(worst, *(abs(mine[name][q] - theirs[name][q]) for q in qrels))
        tied += sum(len(set(np.float32(list(s.values())))) < len(s) for s in run.values())
        beyond_ten += sum(len(s) > 10 for s in run.values())
    assert worst < 1e-12
    assert tied > 2000 and beyond_ten > 2000  # the cases do test ties and the cut


@pytest.mark.parametrize("gap, first", [(1e-9, "z"), (1e-6, "b")])
def test_scores_are_compared_as_float32(gap, first):
    run = {"q": {"z": 1.0, "b": 1.0 + gap}}
    assert metrics.rank(run["q"])[0] == first
    theirs = pytrec_eval.RelevanceEvaluator({"q": {first: 1}}, {"recip_rank"}).evaluate(run)
    assert theirs["q"]["recip_rank"] == 1.0


def test_every_judged_query_counts():
    qrels = {"a": {"d": 1}, "b": {"d": 1}, "c": {"d": 1}, "none": {"d": 0}}
    run = {"a": {"d": 1.0}, "b": {}, "extra": {"d": 1.0}}
    scores = metrics.per_query(run, qrels, ["ndcg@10", "mrr@1"])
    assert scores["ndcg@10"] == {"a": 1.0, "b": 0.0, "c": 0.0, "none": 0.0}
    assert metrics.mean(scores) == {"ndcg@10": 0.25, "mrr@1": 0.25}
    assert metrics.unanswered(run, qrels) == 3
    assert math.isnan(metrics.mean(metrics.per_query({}, {}))["ndcg@10"])


def test_as_run_leaves_out_empty_places():
    rows, scores = np.array([[1, -1], [0, 1]]), np.array([[0.5, 0.0], [0.75, 0.25]], np.float32)
    assert metrics.as_run(["p", "q"], ["x", "y"], rows, scores) == {
        "p": {"y": 0.5},
        "q": {"x": 0.75, "y": 0.25},
    }
    with pytest.raises(ValueError, match="rows"):
        metrics.as_run(["p"], ["x", "y"], rows, scores)
    with pytest.raises(ValueError, match="twice"):
        metrics.as_run(["p", "p"], ["x", "y"], rows, scores)


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "ndcg@x", "map@10", "mrr@-1"])
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ValueError, match="metrics"):
        metrics.per_query({}, {}, [name])


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="'b' is NaN"):
        metrics.per_query({"q": {"a": 1.0, "b": math.nan}}, {"q": {"a": 1}})
