"""Reading BEIR folders: what comes out, and that each mistake is one clear sentence."""

import json
import re
import time

import pytest

from r3jax.data import beir
from r3jax.errors import UserError

CORPUS = ['{"_id": "d1", "title": "Tar", "text": "tar -x "}', '{"_id": "d2", "text": "ls -l"}']
QUERIES = ['{"_id": "q1", "text": " unpack an archive "}', '{"_id": "q2", "text": "list files"}']
TRAIN = ["query-id\tcorpus-id\tscore", "q1\td2\t1", "q1\td1\t2", "q2\td1\t0", "q2\td2\t1"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(tmp_path, "corpus.jsonl", CORPUS)
    write(tmp_path, "queries.jsonl", QUERIES)
    write(tmp_path, "qrels/train.tsv", TRAIN)
    return tmp_path


def write(folder, name, lines):
    (folder / name).write_bytes("".join(line + "\n" for line in lines).encode())


def test_reads_a_folder(folder):
    write(folder, "qrels/test.tsv", ["q2\td2\t1"])  # no header line
    write(folder, "thoughts.jsonl", ['{"query_id": "q1", "text": "tar archive"}'])
    data = beir.load(folder)
    assert (data.doc_ids, data.doc_texts) == (["d1", "d2"], ["Tar tar -x", "ls -l"])
    assert (data.query_ids, data.query_texts) == (["q1", "q2"], ["unpack an archive", "list files"])
    assert data.qrels == {
        "train": {"q1": {"d2": 1, "d1": 2}, "q2": {"d1": 0, "d2": 1}},
        "test": {"q2": {"d2": 1}},
    }
    assert data.thoughts == {"q1": "tar archive"}
    assert data.skipped == []
    assert data.positives("train") == {"q1": [0, 1], "q2": [1]}  # grade 2 first; grade 0 is not relevant
    assert data.grades("train") == {"q1": [2, 1], "q2": [1]}
    assert data.positives("test") == {"q2": [1]}
    with pytest.raises(UserError, match="split 'dev'.*test, train"):
        data.positives("dev")


@pytest.mark.parametrize(
    "name, lines, line, says",
    [
        ("corpus.jsonl", [*CORPUS, '{"_id": "d3"'], 3, "malformed JSON"),
        ("corpus.jsonl", [*CORPUS, '["d3"]'], 3, "a JSON list"),
        ("corpus.jsonl", [*CORPUS, "", '{"text": "x"}'], 4, 'no "_id"'),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d3"}'], 3, 'no "text"'),
        ("corpus.jsonl", [*CORPUS, '{"_id": 3, "text": "x"}'], 3, '"_id" is 3, not a string'),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d3", "title": null, "text": "x"}'], 3, '"title" is null'),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d 3", "text": "x"}'], 3, "white space"),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d3", "title": " ", "text": "\\n"}'], 3, "empty text"),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d3", "text": "\\ud800"}'], 3, "surrogate"),
        ("corpus.jsonl", [*CORPUS, '{"_id": "d1", "text": "again"}'], 3, "duplicate _id 'd1'"),
        ("queries.jsonl", [*QUERIES, '{"_id": "q2", "text": "again"}'], 3, "duplicate _id 'q2'"),
        ("queries.jsonl", [*QUERIES, '{"_id": "q3", "text": ""}'], 3, "empty text"),
        ("qrels/train.tsv", [*TRAIN, "q9\td1\t1"], 6, "unknown query 'q9'"),
        ("qrels/train.tsv", [*TRAIN, "q1\td9\t1"], 6, "unknown document 'd9'"),
        ("qrels/train.tsv", [*TRAIN, "q2\td1\tyes"], 6, "bad score 'yes'"),
        ("qrels/train.tsv", [*TRAIN, "q2\td1\t0.5"], 6, "bad score '0.5'"),
        ("qrels/train.tsv", [*TRAIN, "q2 0 d1 1"], 6, "1 tab-separated columns"),
        ("qrels/train.tsv", [*TRAIN, "q2\td2\t1"], 6, "judged twice"),
        ("thoughts.jsonl", ['{"query_id": "q9", "text": "x"}'], 1, "unknown query 'q9'"),
        ("thoughts.jsonl", ['{"query_id": "q1", "text": " "}'], 1, "is empty"),
        ("thoughts.jsonl", ['{"query_id": "q1", "text": "x"}'] * 2, 2, "two thoughts"),
    ],
)
def test_a_bad_line_is_named_in_strict_and_dropped_in_skip(folder, name, lines, line, says):
    good = beir.load(folder)
    write(folder, name, lines)
    with pytest.raises(UserError) as error:
        beir.load(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / name}:{line}: ") and says in message
    assert "; " in message and message.endswith(".") and "\n" not in message  # what is wrong; the fix.

    data = beir.load(folder, on_error="skip")
    assert data.skipped == [message]
    assert (data.doc_texts, data.query_texts, data.qrels) == (good.doc_texts, good.query_texts, good.qrels)


@pytest.mark.parametrize(("name", "what"), [("corpus.jsonl", "document"), ("queries.jsonl", "query")])
def test_an_empty_file_is_named_before_the_judgements_that_miss_it(folder, name, what):
    write(folder, name, [])
    with pytest.raises(UserError, match=f"{name} holds no usable {what}; add at least one line"):
        beir.load(folder)


def test_bytes_that_are_not_utf8(folder):
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d1", "text": "caf\xe9"}\n' + CORPUS[1].encode())
    with pytest.raises(UserError, match="corpus.jsonl:1: not UTF-8"):
        beir.load(folder)
    data = beir.load(folder, on_error="skip")
    assert data.doc_ids == ["d2"]
    assert len(data.skipped) == 3  # the line, and the two judgements that name d1
    assert data.qrels["train"] == {"q1": {"d2": 1}, "q2": {"d2": 1}}


def test_windows_files(folder):
    for name, lines in (("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES), ("qrels/train.tsv", TRAIN)):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert beir.load(folder).positives("train") == {"q1": [0, 1], "q2": [1]}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_missing_or_useless_files_always_raise(folder, name, on_error):
    write(folder, name, TRAIN[:1] if name.endswith("tsv") else [])
    with pytest.raises(UserError, match=re.escape(str(folder / "qrels/train.tsv" if "tsv" in name else folder))):
        beir.load(folder, on_error=on_error)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.split("/")[0]):
        beir.load(folder, on_error=on_error)


def test_missing_folder_and_bad_choice(folder):
    with pytest.raises(UserError, match="nowhere does not exist"):
        beir.load(folder / "nowhere")
    with pytest.raises(UserError, match='on_error must be "strict" or "skip", not \'ignore\''):
        beir.load(folder, on_error="ignore")


def test_fingerprint_follows_content_not_place(folder, tmp_path_factory):
    first = beir.load(folder).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    copy = tmp_path_factory.mktemp("copy")
    (copy / "qrels").mkdir()
    for file in folder.rglob("*.*"):
        (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    assert beir.load(copy).fingerprint == first
    seen = {first}
    for name, lines in (
        ("corpus.jsonl", CORPUS[:1] + ['{"_id": "d2", "text": "ls -a"}']),
        ("qrels/train.tsv", [*TRAIN[:-1], "q2\td2\t3"]),
        ("qrels/test.tsv", TRAIN),
        ("thoughts.jsonl", ['{"query_id": "q1", "text": "x"}']),
    ):
        write(copy, name, lines)
        seen.add(beir.load(copy).fingerprint)
    assert len(seen) == 5


def test_thirty_thousand_documents_load_within_a_second(folder):
    write(folder, "corpus.jsonl", [json.dumps({"_id": f"d{i}", "text": f"text {i}"}) for i in range(31_000)])
    start = time.process_time()
    assert len(beir.load(folder).doc_ids) == 31_000
    assert time.process_time() - start < 1.0
