"""Stage 2: its loss against torch, its invariances (chunks, mesh), its batches, no recompilation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from r3jax import assembly
from r3jax.errors import UserError
from r3jax.model.encoder import encode_rows
from r3jax.rl.environment import Rollouts
from r3jax.stages import policy as policy_step
from r3jax.stages import rl
from r3jax.stages import tokens as token_rows
from tests import fixtures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def parts(folder):
    return fixtures.parts(folder)


@pytest.fixture(scope="module")
def weights(parts):
    return fixtures.trained_params(parts)


def start(parts, weights, name="rl"):
    """The stage and its state at step 0."""
    params = fixtures.placed(weights, parts)
    return assembly.make_stage(name, parts, params), assembly.first_state(name, parts, params)


def play(parts, weights, steps: int):
    """(host batch, its statistics, metrics) of each of the first steps, and the state after them."""
    rows = []
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        for step in range(1, steps + 1):
            batch, stats = stage.next_batch(state, step)
            kept = jax.device_get(batch)
            state, metrics = stage.update(state, batch)
            rows.append((kept, stats, {name: float(value) for name, value in metrics.items()}))
        return rows, jax.device_get(state)


@pytest.fixture(scope="module")
def plain(parts, weights):
    return play(parts, weights, 2)


@pytest.fixture(scope="module")
def batch(plain):
    """The first host batch: some rollouts ended by themselves, others were cut."""
    made = plain[0][0][0]
    assert 0.1 < made["emitted"].mean() < 1
    return jax.tree.map(np.array, made)


# The loss, with a decoder of one line: hidden = tanh(embedding + position).


def torch_hidden(params, tokens):
    return torch.tanh(params["table"][tokens] + params["position"][: tokens.shape[0]])


def torch_loss(params, reference, batch, policy, documents) -> dict[str, torch.Tensor]:
    """Clipped policy gradient, KL and InfoNCE as plain loops over rollouts and tokens."""
    count, group, _ = batch["tokens"].shape
    gain, kl, contrast, tokens, pulled = 0.0, 0.0, 0.0, 0, 0
    doc_rows, per_query = batch["doc_rows"].ravel(), batch["doc_rows"].shape[1]
    texts = (torch.tensor(documents[row]) for row in doc_rows)
    docs = torch.stack([F.normalize(torch_hidden(params, text)[-1], dim=0) for text in texts])
    for b in range(count):
        rewards = torch.tensor(batch["rewards"][b])
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for g in range(group):
            row = torch.tensor(batch["tokens"][b, g]).long()
            begin, end = batch["starts"][b, g], batch["lengths"][b, g]
            hidden, frozen = torch_hidden(params, row), torch_hidden(reference, row)
            for t in range(begin, end):
                if t == end - 1 and not batch["emitted"][b, g]:
                    continue  # this token was forced
                logp = F.log_softmax(params["table"] @ hidden[t - 1] / policy.temperature, 0)[row[t]]
                ref = F.log_softmax(reference["table"] @ frozen[t - 1] / policy.temperature, 0)[row[t]]
                ratio = torch.exp(logp - batch["old_logp"][b, g, t - begin])
                clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
                gain = gain + torch.minimum(ratio * advantage[g], clipped * advantage[g])
                kl = kl + 0.5 * (logp - ref) ** 2
                tokens += 1
            if batch["emitted"][b, g]:
                vector = F.normalize(hidden[end - 1], dim=0)
                known = set(batch["known"][b])
                own = b * per_query
                others = [j for j in range(len(docs)) if j != own and doc_rows[j] not in known]
                scores = docs[[own, *others]] @ vector / policy.contrastive_temperature
                contrast = contrast + F.cross_entropy(scores, torch.tensor(0))
                pulled += 1
    return {"loss": -gain / tokens, "kl": kl / tokens, "contrastive": contrast / pulled}


def test_values_and_gradients_of_all_terms_equal_torch(parts, batch, monkeypatch):
    monkeypatch.setattr(policy_step, "packed_states", fixtures.fake_states)
    p = parts.config.rl
    policy = policy_step.PolicyConfig(
        advantage="grpo",
        normalise="token",
        ratio="token",
        clip_low=0.2,
        clip_high=0.28,
        kl="k2",
        kl_weight=0.3,
        contrastive_weight=0.5,
        contrastive_temperature=p.contrastive_temperature,
        hard_negatives=p.hard_negatives,
        temperature=0.7,
        max_new=parts.config.data.max_thought_tokens + 1,
    )
    rng = np.random.default_rng(0)
    shapes = {"table": (parts.model.vocab, parts.model.width), "position": (64, parts.model.width)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    reference = {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}

    def tree(p):
        return {"embed": {"table": p["table"]}, "position": p["position"]}

    def ours(params, batch):
        rows = policy_step.encode(
            tree(params),
            batch,
            model=parts.model,
            reference=tree(jax.tree.map(jnp.asarray, reference)),
            policy=policy,
        )
        return policy_step.loss(rows, batch, policy=policy), rows

    arrays = jax.tree.map(jnp.asarray, batch)
    # Old log-probabilities near the new ones, so that some ratios are clipped and some are not.
    _, rows = jax.jit(ours)(jax.tree.map(jnp.asarray, params), arrays)
    old = np.asarray(rows["logp"]) + 0.3 * rng.normal(size=batch["old_logp"].shape).astype(np.float32)
    known = batch["known"].copy()
    known[0, 1], known[1, 1] = batch["doc_rows"][1, 0], batch["doc_rows"][2, 0]  # relevant to others too
    batch = {**batch, "known": known, "old_logp": np.where(batch["mask"] > 0, old, 99.0).astype(np.float32)}
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in params.items()}
    want = torch_loss(leaves, {k: torch.tensor(v) for k, v in reference.items()}, batch, policy, parts.documents)
    total = want["loss"] + 0.3 * want["kl"] + 0.5 * want["contrastive"]
    total.backward()
    arrays = jax.tree.map(jnp.asarray, batch)
    both = jax.jit(jax.value_and_grad(lambda p: ours(p, arrays)[0], has_aux=True))
    (value, metrics), gradient = both(jax.tree.map(jnp.asarray, params))
    assert float(value) == pytest.approx(total.item(), rel=1e-4)
    for name, term in want.items():
        assert abs(term.item()) > 1e-3
        assert float(metrics[f"policy/{name}"]) == pytest.approx(term.item(), rel=1e-4)
    assert 0 < float(metrics["policy/clip_low"]) < 0.5 and 0 < float(metrics["policy/clip_high"]) < 0.5
    for name, leaf in leaves.items():
        scale = float(leaf.grad.abs().max())
        assert scale > 1e-3
        np.testing.assert_allclose(gradient[name], leaf.grad, rtol=1e-4, atol=1e-5 * scale)


# What a batch of rollouts holds.


def test_the_sampled_rows_are_prompt_completion_and_terminal(parts, batch, plain):
    embed = parts.chat.tokenizer.embed_id
    new = batch["lengths"] - batch["starts"]
    assert (new >= 1).all() and new.max() <= parts.config.data.max_thought_tokens + 1
    prompts = parts.chat.reasoning_prompts(parts.dataset.query_texts, parts.lengths.query)
    relevant = parts.dataset.positives("train")
    for b, rows in enumerate(batch["tokens"]):
        prompt = list(rows[0, : batch["starts"][b, 0]])
        row = prompts.index(prompt)
        known = batch["known"][b]
        assert list(known[known >= 0]) == relevant[parts.dataset.query_ids[row]]
        assert parts.grades[row] == [1] * (known >= 0).sum()
        positive, *wrong = batch["doc_rows"][b]
        assert positive == known[0] and len(set(wrong) - set(known)) == parts.config.rl.hard_negatives
        for j, doc in enumerate(batch["doc_rows"][b]):
            assert list(batch["docs"][b, j, : batch["doc_lengths"][b, j]]) == parts.documents[doc]
        for g, tokens in enumerate(rows):
            completion = tokens[batch["starts"][b, g] : batch["lengths"][b, g]]
            assert list(tokens[: len(prompt)]) == prompt
            assert completion[-1] == embed and embed not in completion[:-1]
            sampled = len(completion) if batch["emitted"][b, g] else len(completion) - 1
            assert list(batch["mask"][b, g]) == [1.0] * sampled + [0.0] * (new.dtype.type(6) - sampled)
    assert len({tuple(map(int, row)) for row in batch["tokens"].reshape(32, -1)}) > 8  # the group differs
    stats = plain[0][0][1]
    assert stats["completion/length_mean"] == pytest.approx((new - 1).mean())
    assert stats["completion/token_rate"] == batch["emitted"].mean()


def test_prompts_are_no_wider_than_the_longest_query_needs(folder, parts, weights):
    longest = max(len(ids) for ids in parts.chat.tokens(parts.dataset.query_texts))
    for limit in (longest - 1, longest, 500):
        wide = fixtures.parts(folder, data__max_query_tokens=limit)
        with jax.set_mesh(wide.mesh):
            stage, _ = start(wide, weights)
        assert stage.lengths.query == stage.collector.max_query == min(limit, longest)


def test_rewards_are_those_of_the_rows_encoded_anew(parts, weights, batch):
    """At the first step the index is fresh, so the reward must be that of the whole corpus."""
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        tokens, ends = batch["tokens"].reshape(32, -1), batch["lengths"].reshape(-1)
        rows = [list(map(int, row[:end])) for row, end in zip(tokens, ends, strict=True)]
        vectors = encode_rows(state.params, parts.model, parts.mesh, rows, batch_size=32)
        rollouts = Rollouts(
            vectors=vectors,
            relevant=np.repeat(batch["known"], 4, axis=0),
            emitted=batch["emitted"].reshape(-1),
            lengths=(batch["lengths"] - batch["starts"] - 1).reshape(-1),
        )
        exact = stage.environment.exact_rewards(rollouts, parts.encode_corpus(state.params))
    np.testing.assert_allclose(batch["rewards"].reshape(-1), exact, atol=1e-4)
    assert batch["rewards"].std() > 0.01


def test_completions_behind_their_prompt_teach_what_they_teach_in_rows_of_their_own(parts, weights, plain, monkeypatch):
    batch, _, want = plain[0][0]
    assert (batch["packs"].before.segments > 0).sum() == batch["starts"][:, 0].sum()

    class Alone(rl.RL):
        def packed(self, batch):
            """As for a kernel that cannot read a prompt once for all."""
            model, self.model = self.model, dataclasses.replace(self.model, attention="splash")
            try:
                return super().packed(batch)
            finally:
                self.model = model

    monkeypatch.setattr(rl, "RL", Alone)
    [(apart, _, got)], _ = play(parts, weights, 1)
    assert apart["packs"].before is None and apart["doc_packs"].before is None
    assert apart["packs"].computed() > 1.3 * batch["packs"].computed()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_the_policy_is_the_one_that_sampled(plain):
    """One update per batch: the ratio is 1 and nothing is clipped, at every step."""
    for _, _, metrics in plain[0]:
        assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/logp_gap"] < 1e-5
        assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0
    assert plain[0][0][2]["policy/kl"] == pytest.approx(0, abs=1e-8)
    assert plain[0][1][2]["policy/kl"] > 1e-6


def test_probe_steps_compare_with_the_whole_corpus(folder, weights, plain):
    (_, first, _), (_, second, _) = plain[0]
    assert "probe/reward_error" not in first and "probe/reward_error" in second  # every second step is one
    error = {}
    for policy in ("full", "none"):
        rows, _ = play(fixtures.parts(folder, index__policy=policy), weights, 2)
        error[policy] = rows[1][1]["probe/reward_error"]
    # The model's vectors lie close together: one rollout's rank may hang on the rounding of two scores.
    assert error["full"] < 0.01 and error["none"] > 10 * error["full"]


def test_samples_show_the_best_and_the_worst(parts, weights):
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        batch, _ = stage.next_batch(state, 1)
        rows, rewards = stage.samples(), jax.device_get(batch["rewards"])
    assert len(rows) == 8
    for i in range(4):
        best, worst = rows[2 * i : 2 * i + 2]
        assert best["query"] == worst["query"] and best["reward"] >= worst["reward"]
        assert best["reward"] == rewards[i].max() and worst["reward"] == rewards[i].min()


# The update.


def updater(parts, weights):
    """From a host batch to the parameters before and after one update on it, and its metrics; traced once.

    `one.gradient` is Adam's first moment after it, a tenth of the gradient.
    """
    with jax.set_mesh(parts.mesh):
        stage, _ = start(parts, weights)

    def one(batch):
        with jax.set_mesh(parts.mesh):
            state = assembly.first_state("rl", parts, fixtures.placed(weights, parts))
            before = jax.device_get(state.params)
            state, metrics = stage.update(state, rl.put_batch(parts.mesh, stage.packed(batch)))
            one.gradient = jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu"))
            return before, jax.device_get(state.params), jax.device_get(metrics)

    return one


def updated(parts, weights, batch):
    return updater(parts, weights)(batch)


@pytest.fixture(scope="module")
def update(parts, weights):
    return updater(parts, weights)


def distance(a, b) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_groups_of_equal_rewards_give_no_policy_gradient(folder, weights, batch):
    only = fixtures.parts(folder, rl__kl_weight=0.0, rl__contrastive_weight=0.0)
    flat = {**batch, "rewards": np.repeat(batch["rewards"][:, :1], 4, axis=1)}
    update = updater(only, weights)
    before, after, metrics = update(flat)
    assert distance(before, after) == 0 and metrics["grad_norm"] == 0 and metrics["policy/loss"] == 0
    before, after, metrics = update(batch)
    assert distance(before, after) > 1e-4 and metrics["grad_norm"] > 1e-3


def test_what_a_forced_terminal_would_have_cost_does_not_matter(update, batch):
    forced = batch["mask"] == 0
    wild = {**batch, "old_logp": np.where(forced, -50.0, batch["old_logp"]).astype(np.float32)}
    _, after, metrics = update(batch)
    _, again, metrics_again = update(wild)
    assert distance(after, again) == 0 and metrics == metrics_again
    # The terminal token that came by itself does count.
    ends = (batch["lengths"] - batch["starts"] - 1)[..., None] == np.arange(6)
    other = {**batch, "mask": np.where(ends, 0.0, batch["mask"]).astype(np.float32)}
    assert update(other)[2]["policy/loss"] != pytest.approx(metrics["policy/loss"])


SEQUENCE = {"rl__ratio": "sequence", "rl__normalise": "sequence"}


@pytest.mark.parametrize(
    "mesh, changes, kind",
    [
        ((1, 1, 1), {"rl__chunks": 2}, {}),
        ((1, 1, 1), {"rl__chunks": 4}, {}),
        ((1, 1, 1), {"rl__chunks": 8}, {}),  # one prompt each
        ((1, 8, 1), {}, {}),
        ((1, 1, 1), {"rl__chunks": 4}, SEQUENCE),
    ],
)
def test_neither_micro_batch_nor_device_count_changes_the_update(
    folder, weights, update, batch, mesh, changes, kind, monkeypatch
):
    """Nor chunks of the unembedding, of which those without an answer are left out."""
    whole = updater(fixtures.parts(folder, **kind), weights) if kind else update
    _, _, metrics = whole(batch)
    monkeypatch.setattr(token_rows, "token_terms", functools.partial(token_rows.token_terms, chunk=16))
    split = updater(fixtures.parts(folder, mesh, **changes, **kind), weights)
    _, _, other = split(batch)
    assert metrics.keys() == other.keys()
    for name in metrics:
        assert float(other[name]) == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6), name
    fixtures.assert_same_gradient(split.gradient, whole.gradient)


def test_two_epochs_are_two_updates_on_the_trainers_own_log_probabilities(folder, weights, batch):
    """The same learning rates: 8 steps of one epoch, or 4 of two."""
    one = fixtures.parts(folder, rl__steps=8)
    with jax.set_mesh(one.mesh):
        stage, state = start(one, weights)
        seen = []
        for _ in range(2):
            state, metrics = stage.update(state, rl.put_batch(one.mesh, stage.packed(batch)))
            seen.append(jax.device_get(metrics))
        want = jax.device_get(state)
    two = fixtures.parts(folder, rl__epochs=2)
    with jax.set_mesh(two.mesh):
        stage, state = start(two, weights)
        state, metrics = stage.update(state, rl.put_batch(two.mesh, stage.packed(batch)))
        got = jax.device_get(state)
    assert int(got.step) == 1 and int(want.step) == 2  # of the loop: batches of rollouts
    assert distance(got.params, want.params) < 2e-3
    assert distance(got.params, weights) > 3e-3
    for name in ("loss", "grad_norm", "policy/ratio", "policy/kl"):
        assert float(metrics[name]) == pytest.approx((seen[0][name] + seen[1][name]) / 2, rel=1e-3, abs=1e-5)
    assert seen[1]["policy/logp_gap"] > 1e-3 > metrics["policy/logp_gap"]  # of sampler and trainer, before any step
    assert metrics["policy/importance"] == pytest.approx(1, abs=1e-5) and metrics["policy/importance_cut"] == 0


def test_epochs_weigh_what_another_sampler_wrote(folder, weights, batch):
    """A sampler that found every token three times less likely: weights of 3, cut off at 2."""
    far = {**batch, "old_logp": batch["old_logp"] - np.float32(np.log(3))}
    only = {"rl__epochs": 2, "rl__kl_weight": 0.0, "rl__contrastive_weight": 0.0}
    _, _, near = updated(fixtures.parts(folder, **only), weights, batch)
    _, _, metrics = updated(fixtures.parts(folder, rl__chunks=4, **only), weights, far)
    assert metrics["policy/importance"] == 2 and metrics["policy/importance_cut"] == 1
    assert metrics["policy/logp_gap"] == pytest.approx(np.log(3), abs=1e-4)
    assert metrics["policy/ratio"] == pytest.approx(near["policy/ratio"], abs=1e-2)  # to the trainer, not the sampler
    assert metrics["policy/loss"] == pytest.approx(2 * near["policy/loss"], rel=0.1)


def test_the_reference_follows_slowly(folder, weights, batch):
    moving = fixtures.parts(folder, rl__reference_decay=0.75)
    with jax.set_mesh(moving.mesh):
        stage, state = start(moving, weights)
        state, _ = stage.update(state, rl.put_batch(moving.mesh, stage.packed(batch)))
        state = jax.device_get(state)
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, weights, state.params)
    assert distance(state.reference, want) < 1e-6 < 1e-4 < distance(state.reference, weights)


# Dynamic sampling, overlong thoughts, rewards that are not finite.

BY_ROW = {"rl__reward__format": 0.0, "rl__reward__length": 0.0}
BY_ROW["rl__reward__name"] = "tests.user_rewards.flat_for_odd_rows"


def collected(parts, weights, steps: int = 1):
    """The groups of the first steps, with their figures."""
    found = []
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        for step in range(1, steps + 1):
            with jax.transfer_guard("disallow"):
                found.append(
                    stage.collector.collect(state.weights, lambda rows: stage._encode(state.weights, rows), step)
                )
    return found


def test_flat_groups_are_refilled_or_the_figures_say_why_not(folder, weights):
    [(plain, _)] = collected(fixtures.parts(folder, **BY_ROW), weights)
    odd = plain.known[:, 0] % 2 == 1
    assert odd.any() and plain.flat[odd].all() and not plain.flat.all()
    missing = {}
    for rounds in (1, 8):
        [(groups, stats)] = collected(fixtures.parts(folder, rl__dynamic_sampling=rounds, **BY_ROW), weights)
        kept = groups.query == plain.query
        # The first round is as without; what few documents say of all others' drift is another rounding of nothing.
        np.testing.assert_allclose(groups.rewards[kept], plain.rewards[kept], atol=1e-6)
        assert plain.flat[~kept].all() and not groups.flat[~kept].any()
        assert stats["refill/share"] == (~kept).mean() > 0
        assert stats["refill/missing"] == stats["policy/flat_groups"] == groups.flat.mean()
        assert 1 <= stats["refill/rounds"] <= rounds and 0 < stats["refill/drawn_flat"] < 1
        assert stats["index/reencoded"] <= 0.1 * 200
        missing[rounds] = stats["refill/missing"]
        # Whatever a refilled row holds is of one query.
        relevant = fixtures_positives(folder)
        for query, known, negatives in zip(groups.query, groups.known, groups.negatives, strict=True):
            assert set(known[known >= 0]) == relevant[query] and not set(negatives) & relevant[query]
    assert missing[8] == 0  # full
    [(_, stats)] = collected(
        fixtures.parts(folder, rl__dynamic_sampling=2, **BY_ROW | {"rl__reward__name": "tests.user_rewards.nothing"}),
        weights,
    )
    assert stats["refill/missing"] == stats["refill/drawn_flat"] == 1 and stats["refill/share"] == 0
    assert stats["refill/rounds"] == 2


def fixtures_positives(folder) -> dict[int, set[int]]:
    dataset = fixtures.parts(folder).dataset
    return {dataset.query_row[query]: set(rows) for query, rows in dataset.positives("train").items()}


def test_a_refilled_step_resumes_alike_and_compiles_nothing_more(folder, weights):
    parts = fixtures.parts(folder, rl__dynamic_sampling=3, **BY_ROW)
    compiled: list[str] = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        rows, kept = [], None
        for step in range(1, 5):
            if step == 4:
                kept = stage.host_state(), json.loads(json.dumps(stage.stream_state()))
                jax.monitoring.register_event_duration_secs_listener(listen)
            rows.append(stage.next_batch(state, step))
        jax.monitoring.unregister_event_duration_listener(listen)
        assert compiled == [] and rows[-1][1]["refill/rounds"] >= 1
        other = assembly.make_stage("rl", parts, None)
        other.resume(*kept)
        again, stats = other.next_batch(state, 4)
        jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(rows[-1][0]))
        assert stats["refill/share"] == rows[-1][1]["refill/share"]
        assert other.stream_state() == stage.stream_state()


def test_overlong_thoughts_are_masked_or_punished(folder, weights, plain):
    kept, plain_stats, _ = plain[0][0]
    cut = ~kept["emitted"] & (kept["lengths"] - kept["starts"] == 6)
    assert cut.any() and plain_stats["completion/cut"] == cut.mean()
    [(masked, _, _)], _ = play(fixtures.parts(folder, rl__overlong="mask"), weights, 1)
    np.testing.assert_array_equal(masked["mask"], np.where(cut[..., None], 0.0, kept["mask"]))
    np.testing.assert_array_equal(masked["rewards"], kept["rewards"])
    [(soft, stats, _)], _ = play(fixtures.parts(folder, rl__overlong="soft", rl__overlong_window=4), weights, 1)
    length = kept["lengths"] - kept["starts"] - 1  # of at most 5
    punished = -np.clip((length - 1) / 4, 0, 1)
    np.testing.assert_allclose(soft["rewards"], kept["rewards"] + punished, atol=1e-5)
    assert stats["reward/overlong"] == pytest.approx(punished.mean()) and punished.min() == -1
    np.testing.assert_array_equal(soft["mask"], kept["mask"])


def test_a_reward_that_is_not_finite_stops_by_name_or_drops_its_group(folder, weights):
    nan = {"rl__reward__name": "tests.user_rewards.nan_for_odd_rows"}
    with pytest.raises(UserError) as error:
        collected(fixtures.parts(folder, **nan), weights)
    said = str(error.value)
    assert said.startswith("the reward of query 'please ") and "is not a finite number at step 1" in said
    assert "config.rl.reward.on_nan=drop" in said
    [(batch, stats, metrics)], _ = play(fixtures.parts(folder, rl__reward__on_nan="drop", **nan), weights, 1)
    odd = batch["known"][:, 0] % 2 == 1
    [(kept, _, _)], _ = play(fixtures.parts(folder), weights, 1)  # the same thoughts
    dropped = odd & kept["emitted"].any(1)
    assert stats["reward/dropped"] == dropped.mean() > 0
    assert not batch["rewards"][dropped].any() and batch["rewards"][~odd].any()
    # Nothing of it is learnt: neither by the policy and its KL term nor by InfoNCE.
    for name in ("mask", "emitted"):
        assert not batch[name][dropped].any()
        np.testing.assert_array_equal(batch[name][~dropped], kept[name][~dropped])
    assert np.isfinite([stats["reward/mean"], stats["reward/retrieval"], metrics["loss"]]).all()
    [(_, stats)] = collected(fixtures.parts(folder, rl__reward__on_nan="drop", rl__dynamic_sampling=8, **nan), weights)
    assert stats["reward/dropped"] == 0 and stats["refill/missing"] == 0


def test_a_mesh_gives_the_rewards_and_losses_of_one_device(folder, weights, plain):
    (batch, stats, metrics), _ = plain[0]
    [(split, split_stats, split_metrics)], _ = play(fixtures.parts(folder, (1, 4, 2)), weights, 1)
    # Where rows lie is each device's affair.
    for name in batch.keys() - {"packs", "prompt_ends", "begins", "doc_packs", "doc_begins"}:
        if batch[name].dtype.kind == "f":
            np.testing.assert_allclose(split[name], batch[name], atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(split[name], batch[name], err_msg=name)
    for name in metrics:
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
    for name in ("reward/mean", "completion/length_mean", "index/reencoded", "index/sigma"):
        assert split_stats[name] == pytest.approx(stats[name], abs=1e-4)


# Both stages in the loop.


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_no_step_moves_data_unasked_nor_compiles_after_warm_up(folder, weights, name, mesh):
    parts = fixtures.parts(folder, mesh)
    compiled: list[str] = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with jax.set_mesh(parts.mesh):
            stage, state = start(parts, weights, name)
            shapes, warm = set(), 0
            for step in range(1, 13):
                heard = len(compiled)
                with jax.transfer_guard("disallow"):
                    batch, _ = stage.next_batch(state, step)
                    state, metrics = stage.update(state, batch)
                shape = tuple(x.shape for x in jax.tree.leaves(batch))
                if step > 6 and shape in shapes:
                    assert len(compiled) == heard, f"step {step} compiled anew"
                    warm += 1
                shapes.add(shape)
            assert np.isfinite(float(metrics["loss"]))
            assert compiled and warm >= 3 and len(shapes) <= 6
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_resumed_stage_samples_and_rewards_alike(parts, weights, plain):
    with jax.set_mesh(parts.mesh):
        stage, state = start(parts, weights)
        batch, _ = stage.next_batch(state, 1)
        state, _ = stage.update(state, batch)
        host, stream = stage.host_state(), json.loads(json.dumps(stage.stream_state()))
        other = assembly.make_stage("rl", parts, None)
        other.resume(host, stream)
        batch, stats = other.next_batch(state, 2)
        batch = jax.device_get(batch)
    want, want_stats, _ = plain[0][1]
    jax.tree.map(np.testing.assert_array_equal, batch, want)
    timeless = {k for k in stats if not k.startswith("time/")}
    assert timeless == {k for k in want_stats if not k.startswith("time/")}
    assert {k: stats[k] for k in timeless} == {k: want_stats[k] for k in timeless}
