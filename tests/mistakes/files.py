"""Files that cannot be read: data sets, documents, training data of others, judgements, tokenizers, checkpoints."""

import json
import pathlib
import shutil

from tests.mistakes.world import Mistake, code, command

BAD = pathlib.Path("bad")
# (file of a data set, its first line or, after a newline, its first two, what is said)
_LINES = [
    ("corpus.jsonl", '{"_id": "d0", "text": ', "corpus.jsonl:1: malformed JSON"),
    ("corpus.jsonl", '["d0", "text"]', "a JSON list where an object is needed; write one object per line"),
    ("corpus.jsonl", '{"_id": "d0", "text": "  "}', "corpus.jsonl:1: document 'd0' has an empty text; write one"),
    ("corpus.jsonl", '{"_id": "d0"}', 'corpus.jsonl:1: no "text"; add it as a string'),
    ("corpus.jsonl", '{"_id": "d0", "text": 7}', '"text" is 7, not a string; put it in quotes'),
    ("corpus.jsonl", '{"_id": "d0", "text": "\\ud800"}', '"text" holds half a surrogate pair'),
    ("corpus.jsonl", '{"_id": "d 0", "text": "x"}', "\"_id\" is 'd 0'; use an id that is not empty and has no white"),
    ("corpus.jsonl", '{"_id": "", "text": "x"}', "\"_id\" is ''; use an id that is not empty"),
    ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}', "corpus.jsonl:2: duplicate _id 'd1'"),
    ("corpus.jsonl", '{"_id": "d0", "text": "x", "title": null}', '"title" is null, not a string'),
    ("corpus.jsonl", '{"n": ' + "1" * 5000 + "}", "corpus.jsonl:1: a number too long or brackets too deep"),
    ("corpus.jsonl", b"caf\xe9", "corpus.jsonl:1: not UTF-8 text; save the file as UTF-8"),
    ("queries.jsonl", '{"text": "no id"}', 'queries.jsonl:1: no "_id"; add it'),
    ("queries.jsonl", '{"_id": 7, "text": "x"}', '"_id" is 7, not a string'),
    ("qrels/train.tsv", "train0\tnothing\t1", "train.tsv:1: unknown document 'nothing'; add it"),
    ("qrels/train.tsv", "nobody\td0\t1", "train.tsv:1: unknown query 'nobody'; add it"),
    ("qrels/train.tsv", "train0 d0 1", "train.tsv:1: 1 tab-separated columns; write"),
    ("qrels/train.tsv", "train0\td0\tvery", "train.tsv:1: bad score 'very'; write a whole number"),
    (
        "qrels/train.tsv",
        "train0\td0\t1\ntrain0\td0\t2",
        "train.tsv:2: query 'train0' and document 'd0' are judged twice",
    ),
    ("qrels/more.jsonl", '{"query-id": "train0", "corpus-id": "d0", "score": 0.5}', "more.jsonl:1: bad score 0.5"),
    ("qrels/more.jsonl", '{"query-id": "train0", "corpus-id": "d0", "score": 1e999}', "more.jsonl:1: bad score inf"),
    ("qrels/more.jsonl", '{"query-id": "train0", "corpus-id": "d0", "score": [1]}', "more.jsonl:1: bad score [1]"),
    ("qrels/train.jsonl", '{"query-id": "train0", "corpus-id": "d0"}', "and the .tsv beside it are one split"),
    ("thoughts.jsonl", '{"query_id": "nobody", "text": "x"}', "thoughts.jsonl:1: unknown query 'nobody'"),
    ("thoughts.jsonl", '{"query_id": "train0", "text": " "}', "the thought of query 'train0' is empty"),
]
# (file of a data set, its whole content; None: it is not there)
_WHOLE = [
    ("corpus.jsonl", "", "corpus.jsonl holds no usable document; add at least one line"),
    ("queries.jsonl", "\n\n", "queries.jsonl holds no usable query; add at least one line"),
    ("queries.jsonl", None, "holds no queries.jsonl (a BEIR data set does)"),
    ("qrels/train.tsv", "query-id\tcorpus-id\tscore\n", "train.tsv names no relevant document (score > 0)"),
    ("qrels/seen.tsv", "seen20\td20\t0\n", "seen.tsv names no relevant document (score > 0)"),
]
_DOCUMENTS = [
    ("a.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}', "two documents with the id 'a'"),
    ("a.jsonl", '{"text": "x", "_id": true}', '"_id" is true, not a string'),
    ("a.jsonl", "", "DATA holds no document; add at least one line"),
    ("a.txt", b"caf\xe9", "a.txt:1: not UTF-8 text"),
    ("a.json", "[]", "a.json is neither .jsonl nor plain text with one document per line; jq -c"),
    ("a.csv", "id,text", "a.csv is neither .jsonl nor plain text with one document per line; pandas"),
]
_PAIRS = [
    ({"query": "a"}, 'neither "positive_passages" (Tevatron) nor "pos" (FlagEmbedding); add one of them'),
    ({"query": " ", "pos": ["x"]}, '"query" is empty'),
    ({"query": "a", "pos": "x"}, '"pos" is a JSON str, not a list'),
    ({"query": "a", "pos": [3]}, '"pos" is 3, not a string'),
    ({"query": "a", "pos": ["x", "y"], "pos_id": ["d"]}, '"pos_id" has 1 ids for 2 texts'),
    ({"query": "a", "pos": [""]}, '"pos" holds an empty text'),
    ({"query": "a", "pos": [], "neg": ["x"]}, "names no positive passage"),
    ({"query": "a", "positive_passages": ["x"]}, "holds a JSON str; write objects"),
    ({"query": "a", "pos": ["x", "y"], "pos_id": ["d", "d"]}, "passage 'd' has two texts"),
]
_RUNS = [
    ("q0 Q0 d0 1 1.0", "a.run:1: a TREC run has 6 columns, here are 5; mend the line"),
    ("q0 Q0 d0 1 high x", "a.run:1: the score 'high' is not a number; mend the line"),
    ("q0 Q0 d0 1 1.0 x\nq0 Q0 d0 2 0.5 x", "a.run:2: document 'd0' occurs twice for query 'q0'; remove one"),
    (b"\xff\xfe", "a.run:1: not UTF-8 text"),
    ("q0 Q0 d0 1 1.0 x", "answers no judged query; give two runs of one data set and split"),
]
_JUDGEMENTS = [
    ("q0 0 d0", "a.qrels:1: the grade 'd0' is no whole number; mend the line"),
    ("q0 d0", "a.qrels:1: judgements have 3 or 4 columns, here are 2; mend the line"),
    ("q0 0 d0 0", "--qrels names no relevant document; give judgements with grades above 0"),
]


def _write(name: str, content: str | bytes) -> None:
    path = BAD / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _shown(content: str | bytes) -> str:
    text = content.decode(errors="backslashreplace") if isinstance(content, bytes) else content
    return "nothing" if not text.strip() else code(text if len(text) < 200 else f"{text[:20]}…")


def _line(file: str, lines: str | bytes, says: str) -> Mistake:
    """A data set whose file begins with these lines in place of as many."""

    def spoil() -> None:
        shutil.copytree("data", BAD)
        raw = lines if isinstance(lines, bytes) else lines.encode()
        rest = (BAD / file).read_bytes().splitlines()[1 + raw.count(b"\n") :] if (BAD / file).is_file() else []
        _write(file, b"\n".join([raw, *rest]) + b"\n")

    return command("train --config.data.path=bad", says, spoil, f"{_shown(lines)} in {file}")


def _whole(file: str, content: str | None, says: str) -> Mistake:
    def spoil() -> None:
        shutil.copytree("data", BAD)
        (BAD / file).unlink()
        if content is not None:
            _write(file, content)

    return command(
        "train --config.data.path=bad", says, spoil, f"no {file}" if content is None else f"{_shown(content)} in {file}"
    )


def _alone(words: str, file: str, content: str | bytes, says: str) -> Mistake:
    """`words` about a file bad/FILE of that content."""
    return command(words, says, lambda: _write(file, content), f"{_shown(content)} in {file}: {code(words)}")


def _compared(files: dict[str, str | bytes], says: str) -> Mistake:
    """Two run files and judgements, one of them bad."""
    good = {"a.run": "q0 Q0 d0 1 1.0 x\n", "b.run": "q0 Q0 d0 1 1.0 x\n", "a.qrels": "q0 0 d0 1\n"}

    def spoil() -> None:
        for name, content in (good | files).items():
            _write(name, content)

    words = "compare bad/a.run bad/b.run --qrels=bad/a.qrels"
    done = " and ".join(f"{_shown(content)} in {name}" for name, content in files.items())
    return command(words, says, spoil, f"{done}: {code(words)}")


DATA = [
    *(_line(*row) for row in _LINES),
    *(_whole(*row) for row in _WHOLE),
]
OTHERS = [
    *(_alone(f"encode run bad/{file} out", file, content, says) for file, content, says in _DOCUMENTS),
    *(_alone("convert data bad/t.jsonl out", "t.jsonl", json.dumps(row), says) for row, says in _PAIRS),
    *(_compared({"a.run": content}, says) for content, says in _RUNS[:-1]),
    _compared({"a.qrels": "q1 0 d0 1"}, _RUNS[-1][1]),
    *(_compared({"a.qrels": content}, says) for content, says in _JUDGEMENTS),
]
