"""Warnings about data and rankings, and the tables that show them."""

import json

from r3jax.evaluation.trec import read_qrels, write_qrels
from r3jax.results import cautions, table
from tests import fixtures


def test_of_the_data(tmp_path):
    from r3jax.data import beir

    folder = fixtures.write_dataset(tmp_path / "data")
    assert cautions.of_data(beir.load(folder), "seen") == []
    with (folder / "corpus.jsonl").open("a") as file:
        file.write((folder / "corpus.jsonl").read_text().splitlines()[3].replace('"d3"', '"copy"') + "\n")
    with (folder / "queries.jsonl").open("a") as file:
        for name in ("lost", "vain"):
            file.write(json.dumps({"_id": name, "text": "?"}) + "\n")
    with (folder / "qrels" / "seen.tsv").open("a") as file:
        file.write("vain\td1\t0\n")
    copies, missing, vain = cautions.of_data(beir.load(folder), "seen")
    assert copies.startswith("1 documents have the same text")
    assert missing.startswith("1 of 182 queries have no judgement")
    assert vain.startswith("1 judged queries have no relevant document")


def test_of_the_rankings():
    spread = {f"d{i}": 1 - i / 100 for i in range(20)}
    tied = spread | {"d10": spread["d9"] + 1e-9}  # equal as float32
    early = spread | {"d3": spread["d2"]}  # not at the cut
    runs = {
        "bm25": {"q1": spread, "q2": tied, "q3": tied},
        "direct": {"q1": early, "d5": spread, "d15": spread, "q2": {"d1": 1.0}},
    }
    ties, selves = cautions.of_runs(runs)
    assert ties.endswith(": bm25 2") and selves.endswith(": direct 1")
    assert cautions.of_runs({"direct": {"q1": spread, "q2": early}}) == []


def test_tables_show_them_and_latex():
    figures = {"ndcg@10": 0.5, "recall@10": 0.25, "queries": 20, "token_rate": 1.0}
    results = {
        "splits": {"seen": {"bm25": figures, "rl_direct": figures | {"ndcg@10": 0.75}}},
        "warnings": {"seen": ["3 documents have"]},
    }
    assert "warning: 3 documents have" in table.plain(results) and "- warning: 3" in table.markdown(results)
    said = table.latex(results)
    assert "% warning: 3 documents have" in said and r"rl\_direct & \textbf{0.750} & \textbf{0.250} & --" in said
    assert r"100.0 \%" in said and said.count(r"\\") == 3
    body = said[said.index(r"\toprule") :].splitlines()
    assert len({line.count(" & ") for line in body if " & " in line}) == 1


def test_judgements_round_trip(tmp_path):
    qrels = {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": 3}}
    write_qrels(tmp_path / "x" / "a.qrels", qrels)
    assert read_qrels(tmp_path / "x" / "a.qrels") == qrels
    (tmp_path / "b.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t3\n")
    assert read_qrels(tmp_path / "b.tsv") == qrels
