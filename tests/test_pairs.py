"""Other tools' training data as a BEIR folder: what was in the lines is what is judged."""

import json

import pytest

from r3jax import convert
from r3jax.data import beir
from r3jax.errors import UserError


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judged(data, split):
    """{query text: {document text: grade}}"""
    return {
        data.query_texts[data.query_row[q]]: {data.doc_texts[data.doc_row[d]]: g for d, g in grades.items()}
        for q, grades in data.qrels[split].items()
    }


def test_both_forms(tmp_path, capsys):
    def passage(i):
        return {"docid": f"d{i}", "title": f"t{i}" if i % 2 else "", "text": f"x{i}"}

    tevatron = [
        {"query_id": "q1", "query": "a b", "positive_passages": [passage(1)], "negative_passages": [passage(2)]},
        {"query_id": 2, "query": "c", "positive_passages": [passage(2), passage(3)]},
    ]
    flag = [
        {"query": "e", "pos": ["x2", "new"], "neg": ["t1 x1", "new", "newer"], "prompt": "ignored"},
        {"query": "f", "pos": ["newest"], "pos_id": ["n7"], "query_id": "mine"},
    ]
    files = [lines(tmp_path / "train.jsonl", tevatron), lines(tmp_path / "dev.jsonl", flag)]
    convert.main(["data", ",".join(files), str(tmp_path / "out")])
    assert "7 documents, 4 queries, 9 judgements" in capsys.readouterr().out
    data = beir.load(tmp_path / "out")
    assert data.doc_ids[:3] == ["d1", "d2", "d3"] and "n7" in data.doc_ids
    assert data.query_ids == ["q1", "2", "dev-1", "mine"]
    assert judged(data, "train") == {"a b": {"t1 x1": 1, "x2": 0}, "c": {"x2": 1, "t3 x3": 1}}
    # a passage that is positive and negative is positive; "t1 x1" without a title is another document
    assert judged(data, "dev") == {"e": {"x2": 1, "new": 1, "t1 x1": 0, "newer": 0}, "f": {"newest": 1}}


def test_judgements_as_jsonl(tmp_path):
    source = lines(tmp_path / "train.jsonl", [{"query": "a", "pos": ["x", "y"], "neg": ["z"]}])
    convert.main(["data", source, str(tmp_path / "out")])
    table = beir.load(tmp_path / "out")
    qrels = tmp_path / "out" / "qrels"
    rows = [
        {"query-id": q, "corpus-id": d, "score": g}
        for q, found in table.qrels["train"].items()
        for d, g in found.items()
    ]
    lines(qrels / "train.jsonl", rows)
    with pytest.raises(UserError, match="are one split"):
        beir.load(tmp_path / "out")
    (qrels / "train.tsv").unlink()
    assert beir.load(tmp_path / "out").qrels == table.qrels
    lines(qrels / "train.jsonl", [{**rows[0], "score": 0.5}])
    with pytest.raises(UserError, match=r"train.jsonl:1: bad score 0.5"):
        beir.load(tmp_path / "out")
