"""Conditions of one model: what each reads, against plain encoding and a plain search."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model.encoder import encode_rows
from r3jax.model.qwen2 import hidden_states, unembedding
from r3jax.results.conditions import MODEL_CONDITIONS, Stopwatch, bm25, evaluate, queries_of
from r3jax.results.examples import examples, read_thoughts, thoughts_of, write_thoughts
from r3jax.search.index import VersionedIndex
from tests import fixtures

SPLIT = "seen"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Trained for long enough that greedy thoughts are words, of different numbers, and end."""
    settings = {
        "sft__steps": 200,
        "sft__learning_rate": 1e-2,
        "sft__kl_weight": 0.0,
        "sft__corrupt_thoughts": 0.0,
    }
    return fixtures.parts(tmp_path_factory.mktemp("conditions"), **settings)


@pytest.fixture(scope="module")
def params(parts):
    return fixtures.placed(fixtures.trained_params(parts), parts)


@pytest.fixture(scope="module")
def vectors(parts, params):
    with jax.set_mesh(parts.mesh):
        return parts.encode_corpus(params)


@pytest.fixture(scope="module")
def found(parts, params, vectors):
    with jax.set_mesh(parts.mesh):
        index = VersionedIndex.build(vectors, 0, "exact")
        return evaluate(parts.reader, params, parts.dataset, SPLIT, index)


@pytest.fixture(scope="module")
def reasoned(parts, params):
    with jax.set_mesh(parts.mesh):
        return parts.reader.reason(params, queries_of(parts.dataset, SPLIT)[1])


def run_of(parts, params, rows, vectors) -> dict[str, dict[str, float]]:
    """The run of token rows by a matrix product: the best 100 documents of each query."""
    with jax.set_mesh(parts.mesh):
        queries = encode_rows(params, parts.model, parts.mesh, rows, batch_size=7)
    ids = parts.dataset.doc_ids
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    best = np.argsort(-scores, axis=1)[:, :100]
    names = queries_of(parts.dataset, SPLIT)[0]
    return {q: {ids[d]: row[d] for d in top} for q, row, top in zip(names, scores, best, strict=True)}


def same_run(a, b):
    assert list(a) == list(b)
    for query in a:
        assert len(a[query]) == len(b[query]) == 100
        common = a[query].keys() & b[query].keys()
        assert len(common) >= 97  # documents of nearly equal score may change places at the end
        for d in common:
            assert a[query][d] == pytest.approx(b[query][d], abs=1e-4)


def rows_of(parts, thoughts):
    """A query's reasoning prompt, a thought, the embed token."""
    texts = queries_of(parts.dataset, SPLIT)[1]
    prompts = parts.chat.reasoning_prompts(texts, parts.lengths.query)
    return [[*p, *t, parts.chat.tokenizer.embed_id] for p, t in zip(prompts, thoughts, strict=True)]


def test_direct_reads_the_query_as_a_document(parts, params, vectors, found):
    texts = queries_of(parts.dataset, SPLIT)[1]
    rows = parts.chat.direct_queries(texts, parts.lengths.query)
    same_run(found["direct"].run, run_of(parts, params, rows, vectors))


def test_reasoning_is_the_models_own_thought(parts, params, vectors, found, reasoned):
    same_run(found["reasoning"].run, run_of(parts, params, rows_of(parts, reasoned.thoughts), vectors))
    tokenizer = parts.chat.tokenizer
    assert found["reasoning"].thoughts == [tokenizer.decode(t) for t in reasoned.thoughts]
    assert found["reasoning"].summary["thought_tokens"] == np.mean([len(t) for t in reasoned.thoughts])
    assert found["reasoning"].summary["token_rate"] == reasoned.emitted.mean() > 0
    assert len({tuple(t) for t in reasoned.thoughts}) > 5 and len({len(t) for t in reasoned.thoughts}) > 1


def test_a_thought_that_reaches_its_limit_is_cut_and_flagged(parts, params, reasoned):
    reader = dataclasses.replace(parts.reader, max_new=2)
    with jax.set_mesh(parts.mesh):
        cut = reader.reason(params, queries_of(parts.dataset, SPLIT)[1])
    assert cut.thoughts == [t[:1] for t in reasoned.thoughts]
    assert list(cut.emitted) == [len(t) < 2 and e for t, e in zip(reasoned.thoughts, reasoned.emitted, strict=True)]
    assert 0 < cut.emitted.mean() < 1


def test_a_thought_is_greedy(parts, params, reasoned):
    """Each token is the likeliest after what is before it, and so is the end, where it came by itself."""
    for row, thought, emitted in list(
        zip(rows_of(parts, reasoned.thoughts), reasoned.thoughts, reasoned.emitted, strict=True)
    )[:5]:
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(row)] = row
        with jax.set_mesh(parts.mesh):
            ends = jax.device_put(np.array([len(row)], np.int32), jax.NamedSharding(parts.mesh, jax.P()))
            placed = jax.device_put(tokens, jax.NamedSharding(parts.mesh, jax.P()))
            hidden = jax.jit(lambda p, t, n: hidden_states(p, parts.model, t, n))(params, placed, ends)
            table = np.asarray(jax.device_get(unembedding(params, parts.model)))
        likeliest = (np.asarray(hidden[0]) @ table.T).argmax(1)
        start = len(row) - 1 - len(thought)
        assert list(likeliest[start - 1 : len(row) - 2]) == thought
        if emitted:
            assert likeliest[len(row) - 2] == parts.chat.tokenizer.embed_id


def test_an_average_is_the_mean_of_sampled_thoughts(parts, params, found, reasoned):
    _, texts = queries_of(parts.dataset, SPLIT)
    with jax.set_mesh(parts.mesh):
        three = parts.reader.reason(params, texts, 3)
        again = dataclasses.replace(parts.reader, batch_size=7).reason(params, texts, 3)  # other batches
    np.testing.assert_allclose(again.vectors, three.vectors, atol=1e-5)
    assert again.thoughts == three.thoughts != reasoned.thoughts
    np.testing.assert_allclose(np.linalg.norm(three.vectors, axis=1), 1, atol=1e-5)
    assert (three.tokens >= [len(t) for t in three.thoughts]).all() and three.tokens.mean() > 2 * reasoned.tokens.mean()
    assert found["averaged"].summary["thought_tokens"] > found["reasoning"].summary["thought_tokens"]


def test_controls_read_other_thoughts(parts, params, vectors, found, reasoned):
    nothing = [[]] * 20
    others = reasoned.thoughts[10:] + reasoned.thoughts[:10]
    same_run(found["empty"].run, run_of(parts, params, rows_of(parts, nothing), vectors))
    same_run(found["shuffled"].run, run_of(parts, params, rows_of(parts, others), vectors))
    _, texts = queries_of(parts.dataset, SPLIT)
    limit = parts.config.data.max_thought_tokens
    copies = [parts.chat.tokenizer.encode(text)[:limit] for text in texts]
    same_run(found["copied"].run, run_of(parts, params, rows_of(parts, copies), vectors))
    for name in ("direct", "empty", "shuffled", "copied"):
        assert found[name].thoughts is None and found[name].summary["thought_tokens"] is None


def test_a_summary_is_the_mean_over_judged_queries(parts, found):
    ids, _ = queries_of(parts.dataset, SPLIT)
    assert list(found) == list(MODEL_CONDITIONS)
    for measured in found.values():
        for metric in ("ndcg@10", "recall@10", "recall@100", "mrr@10"):
            assert list(measured.per_query[metric]) == ids
            assert measured.summary[metric] == pytest.approx(np.mean(list(measured.per_query[metric].values())))
        assert measured.summary["queries"] == 20 and measured.summary["unanswered"] == 0
    # The rank of the one relevant document, by hand.
    for query, scored in found["direct"].run.items():
        [relevant] = parts.dataset.qrels[SPLIT][query]
        ranked = sorted(scored, key=lambda d: -scored[d])
        rank = ranked.index(relevant) + 1 if relevant in ranked else 1000
        mrr = found["direct"].per_query["mrr@10"][query]
        assert mrr == pytest.approx(1 / rank if rank <= 10 else 0)


@pytest.mark.parametrize("batch_size", [8, 20])
def test_nothing_depends_on_the_batch(parts, params, vectors, found, batch_size):
    reader = dataclasses.replace(parts.reader, batch_size=batch_size)
    with jax.set_mesh(parts.mesh):
        index = VersionedIndex.build(vectors, 0, "exact")
        again = evaluate(reader, params, parts.dataset, SPLIT, index, ("reasoning",))
    assert list(again) == ["reasoning"] and again["reasoning"].thoughts == found["reasoning"].thoughts
    same_run(again["reasoning"].run, found["reasoning"].run)


def test_bm25_is_measured_alike(parts):
    measured = bm25(parts.dataset, SPLIT)
    assert measured.summary["ndcg@10"] > 0.3 and measured.summary["queries"] == 20
    assert measured.thoughts is None and list(measured.run) == queries_of(parts.dataset, SPLIT)[0]


def test_queries_without_a_relevant_document_are_not_asked(parts):
    judged = parts.dataset.qrels[SPLIT]
    kept = list(judged)[3]
    irrelevant = {q: grades if q == kept else dict.fromkeys(grades, 0) for q, grades in judged.items()}
    dataset = dataclasses.replace(parts.dataset, qrels={"x": irrelevant})
    assert queries_of(dataset, "x")[0] == [kept]
    assert bm25(dataset, "x").summary["queries"] == 1


def test_an_unknown_condition_is_named(parts, params, vectors):
    with (
        jax.set_mesh(parts.mesh),
        pytest.raises(ValueError, match="direct, reasoning, averaged, empty, shuffled, copied, not 'gold'"),
    ):
        index = VersionedIndex.build(vectors, 0, "exact")
        evaluate(parts.reader, params, parts.dataset, SPLIT, index, ("gold",))


def test_examples_show_hits_with_and_without_the_thought(parts, found):
    own, runs = thoughts_of(found["reasoning"]), (found["reasoning"].run, found["direct"].run)
    cards = examples(parts.dataset, SPLIT, own, *runs, 7, hits=3)
    assert len(cards) == 7
    for card in cards:
        query = card["query_id"]
        [relevant] = parts.dataset.qrels[SPLIT][query]
        assert card["query"] == parts.dataset.query_texts[parts.dataset.query_row[query]]
        assert [r["doc_id"] for r in card["relevant"]] == [relevant]
        for hits, condition in (("hits_with", "reasoning"), ("hits_without", "direct")):
            assert [h["grade"] for h in card[hits]] == [1 if h["doc_id"] == relevant else None for h in card[hits]]
            scores = [h["score"] for h in card[hits]]
            assert len(scores) == 3 and scores == sorted(scores, reverse=True)
            assert scores[0] == max(found[condition].run[query].values())
        assert card["ndcg_with"] == found["reasoning"].per_query["ndcg@10"][query]
        ranked = [sorted(run[query], key=lambda d, run=run: -run[query][d]) for run in runs]
        place = {d: i for i, d in enumerate(ranked[1], 1)}
        assert [h["other_place"] for h in card["hits_with"]] == [place.get(h["doc_id"]) for h in card["hits_with"]]
        assert card["relevant"][0]["place_without"] == place.get(relevant)
    assert len(examples(parts.dataset, SPLIT, own, *runs)) == 20


def test_thoughts_survive_the_disk(found, tmp_path):
    own = thoughts_of(found["reasoning"])
    write_thoughts(tmp_path / "thoughts" / "x.jsonl", own)
    assert read_thoughts(tmp_path / "thoughts" / "x.jsonl") == own and len(own) == 20


def test_compilations_are_not_on_the_watch():
    """A function of a constant that no cache has seen: its first call compiles."""
    watch, spent = Stopwatch(), time.perf_counter()
    with watch.running():
        jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.linalg.qr(y @ y)[0], x) + spent)(jnp.eye(64))
        time.sleep(0.05)
    spent = time.perf_counter() - spent
    assert 0.05 <= watch.seconds < spent - 0.02
    with watch.running():
        time.sleep(0.05)
    assert watch.seconds >= 0.1
