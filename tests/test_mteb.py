"""The mteb class, and our figures beside mteb's and pytrec_eval's on the same data: both offline."""

import json

import numpy as np
import pytest
import pytrec_eval

from r3jax import evaluate
from r3jax.data import beir
from r3jax.evaluation.trec import read_qrels, read_run
from r3jax.search_r3 import SearchR3
from tests.serving_process import tiny_run

mteb = pytest.importorskip("mteb")
SPLIT = "seen"
NAMES = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "recall@100": "recall_100"}  # of pytrec_eval


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Random weights, and judgements of many documents, graded: the figures are then neither 0 nor 1."""
    run = tiny_run(tmp_path_factory.mktemp("mteb"))
    rng = np.random.default_rng(0)
    lines = [
        f"{SPLIT}{row}\td{doc}\t{grade}\n"
        for row in range(20, 40)
        for doc, grade in zip(rng.choice(200, 30, replace=False), rng.integers(0, 4, 30), strict=True)
    ]
    (run.parent / "data" / "qrels" / f"{SPLIT}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return run


@pytest.fixture(scope="module")
def ours(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours")
    argv = [f"--split={SPLIT}", "--conditions=direct,reasoning", f"--out={out}"]
    evaluate.main([str(run), *argv])
    return out, json.loads((out / "evaluation.json").read_text())["splits"][SPLIT]


def task_of(folder):
    """The data set as a task that mteb has not got, filled by hand."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    dataset = beir.load(folder)
    queries = dataset.positives(SPLIT)

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalCommands",
            description="Made-up commands.",
            type="Retrieval",
            dataset={"path": "local/commands", "revision": "1"},
            reference=None,
            category="t2t",
            modalities=["text"],
            eval_splits=[SPLIT],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *_, **__):
            rows = zip(dataset.doc_ids, dataset.doc_texts, strict=True)
            texts = {query: dataset.query_texts[dataset.query_row[query]] for query in queries}
            self.dataset = {
                "default": {
                    SPLIT: {
                        "corpus": datasets.Dataset.from_list([{"id": i, "title": "", "text": t} for i, t in rows]),
                        "queries": datasets.Dataset.from_list([{"id": q, "text": t} for q, t in texts.items()]),
                        "relevant_docs": {query: dict(dataset.qrels[SPLIT][query]) for query in queries},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return LocalTask()


@pytest.mark.parametrize("condition", ["direct", "reasoning"])
def test_figures_are_mtebs(run, ours, tmp_path, monkeypatch, condition):
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    from r3jax.integrations.mteb import SearchR3Model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = SearchR3Model(run, reasoning=condition == "reasoning")
    assert model.mteb_model_meta.revision.endswith(condition)
    task = task_of(run.parent / "data")
    found = mteb.evaluate(model, task, cache=None, prediction_folder=tmp_path, show_progress_bar=False)
    scores = found.task_results[0].scores[SPLIT][0]
    _, conditions = ours
    mine = conditions[f"sft_{condition}"]
    for name in ("ndcg@10", "recall@10", "recall@100", "mrr@10"):
        metric, k = name.split("@")
        wanted = mine[name] if metric == "mrr" else round(mine[name], 5)  # as mteb rounds
        assert scores[f"{metric}_at_{k}"] == pytest.approx(wanted, abs=1e-6), name
    # Not rounded: by mteb's own function on what it has found.
    [predicted] = (json.loads(path.read_text()) for path in tmp_path.rglob("*_predictions.json"))
    judged = beir.load(run.parent / "data").qrels[SPLIT]
    exact = calculate_retrieval_scores(predicted["default"][SPLIT], judged, [10, 100])
    for name, theirs in NAMES.items():
        assert np.mean([q[theirs] for q in exact.all_scores.values()]) == pytest.approx(mine[name], abs=1e-6), name
    assert exact.mrr["MRR@10"] == pytest.approx(mine["mrr@10"], abs=1e-6)
    assert 0 < mine["ndcg@10"] < 1


@pytest.mark.parametrize("condition", ["bm25", "sft_direct", "sft_reasoning"])
def test_figures_are_pytrec_evals(ours, condition):
    out, conditions = ours
    judged, found = read_qrels(out / "trec" / f"{SPLIT}.qrels"), read_run(out / "trec" / f"{SPLIT}.{condition}.run")
    theirs = pytrec_eval.RelevanceEvaluator(judged, set(NAMES.values())).evaluate(found)
    first = {query: dict(sorted(docs.items(), key=lambda x: (x[1], x[0]))[-10:]) for query, docs in found.items()}
    ranks = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first)
    for name, metric in NAMES.items():
        wanted = np.mean([theirs[query][metric] for query in judged])
        assert conditions[condition][name] == pytest.approx(wanted, abs=1e-6)
    wanted = np.mean([ranks[query]["recip_rank"] for query in judged])
    assert conditions[condition]["mrr@10"] == pytest.approx(wanted, abs=1e-6)


def test_documents_and_pairs(run):
    from mteb.types import PromptType

    from r3jax.integrations.mteb import SearchR3Model

    model, plain = SearchR3Model(run), SearchR3.from_pretrained(run)
    batches = [{"text": ["list files", "delete folder"]}, {"text": ["zip image"]}]
    texts = [text for batch in batches for text in batch["text"]]
    where = {"task_metadata": None, "hf_split": SPLIT, "hf_subset": "default"}
    for kind in (PromptType.document, None):
        np.testing.assert_allclose(
            model.encode(batches, prompt_type=kind, **where), plain.encode_document(texts), atol=1e-5
        )
    asked = model.encode(batches, prompt_type=PromptType.query, **where)
    np.testing.assert_allclose(asked, plain.encode_query(texts), atol=1e-5)
    pairs = model.similarity_pairwise(asked, 3 * asked[::-1])
    np.testing.assert_allclose(pairs, np.diag(model.similarity(asked, asked[::-1])), atol=1e-5)
