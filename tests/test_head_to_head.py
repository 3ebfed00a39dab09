"""Two runs query by query, against counting by hand and scipy's permutation test; the verb on files and folders."""

import json

import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from r3jax import compare
from r3jax.errors import UserError
from r3jax.evaluation.head_to_head import head_to_head
from r3jax.evaluation.trec import write_qrels, write_run


@pytest.fixture
def made():
    """Two runs of 60 queries, B of which has no line for one, and judgements, one of them of no relevant document."""
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(j % 3 == 0) for j in range(6)} for i in range(60)}
    qrels["q59"] = {"d1": 0}
    a, b = (
        {q: {f"d{j}": float(rng.normal() + lift * (j % 3 == 0)) for j in range(20)} for q in qrels}
        for lift in (1.0, 0.6)
    )
    del b["q7"]
    return a, b, qrels


@pytest.mark.parametrize("metric, theirs", [("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10")])
def test_counts_and_p(made, metric, theirs):
    a, b, qrels = made
    found = head_to_head(a, b, qrels, metric)
    judged = {q: g for q, g in qrels.items() if q != "q59"}
    wanted = [pytrec_eval.RelevanceEvaluator(judged, {theirs}).evaluate(run) for run in (a, b)]
    x, y = (np.array([w.get(q, {theirs: 0.0})[theirs] for q in judged]) for w in wanted)
    f = found.as_dict()
    assert (f["a"], f["b"]) == (pytest.approx(x.mean()), pytest.approx(y.mean()))
    assert (f["wins"], f["ties"], f["losses"]) == (
        *((x - y > 1e-9).sum(), (abs(x - y) < 1e-9).sum(), (y - x > 1e-9).sum()),
    )
    assert f["queries"] == 59 and f["per_query"]["q7"]["b"] == 0 and min(f["wins"], f["losses"]) > 0
    if metric == "ndcg@10":
        reference = stats.permutation_test((x - y,), np.mean, permutation_type="samples", n_resamples=10_000)
        assert f["p"] == pytest.approx(reference.pvalue, abs=0.02)
    swapped = head_to_head(b, a, qrels, metric).as_dict()
    assert (swapped["wins"], swapped["losses"]) == (f["losses"], f["wins"])
    shown = found.extremes(2)
    assert sum(found.differences[q] > 0 for q in shown) == 2 == sum(found.differences[q] < 0 for q in shown)
    assert max(found.differences.values()) == max(found.differences[q] for q in shown)


def test_a_run_ties_with_itself(made):
    a, _, qrels = made
    f = head_to_head(a, a, qrels, "mrr@10").as_dict()
    assert (f["wins"], f["ties"], f["losses"], f["p"]) == (0, 59, 0, 1.0)


def test_the_verb(made, tmp_path, capsys):
    a, b, qrels = made
    for name, run in (("a", a), ("b", b)):
        write_run(tmp_path / name / "trec" / "test.direct.run", run, "x")
        write_qrels(tmp_path / name / "trec" / "test.qrels", qrels)
    write_run(tmp_path / "a" / "trec" / "test.only.run", a, "x")
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--queries=1"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("test.direct: ndcg@10 0.")
    files = [str(tmp_path / name / "trec" / "test.direct.run") for name in "ab"]
    (tmp_path / "test.tsv").write_text("".join(f"{q}\t{d}\t{g}\n" for q, j in qrels.items() for d, g in j.items()))
    for more in ([], [f"--qrels={tmp_path / 'test.tsv'}"]):
        compare.main([*files, "--json", *more])
        f = json.loads(capsys.readouterr().out)
        assert f.pop("name") and f.pop("run_a") == files[0] and f.pop("run_b") == files[1]
        assert f == head_to_head(a, b, qrels, "ndcg@10").as_dict()
    write_run(tmp_path / "c" / "trec" / "test.direct.run", {f"other-{q}": run for q, run in b.items()}, "x")
    write_run(tmp_path / "d" / "trec" / "test.direct.run", b, "x")
    write_qrels(tmp_path / "d" / "trec" / "test.qrels", qrels | {"q3": {"d1": 1}})
    (tmp_path / "binary.run").write_bytes(b"\xff\xfe")
    for argv, complaint in (
        ([str(tmp_path / "a"), str(tmp_path / "c")], "RUN_B: .* answers no judged query; give two runs of one"),
        ([str(tmp_path / "a"), str(tmp_path / "d")], "has other judgements than .*test.qrels; compare runs of one"),
        ([files[0], str(tmp_path / "binary.run")], "binary.run:1: not UTF-8"),
        ([files[0], "nowhere"], "RUN_B: nowhere is no file"),
        ([str(tmp_path / "a"), str(tmp_path)], "have no run in common"),
        ([*files, "--metric=map"], "--metric: metrics: 'map' is none of"),
        ([*files, "--qrels=nowhere"], "there is no nowhere"),
    ):
        with pytest.raises(UserError, match=complaint):
            compare.main(argv)
