"""`SearchR3` against plain encoding of rows made by hand; order, batches and devices; what it says of mistakes."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import base
from r3jax.errors import UserError
from r3jax.model import sampler
from r3jax.model.encoder import embed_jit, encode_rows
from r3jax.model.hugging_face import to_hugging_face
from r3jax.model.hugging_face_config import to_config
from r3jax.model.sharding import make_mesh
from r3jax.run import config as run_config
from r3jax.run.checkpoint import Checkpointer
from r3jax.search_r3 import LIMITS, Encoded, SearchR3, Windows
from r3jax.text import settings
from tests import fixtures
from tests.tiny_model import weights

QUERY, DOCUMENT, THOUGHT = 8, 12, 6  # limits, in tokens
SETTINGS = {
    "model__tied": False,
    "data__max_thought_tokens": THOUGHT,
    "rl__reward__max_tokens": THOUGHT,
    "prompts__direct_system": "Represent the text.",
    "prompts__direct_assistant": "The embedding is ",
    "prompts__reasoning_system": "Think.",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Of a run with random weights under which some thoughts end in time."""
    parts = fixtures.parts(tmp_path_factory.mktemp("class"), **SETTINGS)
    params = weights(parts.model)
    row = jax.random.normal(jax.random.key(9), (parts.model.width,))
    params["unembed"]["table"] = params["unembed"]["table"].at[parts.chat.tokenizer.embed_id].set(row)
    run_config.save(parts.config, parts.workdir / "config.json")
    checkpointer = Checkpointer(parts.workdir / "checkpoints" / "sft", keep_last=1)
    checkpointer.save(1, {"train": {"params": fixtures.placed(params, parts)}}, meta={})
    checkpointer.close()
    return parts


@pytest.fixture(scope="module")
def one():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(parts, one):
    return SearchR3.from_pretrained(parts.workdir, batch_size=4, mesh=one)


@pytest.fixture(scope="module")
def texts(parts):
    """Of many lengths, some beyond the limits, one empty."""
    made = [" ".join(parts.dataset.query_texts[i : i + 1 + i % 3]) for i in range(12)]
    return [*made, "", "file", " spaces around ", "Ünïcödé 你好 🙂"]


@pytest.fixture(scope="module")
def details(model, texts):
    return model.encode_query(texts, return_details=True)


def rows_alone(model, rows):
    """Unit vectors of token rows, each read by itself."""
    r = model.reader
    return np.concatenate([encode_rows(model.params, r.model, r.mesh, [row], batch_size=1) for row in rows])


def same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    assert (a * b).sum(-1).min() >= 0.99999
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_documents_and_direct_queries_are_the_chats_last_state(model, texts):
    chat = model.reader.chat
    documents = model.encode_document(texts)
    same(documents, rows_alone(model, chat.documents(texts, DOCUMENT)))
    same(model.encode_query(texts, reasoning=False), rows_alone(model, chat.direct_queries(texts, QUERY)))
    np.testing.assert_array_equal(model.encode(texts), documents)
    distance = 1 - documents @ documents.T + 2 * np.eye(len(texts))
    assert distance.min() > 1e-4  # the texts are told apart, so agreement says something


def test_a_query_is_read_after_its_thought(model, texts, details):
    """With the embed token where the model gave it, with the direct answer where it did not."""
    chat, tokenizer = model.reader.chat, model.reader.chat.tokenizer
    found = model.reader.reason(model.params, texts)
    assert 0.1 < details.emitted.mean() < 0.9
    np.testing.assert_array_equal(details.emitted, found.emitted == 1)
    assert details.thoughts == [tokenizer.decode(t) for t in found.thoughts] == model.generate(texts)
    ends = {True: [], False: tokenizer.encode("The embedding is ")}
    rows = [
        [*prompt, *thought, *ends[bool(emitted)], tokenizer.embed_id]
        for prompt, thought, emitted in zip(
            chat.reasoning_prompts(texts, QUERY), found.thoughts, details.emitted, strict=True
        )
    ]
    same(details.vectors, rows_alone(model, rows))
    np.testing.assert_array_equal(model.encode_query(texts), details.vectors)
    assert all(len(t) == THOUGHT for t, e in zip(found.thoughts, details.emitted, strict=True) if not e)


def test_a_turn_that_is_closed_early_gets_the_direct_answer_too(model, parts):
    """`<|im_end|>` ends the thought; the answer goes on without it."""
    tokenizer, reader = model.reader.chat.tokenizer, model.reader
    closing = jax.device_get(model.params)
    table = closing["unembed"]["table"].copy()
    table[tokenizer.im_end_id] = 100 * table[tokenizer.embed_id]
    closing = fixtures.placed({**closing, "unembed": {"table": table}}, parts)
    texts = parts.dataset.query_texts[:4]
    found = reader.reason(closing, texts)
    assert not found.emitted.any() and found.tokens.max() < THOUGHT
    prompts = reader.chat.reasoning_prompts(texts, QUERY)
    assert not any(tokenizer.im_end_id in thought for thought in found.thoughts)
    answer = [*tokenizer.encode("The embedding is "), tokenizer.embed_id]
    rows = [[*p, *t, *answer] for p, t in zip(prompts, found.thoughts, strict=True)]
    same(found.vectors, encode_rows(closing, reader.model, reader.mesh, rows, batch_size=3))


def test_evaluation_reads_as_the_class_does(parts, model, texts, details):
    params = fixtures.placed(jax.device_get(model.params), parts)
    found = parts.reader.reason(params, texts)  # in batches of 32
    same(found.vectors, details.vectors)
    np.testing.assert_array_equal(found.emitted == 1, details.emitted)
    same(parts.reader.direct(params, texts), model.encode_query(texts, reasoning=False))
    same(parts.encode_corpus(params), model.encode_document(parts.dataset.doc_texts, batch_size=64))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_and_order_do_not_change_a_vector(model, texts, details, batch_size):
    order = np.random.default_rng(batch_size).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    found = model.encode_query(shuffled, batch_size=batch_size, return_details=True)
    same(found.vectors, details.vectors[order])
    assert found.thoughts == [details.thoughts[i] for i in order]
    np.testing.assert_array_equal(found.emitted, details.emitted[order])
    same(model.encode_document(shuffled, batch_size=batch_size), model.encode_document(texts)[order])


def test_eight_devices_read_as_one_does(parts, texts, details, model):
    spread = SearchR3.from_pretrained(parts.workdir, batch_size=4, mesh=make_mesh(1, 4, 2))
    assert spread.params["embed"]["table"].sharding.mesh.size == 8
    found = spread.encode_query(texts, return_details=True)
    same(found.vectors, details.vectors)
    assert found.thoughts == details.thoughts
    same(spread.encode_document(texts), model.encode_document(texts))


def test_one_text_many_and_none(model, texts, details):
    for i in (0, 12):
        vector = model.encode_query(texts[i])
        assert vector.shape == (model.reader.model.width,)
        same(vector[None], details.vectors[i : i + 1])
        assert model.generate(texts[i]) == details.thoughts[i]
        same(model.encode(texts[i])[None], model.encode(texts)[i : i + 1])
    same(model.encode(t for t in texts), model.encode(np.array(texts)))
    for none in (model.encode_query([]), model.encode_query([], reasoning=False), model.encode_document(())):
        assert none.shape == (0, model.reader.model.width) and none.dtype == np.float32
    assert model.generate([]) == [] and model.encode([], return_details=True).thoughts == []
    assert model.similarity(model.encode([]), model.encode(texts[:3])).shape == (0, 3)


def test_any_number_of_texts_compiles_no_more(parts, model):
    texts = [parts.dataset.query_texts[0]]
    model.encode_query(texts * 3), model.encode_document(texts)
    before = embed_jit._cache_size(), sampler.decode._cache_size()
    for count in (1, 2, 4, 5, 9):
        model.encode_query(texts * count), model.encode_document(texts * count)
    assert (embed_jit._cache_size(), sampler.decode._cache_size()) == before


def test_a_long_text_is_cut_its_chat_is_not_and_it_is_said(model, caplog):
    long = "list every file of a folder " * 9
    kept = model.reader.chat.tokenizer.encode(long.strip())[:DOCUMENT]
    with caplog.at_level(logging.WARNING, "r3jax"):
        found = model.encode_document([long, "file"], return_details=True)
    assert caplog.messages == ["1 of 2 texts are longer than 12 tokens; their ends are not read."]
    assert isinstance(found, Encoded) and found.truncated.tolist() == [True, False]
    assert found.thoughts == ["", ""] and found.emitted.all()
    same(found.vectors[:1], rows_alone(model, [model.reader.chat.direct(kept)]))
    caplog.clear()
    assert model.encode_query([long, "file"], return_details=True).truncated.tolist() == [True, False]
    assert len(caplog.messages) == 1
    caplog.clear()
    assert not model.encode_document("file", return_details=True).truncated.any() and not caplog.messages


def test_a_longer_limit_reads_more(parts, one, model):
    long = "list every file of a folder " * 9
    roomy = SearchR3.from_pretrained(parts.workdir, max_length=200, max_thought_length=2, mesh=one)
    for read in (roomy.encode_document, lambda *a, **k: roomy.encode_query(*a, reasoning=False, **k)):
        found = read([long], return_details=True)
        assert not found.truncated.any()
        same(found.vectors, rows_alone(model, [model.reader.chat.document(long, 200)]))
    thoughts = roomy.reader.reason(roomy.params, [long, "file"]).thoughts
    assert max(map(len, thoughts)) <= 2
    assert roomy.reader.batch_size == parts.config.evaluate.batch_size


@pytest.mark.parametrize("overlap", [0, 5, 11])
def test_windows_cover_a_document(model, overlap, caplog):
    tokenizer = model.reader.chat.tokenizer
    texts = ["list every file of a folder " * 4, "file", "", "show the disk of a user quietly " * 2]
    with caplog.at_level(logging.WARNING, "r3jax"):
        windows = model.encode_document(texts, window_overlap=overlap)
    assert isinstance(windows, Windows) and len(windows) == 4
    assert "2 of 4 documents are longer than 12 tokens and were read in windows" in caplog.messages[0]
    step, rows = DOCUMENT - overlap, []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text.strip())
        parts = [ids[:DOCUMENT]]
        while step * (len(parts) - 1) + DOCUMENT < len(ids):
            parts.append(ids[step * len(parts) :][:DOCUMENT])
        assert len(windows[i]) == len(parts)
        rows += [model.reader.chat.direct(part) for part in parts]
    same(windows.vectors, rows_alone(model, rows))
    queries = model.encode_query(["delete a folder", "count"], reasoning=False)
    best = np.array([[max(q @ v for v in windows[i]) for i in range(4)] for q in queries])
    np.testing.assert_allclose(model.similarity(queries, windows), best, atol=1e-6)
    np.testing.assert_allclose(model.similarity(windows, queries), best.T, atol=1e-6)
    assert model.similarity(queries, model.encode_document([], window_overlap=overlap)).shape == (2, 0)
    cut = model.encode_document(texts, window_overlap=overlap, truncate_dim=4)
    assert cut.vectors.shape == (len(rows), 4)


def test_cut_vectors_are_unit_vectors_again_if_wanted(model, texts):
    whole = model.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(model.encode(texts, truncate_dim=8, normalize_embeddings=False), whole[:, :8])
    short = model.encode(texts, truncate_dim=8)
    same(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True))
    assert model.encode_query(texts[0], truncate_dim=8).shape == (8,)
    np.testing.assert_array_equal(model.encode(texts, normalize_embeddings=False), whole)


def test_similarity_is_the_cosine(model):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    want = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(model.similarity(a, b), want, atol=1e-6)
    np.testing.assert_allclose(model.similarity(a[0], b), want[:1], atol=1e-6)


def test_a_prompt_takes_the_place_of_the_models_own(model, texts):
    chat = model.reader.chat
    for read, system, reasoning in (
        (model.encode_document, "Represent the text.", False),
        (model.encode_query, "Think.", True),
    ):
        same(read(texts, prompt=system), read(texts))
        other = read(texts, prompt="Another instruction")
        assert np.abs(other - read(texts)).max() > 0.01
        if not reasoning:
            row = chat.document(texts[0], DOCUMENT)
            system_ids = chat.tokenizer.encode("system\n" + system)
            assert row[1 : 1 + len(system_ids)] == system_ids
            row[1 : 1 + len(system_ids)] = chat.tokenizer.encode("system\nAnother instruction")
            same(other[:1], rows_alone(model, [row]))


def test_a_bar_is_shown_when_asked_for(model, texts, capfd):
    model.encode_query(texts), model.encode_document(texts)
    assert capfd.readouterr() == ("", "")
    model.encode_query(texts, show_progress_bar=True)
    said = capfd.readouterr()
    assert said.out == "" and "thinking" in said.err and "100%" in said.err
    model.encode(texts, show_progress_bar=True)
    assert "encoding" in capfd.readouterr().err


@pytest.fixture(scope="module")
def hugging_face(parts, model, tmp_path_factory):
    """The run's weights as an exported folder."""
    folder, m = tmp_path_factory.mktemp("hf"), parts.model
    save_file(to_hugging_face(jax.device_get(model.params), m), folder / "model.safetensors")
    sizes = to_config(m, bos_id=0, eos_id=1, pad_id=0)
    (folder / "config.json").write_text(json.dumps(sizes))
    parts.chat.tokenizer.save(folder)
    limits = {name: parts.config.data[name] for name in LIMITS}
    settings.Settings(parts.chat.prompts, **limits).write(folder)
    return folder


def test_a_hugging_face_folder_gives_the_same_vectors(hugging_face, one, texts, details, model):
    exported = SearchR3.from_pretrained(hugging_face, mesh=one)
    found = exported.encode_query(texts, return_details=True)
    same(found.vectors, details.vectors)
    assert found.thoughts == details.thoughts
    same(exported.encode_document(texts), model.encode_document(texts))


def test_bfloat16_is_near(hugging_face, parts, one, texts, model):
    """Weights too where they come from a Hugging Face folder; a run keeps its own."""
    fine = model.encode_document(texts)
    for path, held in ((hugging_face, "bfloat16"), (parts.workdir, "float32")):
        low = SearchR3.from_pretrained(path, dtype="bfloat16", mesh=one)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(low.params)} == {held}
        rough = low.encode_document(texts)
        assert rough.dtype == np.float32 and 0.99 < (rough * fine).sum(1).min() < 0.999999


def test_the_default_limits_are_those_of_the_configs():
    data = base.get_config("qwen2_5_0_5b").data
    assert {name: data[name] for name in LIMITS} == LIMITS


def test_the_readmes_example_runs(parts, one):
    readme = (fixtures.ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## From Python", 1)[1].split("\n## ", 1)[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(code.replace('"runs/rl-tiny"', repr(str(parts.workdir))), names)  # noqa: S102
    assert isinstance(names["model"], SearchR3) and names["scores"].shape == (1, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.encode_query(3), "texts must be a string or a list of strings, not int"),
        (lambda m: m.encode_document(["a", None]), r"texts\[1\] must be a string, not NoneType"),
        (lambda m: m.generate([b"a"]), r"queries\[0\] must be a string, not bytes"),
        (lambda m: m.encode(["a"], batch_size=0), "batch_size must be at least 1, not 0"),
        (lambda m: m.encode(["a"], truncate_dim=33), "truncate_dim must be between 1 and 32, not 33"),
        (lambda m: m.encode(["a"], prompt=["x"]), "prompt must be a string, not list"),
        (lambda m: m.encode_document(["a"], window_overlap=12), r"window_overlap .* below max_length \(12\), not 12"),
        (lambda m: m.encode_document("a", window_overlap=1, return_details=True), "leave one of the two out"),
        (lambda m: m.similarity(np.ones((1, 4)), np.ones((1, 8))), "a has 4 dimensions and b 8"),
    ],
)
def test_mistakes_are_one_sentence(model, call, says):
    with pytest.raises(ValueError, match=says):
        call(model)


def test_a_folder_that_cannot_be_used_is_named(parts, tmp_path, hugging_face, one):
    def load(path, **options):
        return SearchR3.from_pretrained(path, mesh=one, **options)

    with pytest.raises(UserError, match="path names 'no such folder', which does not exist"):
        load("no such folder")
    with pytest.raises(UserError, match="holds no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((pathlib.Path(hugging_face) / "config.json").read_bytes())
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="max_length must be at least 1, not 0"):
        load(parts.workdir, max_length=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, not 'fp8'"):
        load(parts.workdir, dtype="fp8")
