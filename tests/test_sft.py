"""Stage 1: its loss against torch, its invariances (chunks, mesh), and what its batches hold."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from absl import flags

from r3jax import assembly
from r3jax.stages import sft
from tests import fixtures

WEIGHTS = sft.Weights(ce=0.7, kl=0.3, infonce=1.0, triplet=0.4)
TEMPERATURE, MARGIN = 0.1, 0.3
SETTINGS = {"data__hard_negatives": True, "prompts__direct_assistant": "The embedding is "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def parts(folder):
    """With a fixed answer of some tokens, so that the direct mode has something to learn too."""
    return fixtures.parts(folder, **SETTINGS)


def start(parts, seed=0):
    """The stage and its state at step 0."""
    params = parts.initial_params()
    return assembly.make_stage("sft", parts, params), assembly.first_state("sft", parts, params)


def run(parts, steps: int):
    """The metrics of each of the first steps, and the state after them."""
    rows = []
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts)
        for step in range(1, steps + 1):
            batch, _ = stage.next_batch(state, step)
            state, metrics = stage.update(state, batch)
            rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state


# The loss, with a decoder of one line: hidden = tanh(embedding + position).


def torch_hidden(params, tokens):
    return torch.tanh(params["table"][tokens] + params["position"][: tokens.shape[1]])


def torch_loss(params, reference, batch, chat) -> dict[str, torch.Tensor]:
    """The four terms, from the text of spec section 4 and the chat's own tokens."""
    head = len(chat.tokenizer.encode("assistant\n"))
    vectors, ce, kl, count = {}, 0.0, 0.0, 0
    for name in ("direct", "reasoned"):
        tokens = torch.tensor(batch[name]).long()
        hidden, frozen = torch_hidden(params, tokens), torch_hidden(reference, tokens)
        ends = batch[f"{name}_length"]
        vectors[name] = F.normalize(torch.stack([h[n - 1] for h, n in zip(hidden, ends, strict=True)]), dim=1)
        for i, end in enumerate(ends):
            assert batch[name][i, end - 1] == chat.tokenizer.embed_id
            if name == "reasoned" and not batch["gold"][i]:
                continue  # a thought that is not the query's own teaches no words
            opening = np.flatnonzero(batch[name][i, :end] == chat.tokenizer.im_start_id)[-1]
            for p in range(opening + head, end - 1):  # predicts p + 1, the answer's embed token the last
                logp = F.log_softmax(params["table"] @ hidden[i, p], dim=0)
                ref_logp = F.log_softmax(reference["table"] @ frozen[i, p], dim=0)
                ce = ce - logp[tokens[i, p + 1]]
                kl = kl + (ref_logp.exp() * (ref_logp - logp)).sum()
                count += 1
    queries, per_query = batch["doc_rows"].shape
    flat = batch["docs"].reshape(queries * per_query, -1)
    hidden = torch_hidden(params, torch.tensor(flat).long())
    ends = batch["doc_lengths"].reshape(-1)
    docs = F.normalize(torch.stack([h[n - 1] for h, n in zip(hidden, ends, strict=True)]), dim=1)
    rows = batch["doc_rows"].reshape(-1)
    infonce, triplet = 0.0, 0.0
    for name in ("direct", "reasoned"):
        for i in range(queries):
            own = i * per_query
            others = [j for j in range(len(rows)) if j != own and rows[j] not in batch["known"][i]]
            scores = docs @ vectors[name][i]
            infonce = infonce + F.cross_entropy(scores[[own, *others]] / TEMPERATURE, torch.tensor(0))
            worst = others[int(scores.detach()[others].argmax())]
            triplet = triplet + F.relu(scores[worst] - scores[own] + MARGIN)
    return {
        "ce": ce / count,
        "kl": kl / count,
        "infonce": infonce / 2 / queries,
        "triplet": triplet / 2 / queries,
    }


@pytest.fixture(scope="module")
def batch(parts):
    """A host batch with doubled and known documents, and thoughts that are not the query's own."""
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts)
        made = jax.tree.map(np.array, jax.device_get(stage.next_batch(state, 1)[0]))
    made["docs"][3], made["doc_lengths"][3] = made["docs"][5], made["doc_lengths"][5]
    made["doc_rows"][3] = made["doc_rows"][5]
    made["known"][3] = made["known"][5]
    made["known"][0, 1] = made["doc_rows"][1, 0]  # relevant to query 0 too
    made["known"][1, 1] = made["doc_rows"][2, 1]
    made["gold"][::4] = False
    return stage.packed(made)


def numbers(parts, seed):
    rng = np.random.default_rng(seed)
    vocab, width = parts.model.vocab, parts.model.width
    return {
        "table": jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32),
        "position": jnp.asarray(rng.normal(size=(64, width)), jnp.float32),
    }


def ours(parts, batch, params, reference, weights=WEIGHTS):
    answer = len(parts.chat.tokenizer.encode("assistant\nThe embedding is ")) - len(
        parts.chat.tokenizer.encode("assistant\n")
    )

    def tree(p):
        return {"embed": {"table": p["table"]}, "position": p["position"]}

    rows = sft.encode(
        tree(params),
        batch,
        model=parts.model,
        reference=tree(reference),
        weights=weights,
        direct_window=answer + 1,
        thought_window=parts.lengths.thought + 1,
    )
    return sft.loss(rows, batch, weights=weights, temperature=TEMPERATURE, margin=MARGIN)


def test_values_and_gradients_of_all_four_terms_equal_torch(parts, batch, monkeypatch):
    monkeypatch.setattr(sft, "packed_states", fixtures.fake_states)
    params, reference = numbers(parts, 0), numbers(parts, 1)
    leaves = {k: torch.tensor(np.array(v), requires_grad=True) for k, v in params.items()}
    frozen = {k: torch.tensor(np.array(v)) for k, v in reference.items()}
    want = torch_loss(leaves, frozen, batch, parts.chat)
    total = 0.7 * want["ce"] + 0.3 * want["kl"] + want["infonce"] + 0.4 * want["triplet"]
    total.backward()
    total = total.item()
    arrays = jax.tree.map(jnp.asarray, batch)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(lambda p: ours(parts, arrays, p, reference), has_aux=True))(
        params
    )
    assert float(value) == pytest.approx(total, rel=1e-4)
    for name, term in want.items():
        assert term.item() > 0.01
        assert float(metrics[f"loss/{name}"]) == pytest.approx(term.item(), rel=1e-4)
    for name, leaf in leaves.items():
        scale = float(leaf.grad.abs().max())
        assert scale > 1e-3
        np.testing.assert_allclose(gradient[name], leaf.grad, rtol=1e-4, atol=1e-5 * scale)


def test_known_positives_are_no_negatives(parts, batch, monkeypatch):
    monkeypatch.setattr(sft, "packed_states", fixtures.fake_states)
    params = numbers(parts, 0)
    blind = {**batch, "known": np.where(np.arange(2) == 0, batch["known"], -1)}
    values = []
    for b in (batch, blind):
        _, metrics = jax.jit(lambda b: ours(parts, b, params, params))(jax.tree.map(jnp.asarray, b))
        values.append(float(metrics["loss/infonce"]))
    assert values[0] < values[1] - 1e-3  # the sums of the softmax have lost two documents


def test_thoughts_that_are_not_the_querys_own_teach_no_words(parts, batch, monkeypatch):
    monkeypatch.setattr(sft, "packed_states", fixtures.fake_states)
    params = numbers(parts, 0)
    others = {**batch, "gold": np.zeros_like(batch["gold"])}
    random = np.random.default_rng(0).integers(0, 300, batch["reasoned"].shape)
    answers = np.arange(random.shape[1])[None] >= batch["reasoned_start"][:, None]
    answers &= np.arange(random.shape[1])[None] < batch["reasoned_length"][:, None] - 1
    babble = {**others, "reasoned": np.where(answers, random, batch["reasoned"]).astype(np.int32)}
    babble = start(parts)[0].packed(babble)
    metrics = [
        jax.jit(lambda b: ours(parts, b, params, numbers(parts, 1))[1])(jax.tree.map(jnp.asarray, b))
        for b in (others, babble)
    ]
    for term in ("loss/ce", "loss/kl"):
        assert float(metrics[0][term]) == pytest.approx(float(metrics[1][term]), rel=1e-6)
        assert float(metrics[0][term]) > 0.01


def test_a_term_of_weight_zero_is_not_computed(parts, batch, monkeypatch):
    monkeypatch.setattr(sft, "packed_states", fixtures.fake_states)
    params, arrays = numbers(parts, 0), jax.tree.map(jnp.asarray, batch)
    only = sft.Weights(ce=0.0, kl=0.0, infonce=2.0, triplet=0.0)
    value, metrics = jax.jit(lambda b: ours(parts, b, params, params, only))(arrays)
    assert {k for k in metrics if not k.startswith("loss/infonce")} == {"loss"}
    assert float(value) == pytest.approx(2 * float(metrics["loss/infonce"]))


# The stage, with the real decoder.


@pytest.fixture(scope="module")
def plain(parts):
    return run(parts, 3)


def same_metrics(found, wanted, rel=1e-4):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys() >= {"loss", "loss/ce", "loss/kl", "loss/infonce", "loss/triplet", "grad_norm"}
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), name


def test_the_kl_term_is_zero_at_the_frozen_start_and_grows_with_change(plain):
    rows, _ = plain
    assert abs(rows[0]["loss/kl"]) < 1e-6
    assert rows[1]["loss/kl"] > 1e-4


def test_the_loss_is_the_weighted_sum_of_the_terms_logged(parts, plain):
    c = parts.config.sft
    for row in plain[0]:
        total = sum(c[f"{name}_weight"] * row[f"loss/{name}"] for name in ("ce", "kl", "infonce", "triplet"))
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_gradient_caching_changes_nothing(folder, parts):
    found = []
    for its in (fixtures.parts(folder, **SETTINGS, sft__chunks=4), parts):
        rows, state = run(its, 1)
        found.append((rows, optax.tree_utils.tree_get(state.opt_state, "mu")))  # a tenth of the gradient
    (rows, gradient), (wanted_rows, wanted) = found
    same_metrics(rows, wanted_rows)
    fixtures.assert_same_gradient(gradient, wanted)


@pytest.mark.parametrize("mesh", [(1, 4, 2), (1, 8, 1)])
def test_a_mesh_gives_the_losses_of_one_device(folder, plain, mesh):
    split = fixtures.parts(folder, mesh, **SETTINGS)
    same_metrics(run(split, 3)[0], plain[0])


def decoded(parts, ids):
    """The texts of a chat's last user turn and of the assistant's."""
    text = parts.chat.tokenizer.decode(ids, keep_special=True)
    user = text.split("user\n", 1)[1].split("<|im_end|>", 1)[0]
    return user, text.split("assistant\n")[-1].removesuffix("<|embed_token|>")


def batches(parts, count: int):
    """Host batches, with the texts decoded."""
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts)
        for step in range(1, count + 1):
            batch, numbers = stage.next_batch(state, step)
            yield jax.device_get(batch), numbers


def test_what_a_batch_holds(parts):
    """The rows of a batch are the chats of one record: query, thought, its document, a hard negative."""
    data, chat = parts.dataset, parts.chat
    relevant = data.positives("train")
    row_of = {text: row for row, text in enumerate(data.query_texts)}
    texts = {chat.tokenizer.decode(ids): i for i, ids in enumerate(map(chat.tokenizer.encode, data.doc_texts))}
    assert len(texts) == 200
    seen = set()
    for batch, numbers in batches(parts, 8):
        total = sum(int(batch[k].sum()) for k in ("direct_length", "reasoned_length", "doc_lengths"))
        assert numbers["tokens"] == total
        for i in range(16):
            query, answer = decoded(parts, batch["direct"][i, : batch["direct_length"][i]])
            assert answer == "The embedding is "
            name = data.query_ids[row_of[query]]
            seen.add(name)
            again, thought = decoded(parts, batch["reasoned"][i, : batch["reasoned_length"][i]])
            assert again == query
            own = chat.tokenizer.decode(chat.tokenizer.encode(data.thoughts[name])[: parts.lengths.thought])
            assert thought == own if batch["gold"][i] else True
            prompt = chat.reasoning_prompt(query, parts.lengths.query)
            assert batch["reasoned_start"][i] == len(prompt)
            positive, negative = batch["doc_rows"][i]
            assert positive in relevant[name] and negative not in relevant[name]
            known = batch["known"][i]
            assert sorted(known[known >= 0]) == sorted(relevant[name])
            for j, row in enumerate((positive, negative)):
                shown, _ = decoded(parts, batch["docs"][i, j, : batch["doc_lengths"][i, j]])
                assert data.doc_texts[row].startswith(shown)
    assert len(seen) > 100  # 128 draws of 120 queries: the first epoch, nearly


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_corrupt_thoughts(folder, share):
    parts = fixtures.parts(folder, sft__corrupt_thoughts=share)
    for batch, _ in batches(parts, 2):
        assert (batch["gold"] == (share == 0)).all()
        assert batch["docs"].shape[1] == 1  # and without hard negatives there are none


def test_pseudo_queries_are_words_of_their_document(folder):
    parts = fixtures.parts(folder, sft__pseudo_queries=1.0, sft__corrupt_thoughts=0.0)
    asked = set()
    for batch, _ in batches(parts, 3):
        for i in range(16):
            query, _ = decoded(parts, batch["direct"][i, : batch["direct_length"][i]])
            row = batch["doc_rows"][i, 0]
            assert set(query.split()[:-1]) <= set(parts.dataset.doc_texts[row].split())  # the last may be cut
            assert list(batch["known"][i]) == [row, -1]
            asked.add(row)
    assert len(asked) > 30 and max(asked) > 120  # documents that no training query asks for, too


def test_a_stream_goes_on_where_its_state_was_taken(parts):
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts)
        stage.next_batch(state, 1)
        kept, host = stage.stream_state(), stage.host_state()
        want = jax.device_get(stage.next_batch(state, 2)[0])
        other = assembly.make_stage("sft", parts, None)
        other.resume(host, json.loads(json.dumps(kept)))
        found = jax.device_get(other.next_batch(state, 2)[0])
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_workers_give_the_same_batches(tmp_path):
    """What a worker process needs pickles: the records, the tokenizer, the writer of thoughts."""
    fixtures.write_dataset(tmp_path / "data")  # brings no thoughts, so that there is a writer
    found = []
    for workers in (0, 1):
        parts = fixtures.parts(tmp_path, **SETTINGS, data__workers=workers, sft__pseudo_queries=0.5)
        assert parts.thinker is not None
        flags.FLAGS.unparse_flags()  # as at a program's start
        with jax.set_mesh(parts.mesh):
            stage = assembly.make_stage("sft", parts, None)
            found.append(jax.device_get(stage.next_batch(None, 1)[0]))
    jax.tree.map(np.testing.assert_array_equal, found[1], found[0])
    assert found[0]["gold"].any() and not found[0]["gold"].all()
