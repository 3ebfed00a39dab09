"""Encoding a corpus: killed and resumed runs end with the same bytes, identities never mix, memory stays small."""

import contextlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from r3jax.corpus import documents as stored
from r3jax.corpus import manifest
from r3jax.corpus.documents import StoredDocuments
from r3jax.corpus.encoding import Processes, encode_corpus, open_encoding
from r3jax.data.documents import Documents
from r3jax.errors import UserError

WIDTH, SHARD = 8, 16
IDENTITY = {"model": "abc", "system": "Represent.", "answer": "It is ", "max_length": 5}


@contextlib.contextmanager
def silent(what, total, done=0):
    yield lambda rows: None


def ignore(rows):
    """Of progress, where no one looks."""


def vector(text: str) -> np.ndarray:
    draw = np.random.default_rng(list(text.encode())).normal(size=WIDTH)
    return draw / np.linalg.norm(draw)


def encode(texts, on_rows=ignore):
    on_rows(len(texts))
    return np.stack([vector(t) for t in texts]).astype(np.float32), sum(len(t) > 12 for t in texts)


def run(source, out, dtype="float32", encode=encode, processes=Processes(), **identity):  # noqa: B008
    return encode_corpus(
        Documents(source), out, IDENTITY | identity, "runs/x", encode, WIDTH, dtype, silent, processes, SHARD
    )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def python(code: str, *argv: str) -> subprocess.Popen:
    """Runs a script that needs neither jax nor the rest of the tests."""
    root = pathlib.Path(__file__).parent.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=root, **pipes)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [{"_id": f"d{i}", "title": f"title {i}", "text": "é\u2028x " * (i % 5 + 1)} for i in range(100)]
    path.write_text("".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_texts_and_counts(corpus, tmp_path, dtype):
    manifest = run(corpus, tmp_path / "out", dtype)
    found = open_encoding(tmp_path / "out")
    given = list(Documents(corpus))
    assert list(found.documents) == given and found.documents[99] == given[99] and len(found.documents) == 100
    assert found.vectors.dtype == dtype and isinstance(found.vectors, np.memmap)
    np.testing.assert_array_equal(found.vectors, encode([t for _, t in given])[0].astype(dtype))
    assert manifest["documents"] == 100 and manifest["truncated"] == encode([t for _, t in given])[1] > 0
    assert manifest["source"] == "runs/x" and manifest["dtype"] == dtype
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("vectors.npy", "documents.jsonl", "offsets.npy", "manifest.json")
    }


def test_progress_tells_of_every_document(corpus, tmp_path, monkeypatch):
    told = []

    @contextlib.contextmanager
    def noted(what, total, done=0):
        told.append((total, done))
        yield told.append

    monkeypatch.setattr(sys.modules[__name__], "silent", noted)
    run(corpus, tmp_path / "out")
    assert told[0] == (100, 0) and sum(told[1:]) == 100


def test_a_run_that_fails_goes_on_to_the_same_bytes(corpus, tmp_path):
    run(corpus, tmp_path / "whole")
    calls = []

    def failing(texts, on_rows):
        calls.append(texts)
        if len(calls) in (1, 4, 6):
            raise KeyboardInterrupt
        return encode(texts)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out", encode=failing)
        with pytest.raises(UserError, match="is not finished; give the command that began it again"):
            open_encoding(tmp_path / "out")
    run(corpus, tmp_path / "out", encode=failing)
    assert len(calls) == 7 + 3  # no shard is encoded twice but those that failed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    run(corpus, tmp_path / "out", encode=None)  # finished: nothing to do


def test_a_kill_between_the_vectors_and_the_manifest(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "whole")
    write = manifest.write

    def killed(path, content):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out", encode=None)  # all is encoded
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("lost", [np.nan, 0])
def test_vectors_that_are_lost_are_refused(corpus, tmp_path, lost):
    def overflow(texts, on_rows):
        vectors, cut = encode(texts)
        vectors[3] *= lost
        return vectors, cut

    with pytest.raises(UserError, match="gives 1 of 16 documents no unit vector; r3jax doctor"):
        run(corpus, tmp_path / "out", encode=overflow)


def test_files_that_are_damaged(corpus, tmp_path):
    for name, size in (("vectors.npy", 0), ("vectors.npy", 500), ("documents.jsonl", 900), ("offsets.npy", 0)):
        out = tmp_path / f"{name}{size}"
        run(corpus, out)
        (out / name).write_bytes((out / name).read_bytes()[:size])
        with pytest.raises(UserError, match="holds no encoded corpus"):
            open_encoding(out)
    for text in ("[1]", "garbage"):
        (out / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="holds no encoded corpus"):
            open_encoding(out)
        with pytest.raises(UserError, match="where something else is"):
            run(corpus, out)


KILLED = """
import sys, time
from tests.test_encoding import encode, run
def slow(texts, on_rows):
    time.sleep(0.01)
    return encode(texts)
print("begun", flush=True)
run(sys.argv[1], __import__("pathlib").Path(sys.argv[2]), encode=slow)
"""


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"document {i}\n" for i in range(800)))
    run(corpus, tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(2):
        process = python(KILLED, str(corpus), str(tmp_path / "out"))
        process.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
    run(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_several_processes_write_what_one_writes(corpus, tmp_path):
    run(corpus, tmp_path / "whole")
    barrier, read = threading.Barrier(3), []

    def work(i):
        def noted(texts, on_rows):
            read.append(i)
            return encode(texts)

        run(corpus, tmp_path / "out", encode=noted, processes=Processes(i, 3, lambda what: barrier.wait(20)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == [0, 0, 0, 1, 1, 2, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model": "abd"}, "was encoded with another model; name another folder"),
        ({"system": "Other."}, "was encoded with another prompt"),
        ({"max_length": 6}, "was encoded with max_length=5, not 6"),
        ({"dtype": "float16"}, "was encoded with dtype='float32', not 'float16'"),
        ({}, "was encoded with other data"),
    ],
)
def test_what_does_not_belong_together_is_refused(corpus, tmp_path, change, complaint, finished):
    out = tmp_path / "out"
    if finished:
        run(corpus, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(corpus, out, encode=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = contents(out)
    if not change:
        corpus.write_text(corpus.read_text().replace("title 3", "title 4", 1))
    with pytest.raises(UserError, match=complaint):
        run(corpus, out, **change)
    assert contents(out) == before


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b", "text": "x"}\n{"_id": "a", "text": "y"}\n', "id 'a'"),
        ("a.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b"}\n', r'a.jsonl:2: no "text"'),
        ("a.jsonl", '{"_id": "a b", "text": "x"}\n', "white space"),
        ("a.jsonl", '{"_id": "a\u00a0b", "text": "x"}\n', "white space"),
        ("a.jsonl", '{"text": "x"\n', "a.jsonl:1: malformed JSON"),
        ("a.jsonl", '{"text": ""}\n', "document '1' has an empty text"),
        ("a.jsonl", "", "holds no document"),
        ("a.txt", b"caf\xe9\n", "a.txt:1: not UTF-8"),
    ],
)
def test_bad_documents(tmp_path, name, text, complaint):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):  # what is left of the first attempt is in nobody's way
        with pytest.raises(UserError, match=complaint):
            run(path, tmp_path / "out")
    path.write_text('{"id": 7, "contents": "x"}\n\n{"text": "y"}\n"z"\n' if name == "a.jsonl" else "x\n\n y \n")
    run(path, tmp_path / "out")
    wanted = [("7", "x"), ("3", "y"), ("4", "z")] if name == "a.jsonl" else [("1", "x"), ("3", "y")]
    assert list(StoredDocuments(tmp_path / "out")) == wanted


def test_bad_documents_left_out(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [
        '{"_id": "a", "text": "x"}',
        '{"_id": "b", "text": " "}',
        "{",
        '{"text": "caf\xe9"}',
        '{"_id": "c", "text": "y"}',
    ]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    documents = Documents(path, on_error="skip")
    assert list(documents) == list(documents) == [("a", "x"), ("c", "y")]
    assert documents.skipped == 3 and documents.first_skipped.startswith(f"{path}:2: document 'b' has an empty text")
    manifest = encode_corpus(documents, tmp_path / "out", IDENTITY, "", encode, WIDTH, "float32", silent)
    assert manifest["skipped"] == 3 and manifest["documents"] == 2


@pytest.mark.parametrize("name, fix", [("a.json", "jq -c"), ("a.csv", "read_csv"), ("A.TSV", "read_table")])
def test_files_that_are_no_lines_of_documents(tmp_path, name, fix):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=f"{name} is neither .jsonl nor plain text with one document per line; .*{fix}"):
        Documents(tmp_path / name)


def test_json_beyond_what_python_reads(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ('{"text": ' + "[" * 100_000, '{"text": "x", "_id": ' + "9" * 5000 + "}"):
        path.write_text(line)
        with pytest.raises(UserError, match="a.jsonl:1: a number too long or brackets too deep"):
            list(Documents(path))


def test_a_folder_with_something_else_in_it_is_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="where something else is"):
        run(corpus, tmp_path / "out")
    with pytest.raises(UserError, match="holds no encoded corpus"):
        open_encoding(tmp_path / "out")
    with pytest.raises(UserError, match="DATA: .*nowhere does not exist"):
        Documents(tmp_path / "nowhere")


MEASURED = """
import pathlib, re, sys
import numpy as np
from r3jax.corpus import encoding
from r3jax.data.documents import Documents
from tests.test_encoding import IDENTITY, silent
encode = lambda texts, on_rows: (np.full((len(texts), 64), 0.125, np.float32), 0)
source, out = sys.argv[1:]
encoding.encode_corpus(Documents(source), pathlib.Path(out), IDENTITY, "", encode, 64, "float32", silent)
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])  # rusage counts the parent too
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for count in (12_000, 60_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"{i} " + "word " * 200 + "\n" for i in range(count)))
        process = python(MEASURED, str(path), str(tmp_path / f"out{count}"))
        said, complaint = process.communicate()
        assert process.returncode == 0, complaint
        peaks.append(int(said.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 8  # MiB; the larger corpus has 46 MiB more text, and 12 MiB more of vectors


def test_digests_that_meet_by_chance_are_no_two_documents(tmp_path, monkeypatch):
    digest = stored.hashlib.blake2b
    monkeypatch.setattr(stored.hashlib, "blake2b", lambda name, digest_size: digest(name[:1], digest_size=digest_size))
    assert stored.write([("a1", "x"), ("b", "x"), ("a2", "x")], tmp_path) == 3
    with pytest.raises(UserError, match="two documents with the id 'a2'"):
        stored.write([("a1", "x"), ("a2", "x"), ("b", "x"), ("a2", "y")], tmp_path)
