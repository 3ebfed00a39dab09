"""The verbs on a tiny model, from the command line: what they print and write."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from r3jax import __main__ as dispatcher
from r3jax.corpus.encoding import open_encoding
from r3jax.corpus.identity import fingerprint
from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.model.sharding import make_mesh
from r3jax.run import command
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from r3jax.search_r3 import SearchR3
from tests import fixtures
from tests.tiny_model import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/, and run/ with random weights under which some thoughts end in time."""
    folder = tmp_path_factory.mktemp("verbs")
    parts = fixtures.parts(folder, prompts__direct_system="Represent.", prompts__reasoning_system="Think.")
    params = weights(parts.model)
    run_config.save(parts.config, folder / "run" / "config.json")
    checkpointer = Checkpointer(folder / "run" / "checkpoints" / "sft", keep_last=1)
    checkpointer.save(1, {"train": {"params": fixtures.placed(params, parts)}}, meta={})
    checkpointer.close()
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return SearchR3.from_pretrained(folder / "run", mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def encoded(folder):
    dispatcher.main(["encode", str(folder / "run"), str(folder / "data"), str(folder / "vectors")])
    return folder / "vectors"


@pytest.fixture(scope="module")
def index(folder, encoded):
    dispatcher.main(["index", "build", str(encoded), str(folder / "index"), "--kind=exact"])
    return folder / "index"


@pytest.mark.parametrize("verb", dispatcher.VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        dispatcher.main([verb, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"r3jax {verb} " in said or f"python -m r3jax.{verb} " in said


def test_the_dispatcher(capsys):
    dispatcher.main([])
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in dispatcher.VERBS)


def test_a_reader_who_has_gone_is_no_error():
    process = fixtures.run_python("-m", "r3jax", "--help")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_command_lines():
    def read(*argv):
        flags, switches = {"k": "hits", "name": "a name"}, {"json": "as JSON"}
        return command.read(argv, "r3jax.x", "About.", ("A", "B"), flags, switches, optional=1)

    given = read("one", "--k", "3", "--no-json", "--", "--two")
    assert given.words == ["one", "--two"] and given.flags == {"k": "3", "name": None}
    assert given.switches == {"json": False} and given.whole("k") == 3
    for argv, said in (
        (["one", "--kk=1"], "unknown flag --kk .did you mean --k"),
        (["one", "--k"], "--k needs a value"),
        (["one", "--k="], "--k is empty"),
        (["one", "--json=yes"], "--json takes no value"),
        (["one", "two", "three"], "'three' is one word too many; give A .B."),
        ([], "words are missing; give A .B."),
    ):
        with pytest.raises(UserError, match=said):
            read(*argv)
    for text in ("x", "0", "1.5", "--5", "9" * 5000):
        with pytest.raises(UserError, match="--k must be a whole number of at least 1"):
            read("one", f"--k={text}").whole("k")
    with pytest.raises(UserError, match="--name must be one of a, b, not 'c'"):
        read("one", "--name=c").choice("name", ("a", "b"), "a")
    with pytest.raises(UserError, match="--name must be a number, not 'nan'"):
        read("one", "--name=nan").number("name")


def test_encode(folder, encoded, model, tmp_path, capsys):
    data = beir.load(folder / "data")
    found = open_encoding(encoded)
    assert list(found.documents) == list(zip(data.doc_ids, data.doc_texts, strict=True))
    np.testing.assert_allclose(found.vectors, model.encode_document(data.doc_texts), atol=1e-5)
    assert found.manifest["model"] == fingerprint(model.params, model.reader)
    assert found.manifest["source"] == str(folder / "run") and found.manifest["truncated"] == 0
    flags = ["--dtype=float16", "--max-length=2", "--prompt=Other.", "--batch-size=16"]
    capsys.readouterr()
    dispatcher.main(["encode", str(folder / "run"), str(folder / "data"), str(tmp_path / "out"), *flags])
    assert "200 were longer than 2 tokens" in capsys.readouterr().out
    other = open_encoding(tmp_path / "out")
    short = SearchR3.from_pretrained(folder / "run", 2, mesh=model.reader.mesh)
    wanted = short.encode_document(data.doc_texts, prompt="Other.")
    np.testing.assert_allclose(other.vectors, wanted, atol=1e-3)
    assert other.vectors.dtype == np.float16 and other.manifest["system"] == "Other."


def test_a_run_and_its_export_are_one_model(folder, model, tmp_path):
    dispatcher.main(["convert", "export", str(folder / "run"), str(tmp_path / "out")])
    exported = SearchR3.from_pretrained(tmp_path / "out", mesh=model.reader.mesh)
    assert fingerprint(exported.params, exported.reader) == fingerprint(model.params, model.reader)
    changed = jax.tree.map(lambda w: w, model.params)
    changed["final_norm"]["scale"] = changed["final_norm"]["scale"].at[3].add(1e-6)
    assert fingerprint(changed, model.reader) != fingerprint(model.params, model.reader)


def asked(queries, argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{q}\n" for q in queries)))
    capsys.readouterr()
    dispatcher.main(["search", *map(str, argv)])
    return capsys.readouterr().out


@pytest.mark.parametrize("reasoning", [True, False])
def test_search(folder, index, encoded, model, monkeypatch, capsys, reasoning):
    """From the standard input, in an index and in an encoding: SearchR3's own vectors decide."""
    data = beir.load(folder / "data")
    queries = data.query_texts[130:136]
    details = model.encode_query(queries, reasoning=reasoning, return_details=True)
    scores = model.similarity(details.vectors, model.encode_document(data.doc_texts))
    flags = ["--json", "--k=4", "--reasoning" if reasoning else "--no-reasoning"]
    for where in (index, encoded):
        lines = asked([*queries[:3], "  ", *queries[3:]], [where, *flags], monkeypatch, capsys).splitlines()
        for i, line in enumerate(lines):
            found = json.loads(line)
            best = np.argsort(-scores[i], kind="stable")[:4]
            assert found["query"] == queries[i]
            assert [hit["id"] for hit in found["hits"]] == [data.doc_ids[row] for row in best]
            assert [hit["text"] for hit in found["hits"]] == [data.doc_texts[row] for row in best]
            np.testing.assert_allclose([hit["score"] for hit in found["hits"]], scores[i][best], atol=1e-5)
            assert found["thought"] == (details.thoughts[i] if reasoning else None)
            assert ("ms_per_token" in found) == reasoning and found["read_ms"] > 0
        assert len(lines) == len(queries)


def test_search_for_people(index, folder, model, monkeypatch, capsys):
    query = beir.load(folder / "data").query_texts[0]
    said = asked([], [index, query, "--k=3"], monkeypatch, capsys)
    assert f"thought: {model.generate(query)}" in said and "ms per token" in said
    assert len([line for line in said.splitlines() if line.startswith("  ")]) == 3
    assert "thought" not in asked([], [index, query, "--no-reasoning"], monkeypatch, capsys)
    assert "its end was not read" not in said
    long = " ".join(fixtures.VERBS)
    assert "its end was not read" in asked([], [index, long, "--no-reasoning"], monkeypatch, capsys)
    assert json.loads(asked([], [index, long, "--no-reasoning", "--json"], monkeypatch, capsys))["cut"] is True


def test_bytes_on_the_standard_input_that_are_no_text(index, monkeypatch, capsys):
    for errors in ("strict", "surrogateescape"):  # the second in a locale without an encoding
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
        monkeypatch.setattr("sys.argv", ["r3jax", "search", str(index), "--no-reasoning", "--k=1"])
        with pytest.raises(SystemExit) as exit_:
            run_config.run_main(dispatcher.main)
        said = capsys.readouterr().err
        assert exit_.value.code == 2 and "the standard input is not UTF-8 text" in said and "Traceback" not in said


@pytest.mark.parametrize("flags", [[], ["--reasoning", "--sources=model", "--negatives=3", "--on-error=skip"]])
def test_mine(folder, model, tmp_path, capsys, flags):
    data, out = beir.load(folder / "data"), tmp_path / "out.jsonl"
    shutil.copytree(folder / "data", tmp_path / "data")
    if flags:
        with (tmp_path / "data" / "corpus.jsonl").open("a") as file:
            file.write('{"_id": "x", "text": ""}\n')
    dispatcher.main(
        [
            *("mine", str(folder / "run"), str(tmp_path / "data"), str(out)),
            *("--margin=0.99", "--depth=200", "--json", *flags),
        ]
    )
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert ("warning: lines left out: 1; the first: " in printed.err) == bool(flags)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) > 60 and (said["out"], said["queries"], said["without"]) == (str(out), 120, 120 - len(lines))
    assert said["negatives"] == sum(said["by_source"].values()) == sum(len(line["neg"]) for line in lines)
    documents = model.encode_document(data.doc_texts)
    for line in lines[:10]:
        score = dict(
            zip(data.doc_ids, documents @ model.encode_query(line["query"], reasoning=bool(flags)), strict=True)
        )
        np.testing.assert_allclose([score[d] for d in line["neg_id"]], line["neg_scores"], atol=1e-5)
        limit = 0.99 * max(score[d] for d in line["pos_id"]) + 1e-5
        assert max(line["neg_scores"]) <= limit and not set(line["neg_id"]) & set(line["pos_id"])
        hardest = max((s for d, s in score.items() if s <= limit - 2e-5 and d not in line["pos_id"]))
        assert line["neg_scores"][0] >= hardest - 1e-4
        assert len(line["neg"]) <= (3 if flags else 8)
        assert set(line["neg_source"]) <= ({"model"} if flags else {"model", "bm25"})


def test_another_model_is_not_asked_for_an_index(folder, index, tmp_path):
    other = shutil.copytree(folder / "run", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["rope_theta"] = 1e4
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was encoded with another model; .*other has changed"):
        dispatcher.main(["search", str(index), "query", f"--model={other}"])
