"""The inspector on an evaluation of an imagined model: what is on the page, and what is refused."""

import json
import shutil

import pytest

from r3jax import __main__ as dispatcher
from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.evaluation import metrics
from r3jax.evaluation.trec import write_qrels, write_run
from r3jax.results.examples import write_thoughts
from tests import fixtures
from tests.test_report import HOSTILE, _Page

SPLITS = ("seen", "unseen")


@pytest.fixture
def evaluated(tmp_path):
    """data/, and out/ as an evaluation leaves it: the thought brings the right answer from place 3 to place 1."""
    dataset = beir.load(fixtures.write_dataset(tmp_path / "data"))
    out = tmp_path / "out"
    for split in SPLITS:
        judged = {query: dataset.qrels[split][query] for query in dataset.positives(split)}
        write_qrels(out / "trec" / f"{split}.qrels", judged)
        runs: dict = {"rl_direct": {}, "rl_reasoning": {}, "rl_empty": {}, "bm25": {}}
        for query, grades in judged.items():
            [right] = grades
            others = [doc for doc in dataset.doc_ids[:12] if doc != right]
            order = {"rl_reasoning": [right, *others], "rl_direct": [*others[:2], right, *others[2:]]}
            order |= {"rl_empty": others, "bm25": [right]}
            for name, ranked in order.items():
                runs[name][query] = {doc: 1 - place / 100 for place, doc in enumerate(ranked)}
        last = list(judged)[-1]  # one query is harmed
        runs["rl_reasoning"][last], runs["rl_direct"][last] = runs["rl_empty"][last], runs["rl_reasoning"][last]
        for name, run in runs.items():
            write_run(out / "trec" / f"{split}.{name}.run", run, "test")
        thoughts = {query: (f"about {query}", i > 0) for i, query in enumerate(judged)}
        write_thoughts(out / "thoughts" / f"{split}.rl_reasoning.jsonl", thoughts)
    results = {"name": "tiny", "data": "data", "source": str(tmp_path / "data")}
    results["splits"] = {split: dict.fromkeys(runs, {}) for split in SPLITS}
    (out / "evaluation.json").write_text(json.dumps(results))
    return out


def page_of(*argv):
    dispatcher.main(["inspect", *map(str, argv)])
    return _Page((argv[0] / "inspect.html").read_text())


def test_everything_is_on_the_page(evaluated, capsys):
    page = page_of(evaluated)
    assert "40 queries, rl_reasoning beside rl_direct" in capsys.readouterr().out
    assert page.ids == ["change", "queries"] and page.tags.count("details") == 40
    for words in (
        "Reasoning inspector tiny data · 40 queries".replace(" · ", " "),
        "nDCG@10, seen queries 0.950",  # 19 of 20
        "38 / 2",
        "2 were cut off",
        "seen: 19 of 20 queries gain, 1 lose; the tallest is 1.000",
        "It did not end in time",
        "about seen21",
        "place: 1, on the other side: 3",
        "place: not found, on the other side: 1",
        "+0.500",
        "−1.000",
        "was 3 0.990".replace("0.990", "1.000"),
    ):
        assert words in page.text, words
    deltas = [float(value) for _, name, value in page.attributes if name == "data-delta"]
    assert deltas[:2] == [-1.0, -1.0] and deltas[2:] == [0.5] * 38  # the largest change first
    assert sum(name == "data-cut" for _, name, _ in page.attributes) == 2
    assert page.tags.count("svg") == 2


def test_flags(evaluated, tmp_path):
    shutil.move(tmp_path / "data", tmp_path / "moved")
    flags = ["--split=unseen", "--without=rl_empty", "--hits=2", f"--data={tmp_path / 'moved'}"]
    page = page_of(evaluated, *flags)
    assert page.tags.count("details") == 20 and "RL, empty thought , nDCG@10 0.000" in page.text
    hits = [v for tag, name, v in page.attributes if tag == "ol" and name == "class" and v == "hits"]
    assert len(hits) == 40 and page.tags.count("li") == 2 + 20 * (2 * 2 + 1)  # links, hits, right answers
    assert "new 1.000" in page.text  # not among the hits of the other side


def test_grades_and_hostile_texts(evaluated, tmp_path):
    path = tmp_path / "data" / "corpus.jsonl"
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    documents[0]["text"] = HOSTILE
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    with (tmp_path / "data" / "qrels" / "seen.tsv").open("a") as file:
        file.write("seen21\td0\t0\n")  # judged, and wrong
    judged = {q: dict(g) for q, g in beir.load(tmp_path / "data").qrels["seen"].items()}
    write_qrels(evaluated / "trec" / "seen.qrels", judged)
    write_thoughts(evaluated / "thoughts" / "seen.rl_reasoning.jsonl", {q: (HOSTILE, True) for q in judged})
    page = page_of(evaluated, "--split=seen")
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.texts.count(HOSTILE) >= 20
    assert [v for tag, name, v in page.attributes if tag == "li" and v == "wrong"] == ["wrong"] * 2


def test_the_figures_are_those_of_the_runs(evaluated, tmp_path):
    page_of(evaluated)
    text = (evaluated / "inspect.html").read_text()
    dataset = beir.load(tmp_path / "data")
    query = list(dataset.positives("seen"))[0]
    [right] = dataset.qrels["seen"][query]
    run = {query: {right: 0.0, "x": 2.0, "y": 1.0}}
    third = metrics.per_query(run, {query: {right: 1}}, ["ndcg@10"])["ndcg@10"][query]
    assert f'data-delta="{1 - third:.4f}"' in text


@pytest.mark.parametrize(
    "spoil, argv, said",
    [
        (None, ["--split=test"], "'test' was not evaluated; choose some of seen, unseen"),
        (None, ["--with=rl_direct"], "--with must be one of rl_reasoning, not 'rl_direct'"),
        (None, ["--without=nothing"], "--without must be one of rl_direct, rl_reasoning, rl_empty, bm25"),
        (None, ["--hits=0"], "--hits must be a whole number"),
        (None, ["--out=/dev/null/page.html"], "--out: cannot write to"),
        ("thoughts", [], "holds no thoughts of an evaluation; write them with r3jax evaluate"),
        ("trec/seen.qrels", [], r"/seen\.qrels cannot be read \(No such file or directory\); evaluate again"),
    ],
)
def test_mistakes(evaluated, spoil, argv, said):
    if spoil == "thoughts":
        shutil.rmtree(evaluated / spoil)
    elif spoil:
        (evaluated / spoil).unlink()
    with pytest.raises(UserError, match=said):
        dispatcher.main(["inspect", str(evaluated), *argv])


def test_other_data_and_damaged_thoughts_are_named(evaluated, tmp_path):
    other = fixtures.write_dataset(tmp_path / "other")
    lines = (other / "corpus.jsonl").read_text().replace('"d3"', '"e3"')
    (other / "corpus.jsonl").write_text(lines)
    for path in (other / "qrels").glob("*.tsv"):
        path.write_text(path.read_text().replace("\td3\t", "\te3\t"))
    with pytest.raises(UserError, match="other has no 'd3'; name the folder that was evaluated"):
        dispatcher.main(["inspect", str(evaluated), f"--data={other}"])
    (evaluated / "thoughts" / "seen.rl_reasoning.jsonl").write_text('{"query_id": 3}\n')
    with pytest.raises(UserError, match="is malformed"):
        dispatcher.main(["inspect", str(evaluated)])
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="--data: .*data, where the data set was, is no folder"):
        dispatcher.main(["inspect", str(evaluated)])
    with pytest.raises(UserError, match="RUN: there is no folder"):
        dispatcher.main(["inspect", str(tmp_path / "nowhere")])
