"""The evaluator on a finished run: the same figures as at the end of training, and on other data."""

import json
import shutil

import pytest

from r3jax import convert, evaluate, inspect
from r3jax.errors import UserError
from tests import fixtures

METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


@pytest.fixture(scope="module")
def run():
    return fixtures.finished_run()[0] / "run"


def figures(conditions):
    return {name: {m: c[m] for m in METRICS} for name, c in conditions.items()}


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_the_figures_are_those_of_training(run, tmp_path, capsys, stage):
    """The last stage is the default; weights are the best by validation, as at the end of training."""
    chosen = [] if stage == "rl" else ["--stage=sft"]
    evaluate.main([f"--workdir={run}", "--split=seen", f"--out={tmp_path}", *chosen])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    trained = json.loads((run / "results.json").read_text())
    wanted = {
        name: c for name, c in trained["splits"]["seen"].items() if name == "bm25" or name.startswith(f"{stage}_")
    }
    assert figures(found["splits"]["seen"]) == figures(wanted)
    answers = found["p_values"]["seen"]
    del answers["best trained > bm25"]  # the best of fewer conditions
    assert answers and answers == {q: trained["p_values"]["seen"][q] for q in answers}
    assert sorted(p.name for p in (tmp_path / "trec").iterdir()) == sorted(
        ["seen.qrels", *(f"seen.{c}.run" for c in wanted)]
    )
    said = capsys.readouterr().out
    assert f"{stage}_reasoning" in said and f"results: {tmp_path}" in said


def test_the_defaults_are_the_runs_held_out_splits_and_folder(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    evaluate.main([f"--workdir={run}"])
    out = run / "evaluation" / "data-seen-unseen"
    assert set(json.loads((out / "evaluation.json").read_text())["splits"]) == {"seen", "unseen"}


def test_another_data_set(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run.parent / "data", other)
    shutil.copy(other / "qrels" / "seen.tsv", other / "qrels" / "test.tsv")
    documents = (other / "corpus.jsonl").read_text().splitlines()
    (other / "corpus.jsonl").write_text("\n".join(documents[::-1]) + "\n")
    evaluate.main([f"--workdir={run}", f"--data={other}", "--split=test", f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["data"] == "other"
    trained = json.loads((run / "results.json").read_text())["splits"]["seen"]
    for name, c in found["splits"]["test"].items():
        assert c["ndcg@10"] == pytest.approx(trained[name]["ndcg@10"], abs=1e-6)  # rows in another order


def test_a_run_can_be_evaluated_where_its_training_data_is_gone(run, tmp_path):
    other = tmp_path / "run"
    for name in ("config.json", "tokenizer", "checkpoints"):
        copy = shutil.copytree if (run / name).is_dir() else shutil.copy
        copy(run / name, (other.mkdir(exist_ok=True), other / name)[1])
    config = json.loads((other / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (other / "config.json").write_text(json.dumps(config))
    argv = [f"--workdir={other}", f"--data={run.parent / 'data'}", "--split=unseen"]
    evaluate.main([*argv, f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert not (other / "thoughts.jsonl").exists()  # nothing is written beside the run


def test_budgets_conditions_and_several_data_sets(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run.parent / "data", other)
    sets = [f"--data={run.parent / 'data'}", f"--data={other}"]
    chosen = ["--split=seen", "--conditions=direct,reasoning", "--budgets=0,5", "--format=json"]
    evaluate.main([f"--workdir={run}", *sets, *chosen, f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr()
    first, second = (json.loads(line) for line in said.out.splitlines())
    assert (first["data"], second["data"]) == ("data", "other") and said.err.count("results: ") == 2
    assert (tmp_path / "out" / "other-seen" / "trec" / "seen.rl_budget_5.run").is_file()
    found = first["splits"]["seen"]
    assert list(found) == ["bm25", "rl_direct", "rl_reasoning", "rl_budget_0", "rl_budget_5"]
    limit = json.loads((run / "config.json").read_text())["data"]["max_thought_tokens"]
    assert limit == 5  # so that this budget is no limit
    assert figures(found)["rl_budget_5"] == figures(found)["rl_reasoning"]
    assert found["rl_budget_0"]["thought_tokens"] == 0 <= found["rl_budget_5"]["thought_tokens"]
    assert figures(second["splits"]["seen"]) == figures(found)


def test_a_published_model_has_the_figures_of_its_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.main(["export", str(run), "published"])
    chosen = [f"--data={run.parent / 'data'}", "--split=seen"]
    evaluate.main(["published", *chosen])
    out = tmp_path / "evaluation" / "published" / "data-seen"
    found = json.loads((out / "evaluation.json").read_text())
    trained = json.loads((run / "results.json").read_text())["splits"]["seen"]
    assert list(found["splits"]["seen"]) == ["bm25", "direct", "reasoning", "empty", "shuffled", "copied"]
    for name, c in found["splits"]["seen"].items():
        wanted = trained[name if name == "bm25" else f"rl_{name}"]
        assert {m: c[m] for m in METRICS} == pytest.approx({m: wanted[m] for m in METRICS}, abs=1e-6), name
    assert set(found["p_values"]["seen"]) == {
        *("reasoning > empty", "reasoning > shuffled", "reasoning > copied", "reasoning > direct"),
        "best trained > bm25",
    }
    inspect.main([str(out)])
    assert "Reasoning inspector" in (out / "inspect.html").read_text()
    for argv, said in (
        (["--split=seen"], "--data is missing: published is no run"),
        (chosen[:1], "--split is missing"),
        ([*chosen, "--conditions=averaged"], "as many thoughts as a run's config says"),
        ([chosen[0], "--split=other"], "data has no 'other'"),
        ([*chosen, "--stage=rl"], "unknown flag --stage"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.main(["published", *argv])


def test_training_leaves_all_that_the_inspector_shows(run, tmp_path):
    inspect.main([str(run), f"--out={tmp_path / 'page.html'}", "--split=unseen"])
    assert (tmp_path / "page.html").read_text().count('<details class="query"') == 20
