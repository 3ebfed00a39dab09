"""The RL environment on synthetic drifting vectors: no model, `encode` looks the current vectors up."""

import dataclasses

import numpy as np
import pytest

from r3jax.errors import UserError
from r3jax.rl.environment import Environment, RefreshConfig, RewardConfig, Rollouts
from r3jax.rl.rewards import REWARDS as rewards_of
from r3jax.search.index import VersionedIndex

DOCUMENTS, QUERIES, GROUP, WIDTH = 400, 6, 4, 16
REWARD = {"name": "dcg_scaled", "k": 5, "min_tokens": 2, "max_tokens": 8}
REWARD["weights"] = {"retrieval": 1.0, "format": 0.1, "length": 0.1}
REFRESH = {"policy": "hybrid", "budget": 40, "over_retrieve": 60, "max_age": None, "share": 0.25}
REFRESH["rebuild_below"] = 0.0


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """Document vectors that drift at every step, and rollouts near their relevant documents."""

    def __init__(self, seed: int = 0, drift: float = 0.1):
        self.rng, self.drift = np.random.default_rng(seed), drift
        self.vectors = unit(self.rng.normal(size=(DOCUMENTS, WIDTH)))
        self.encoded = 0

    def move(self):
        self.vectors = unit(self.vectors + self.drift / 4 * self.rng.normal(size=self.vectors.shape))

    def encode(self, rows):
        self.encoded += len(rows)
        return self.vectors[rows]

    def rollouts(self, noise: float = 0.25) -> Rollouts:
        relevant = np.full((QUERIES, 3), -1, np.int32)
        relevant[:, 0] = self.rng.integers(0, DOCUMENTS, QUERIES)
        relevant[:2, 1] = (relevant[:2, 0] + 1) % DOCUMENTS
        relevant = np.repeat(relevant, GROUP, axis=0)
        near = self.vectors[relevant[:, 0]]
        return Rollouts(
            vectors=unit(near + noise * self.rng.normal(size=near.shape)),
            relevant=relevant,
            emitted=self.rng.random(len(relevant)) < 0.9,
            lengths=self.rng.integers(0, 9, len(relevant)),
        )


def environment(world: World, index: VersionedIndex | None = None, probes: int = 0, **changes) -> Environment:
    index = index or VersionedIndex.build(world.vectors, 0, "exact")
    reward = {k: changes.pop(k, v) for k, v in REWARD.items()}
    return Environment(index, RewardConfig(**reward), RefreshConfig(**REFRESH | changes), probes=probes, seed=0)


def play(env: Environment, world: World, steps: int, first: int = 1):
    """Rewards, exact rewards and statistics of each step."""
    for step in range(first, first + steps):
        world.move()
        rollouts = world.rollouts()
        rewards, stats = env.score(rollouts, world.encode, step)
        yield rewards, env.exact_rewards(rollouts, world.vectors), stats


def reference_reward(rollout: int, rollouts: Rollouts, vectors: np.ndarray) -> float:
    """DCG-scaled reward with format and length terms, of the whole corpus, as a plain loop."""
    scores = vectors.astype(np.float64) @ rollouts.vectors[rollout].astype(np.float64)
    relevant = [d for d in rollouts.relevant[rollout] if d >= 0]
    gain = sum(
        max(0.0, scores[d]) / np.log2(rank + 1)
        for rank, d in enumerate(np.argsort(-scores, kind="stable")[: REWARD["k"]], 1)
        if d in relevant
    )
    ideal = sum(1 / np.log2(rank + 1) for rank in range(1, len(relevant) + 1))
    emitted, length = rollouts.emitted[rollout], rollouts.lengths[rollout]
    return emitted * (gain / ideal) + 0.1 * emitted + 0.1 * min(1.0, length / 2, 2 - length / 8)


def test_the_full_policy_gives_the_rewards_of_the_whole_corpus():
    world = World(drift=1.0)  # far more than 10 candidates of a stale search can cover
    env = environment(world, policy="full", over_retrieve=10)
    for rewards, exact, stats in play(env, world, 3):
        np.testing.assert_allclose(rewards, exact, atol=1e-6)
        assert stats["index/share"] == 1.0 and stats["index/age_max"] == 0


@pytest.mark.parametrize("over_retrieve", [5, 60, 1000])
def test_rewards_equal_a_plain_loop_over_the_corpus(over_retrieve):
    """However few candidates are searched: positives that are not among them join the ranking."""
    world = World()
    env = environment(world, policy="full", over_retrieve=over_retrieve)
    world.move()
    rollouts = world.rollouts(noise=0.6)
    rewards, _ = env.score(rollouts, world.encode, 1)
    exact = env.exact_rewards(rollouts, world.vectors)
    want = [reference_reward(i, rollouts, world.vectors) for i in range(QUERIES * GROUP)]
    np.testing.assert_allclose(exact, want, atol=1e-6)
    np.testing.assert_allclose(rewards, want, atol=1e-6)


def test_log_rank_takes_the_rank_in_the_whole_corpus():
    world = World()
    env = environment(world, policy="full", over_retrieve=10, name="log_rank")
    rollouts = world.rollouts(noise=1.0)
    rewards, _ = env.score(rollouts, world.encode, 1)
    scores = rollouts.vectors @ world.vectors.T
    pairs = zip(scores, rollouts.relevant, strict=True)
    ranks = [1 + (row > max(row[d] for d in known if d >= 0)).sum() for row, known in pairs]
    assert max(ranks) > 50 and min(ranks) <= 10
    want = rollouts.emitted * (1 - np.log(ranks) / np.log(DOCUMENTS))
    terms = reward_terms(rollouts)
    np.testing.assert_allclose(rewards - terms, want, atol=1e-6)
    np.testing.assert_allclose(env.exact_rewards(rollouts, world.vectors), rewards, atol=1e-6)


def reward_terms(rollouts: Rollouts) -> np.ndarray:
    """The format and length terms, weighted."""
    length = np.minimum(1.0, np.minimum(rollouts.lengths / 2, 2 - rollouts.lengths / 8))
    return 0.1 * rollouts.emitted + 0.1 * length


def test_grades_reach_the_reward():
    world = World()
    rollouts = world.rollouts(noise=0.6)
    gains = np.where(rollouts.relevant >= 0, 1, 0)
    gains[:, 1] *= 5
    found = []
    for given in (None, np.ones_like(gains), gains):
        env = environment(world, policy="full", name="ndcg")
        rewards, _ = env.score(dataclasses.replace(rollouts, gains=given), world.encode, 1)
        found.append(rewards)
    np.testing.assert_array_equal(found[0], found[1])
    two = rollouts.relevant[:, 1] >= 0  # with one relevant document its grade cancels
    np.testing.assert_allclose(found[2][~two], found[0][~two], atol=1e-12)
    assert (found[2][two & rollouts.emitted] != found[0][two & rollouts.emitted]).any()


def test_positives_that_the_search_misses_join_the_ranking():
    """One candidate is retrieved, and it is not the positive that has moved onto the query since."""
    world = World()
    env = environment(world, k=1, over_retrieve=1)
    target, query = 7, world.vectors[300].copy()
    world.vectors[target] = query  # the index still has its old vector, far away
    rollouts = Rollouts(
        vectors=query[None], relevant=np.array([[target]]), emitted=np.array([True]), lengths=np.array([4])
    )
    rows, _ = env.index.search(rollouts.vectors, 1)
    assert rows[0, 0] == 300
    rewards, stats = env.score(rollouts, world.encode, 1)
    # Equal scores: the lower row, 7, ranks first. 1 for the ranking, .1 for format and length each.
    assert rewards[0] == pytest.approx(1.2, abs=1e-5)
    assert stats["reward/retrieval"] == pytest.approx(1.0, abs=1e-5)


def test_hybrid_stays_near_the_exact_reward_within_its_budget():
    errors = {}
    for policy in ("none", "hybrid", "boundary"):
        world = World(drift=0.15)
        env = environment(world, policy=policy)
        played = list(play(env, world, 12))
        errors[policy] = np.mean([np.abs(r - e).mean() for r, e, _ in played])
        for _, _, stats in played:
            assert stats["index/reencoded"] <= (0 if policy == "none" else REFRESH["budget"])
            assert stats["index/share"] == stats["index/reencoded"] / DOCUMENTS
    assert errors["none"] > 0.05
    assert errors["hybrid"] < 0.01 and errors["boundary"] < 0.01


def test_only_what_was_chosen_is_encoded():
    world = World()
    env = environment(world, probes=8)
    for _, _, stats in play(env, world, 3):
        assert world.encoded == stats["index/reencoded"] + 8
        world.encoded = 0


def test_hard_negatives_are_what_the_rollouts_ranked_best_and_should_not_have():
    world = World()
    env = environment(world, policy="full")
    for step in (1, 2):
        world.move()
        rollouts = world.rollouts()
        env.score(rollouts, world.encode, step)
        known = rollouts.relevant[::GROUP]
        found = env.hard_negatives(known, GROUP, 5)
        for i, scores in enumerate((rollouts.vectors @ world.vectors.T).reshape(QUERIES, GROUP, -1).max(1)):
            wrong = [d for d in np.argsort(-scores, kind="stable") if d not in known[i]]
            assert list(found[i]) == wrong[:5]


def test_where_there_are_too_few_wrong_documents_a_relevant_one_stands_in():
    """The loss leaves relevant documents out of the negatives."""
    world = World()
    env = environment(world, k=1, over_retrieve=1)
    rollouts = world.rollouts(noise=0.0)
    env.score(rollouts, world.encode, 1)
    known = rollouts.relevant[::GROUP]
    np.testing.assert_array_equal(env.hard_negatives(known, GROUP, 3), np.repeat(known[:, :1], 3, axis=1))


def test_a_budget_smaller_than_the_positives_is_kept():
    world = World()
    env = environment(world, budget=3)
    for _, _, stats in play(env, world, 3):
        assert stats["index/reencoded"] == 3


def test_the_batchs_positives_are_always_fresh():
    world = World()
    env = environment(world)
    world.move()
    rollouts = world.rollouts()
    env.score(rollouts, world.encode, 1)
    positives = np.unique(rollouts.relevant[rollouts.relevant >= 0])
    assert (env.index.versions[positives] == 1).all()
    np.testing.assert_array_equal(env.index.vectors[positives], world.vectors[positives])


@pytest.mark.parametrize("policy", ["neighbourhood", "boundary", "hybrid"])
def test_documents_older_than_max_age_are_refreshed(policy):
    world = World()
    env = environment(world, policy=policy, max_age=12)
    ages = [stats["index/age_max"] for _, _, stats in play(env, world, 30)]
    # They all start equally old, so the budget needs a round of 400 / 40 steps to spread them.
    assert max(ages[-8:]) <= 12 + DOCUMENTS / REFRESH["budget"]
    world, env = World(), environment(World(), policy="boundary")
    assert max(stats["index/age_max"] for _, _, stats in play(env, world, 30)) == 30


def reward_without(overdue, rollouts: Rollouts, vectors: np.ndarray, name: str) -> np.ndarray:
    """Rewards of a corpus in which the overdue documents are not, ranked whole by numpy."""
    kept = np.flatnonzero(~overdue)
    place = np.append(np.where(overdue, -1, np.cumsum(~overdue) - 1), -1)
    relevant = place[rollouts.relevant]
    scores = rollouts.vectors @ vectors[kept].T
    rows = np.argsort(-scores, axis=1, kind="stable")
    ranked, own = np.take_along_axis(scores, rows, 1), np.take_along_axis(scores, np.maximum(relevant, 0), 1)
    k, size = min(REWARD["k"], len(kept)), len(kept)
    reward = rewards_of[name](rows, ranked, relevant, own, k=k, size=size, emitted=rollouts.emitted)
    return reward + reward_terms(rollouts)


@pytest.mark.parametrize("name", ["dcg_scaled", "ndcg", "mrr", "margin"])
@pytest.mark.parametrize("policy", ["round_robin", "neighbourhood", "boundary", "hybrid"])
@pytest.mark.parametrize("carry", [False, True])
def test_what_is_beyond_max_age_never_ranks(policy, name, carry):
    """Rewards are those of a corpus without it, and so are hard negatives, whatever the budget."""
    world, seen = World(seed=3), 0
    budget = {"dcg_scaled": 4, "ndcg": 25, "mrr": 90, "margin": 4}[name]
    env = environment(world, policy=policy, max_age=3, budget=budget, over_retrieve=DOCUMENTS, name=name, carry=carry)
    for step in range(1, 14):
        world.move()
        rollouts = world.rollouts(noise=0.5)
        rewards, stats = env.score(rollouts, world.encode, step)
        overdue = step - env.index.versions > 3
        want = reward_without(overdue, rollouts, env.index.vectors, name)
        np.testing.assert_allclose(rewards, want, atol=1e-6)
        assert stats["index/overdue"] == pytest.approx(overdue.mean())  # all documents are candidates here
        wrong = env.hard_negatives(rollouts.relevant[::GROUP], GROUP, 3)
        stand_in = rollouts.relevant[::GROUP][:, :1]
        assert (~overdue[wrong] | (wrong == stand_in)).all()
        seen += overdue.any()
    assert seen > 3


def test_log_rank_beyond_max_age_counts_what_is_left():
    world = World()
    env = environment(world, policy="round_robin", max_age=2, budget=30, over_retrieve=20, name="log_rank")
    for step in range(1, 8):
        world.move()
        rollouts = world.rollouts(noise=1.0)
        rewards, _ = env.score(rollouts, world.encode, step)
        overdue = step - env.index.versions > 2
        scores = np.where(overdue, -np.inf, rollouts.vectors @ env.index.vectors.T)
        for i, known in enumerate(rollouts.relevant):
            left = [d for d in known if d >= 0 and not overdue[d]]
            rank = 1 + (scores[i] > max(scores[i, left])).sum() if left else DOCUMENTS
            want = rollouts.emitted[i] * (1 - np.log(rank) / np.log(DOCUMENTS))
            assert rewards[i] - reward_terms(rollouts)[i] == pytest.approx(want, abs=1e-6)
    assert overdue.any()


@pytest.mark.parametrize("policy", ["neighbourhood", "boundary", "hybrid"])
def test_each_rollouts_best_mistakes_are_fresh_where_that_is_wanted(policy):
    world = World()
    env = environment(world, policy=policy, fresh_negatives=2, budget=80)
    for step in (1, 2, 3):
        world.move()
        rollouts = world.rollouts()
        positives = np.unique(rollouts.relevant[rollouts.relevant >= 0])
        stored = env.index.vectors.copy()
        stored[positives] = world.vectors[positives]  # they are re-encoded first
        _, stats = env.score(rollouts, world.encode, step)
        for scores, relevant in zip(rollouts.vectors @ stored.T, rollouts.relevant, strict=True):
            wrong = [d for d in np.argsort(-scores, kind="stable") if d not in relevant][:2]
            assert (env.index.versions[wrong] == step).all()
        assert stats["index/reencoded"] <= 80


def test_a_probe_tells_the_reward_error_and_the_stale_recall():
    world = World(drift=0.4)
    env = environment(world, budget=30)
    for step in (1, 2, 3):
        world.move()
        rollouts = world.rollouts()
        stale = np.argsort(-(rollouts.vectors @ env.index.vectors.T), axis=1, kind="stable")[:, : REWARD["k"]]
        truth = np.argsort(-(rollouts.vectors @ world.vectors.T), axis=1, kind="stable")[:, : REWARD["k"]]
        rewards, _ = env.score(rollouts, world.encode, step)
        found = env.probe(rollouts, rewards, world.vectors)
        assert found["probe/reward_error"] == np.abs(env.exact_rewards(rollouts, world.vectors) - rewards).mean()
        recall = np.mean([len(set(a) & set(b)) / REWARD["k"] for a, b in zip(stale, truth, strict=True)])
        assert found["probe/stale_recall"] == pytest.approx(recall) and recall < 1


def test_rounds_of_a_step_leave_its_stale_recall_alone():
    """It is of the index before the step; a later round finds what the rounds before it have made fresh."""
    world = World(drift=0.4)
    env = environment(world)
    world.move()
    found = []
    for step, rounds in ((1, 2), (1, 1), (2, 1)):
        rollouts = world.rollouts()
        rewards, _ = env.score(rollouts, world.encode, step, rounds=rounds)
        found.append(env.probe(rollouts, rewards, world.vectors)["probe/stale_recall"])
    assert found[0] == found[1] != found[2]


def test_the_drift_estimate_learns_how_far_scores_move():
    slow, fast = World(drift=0.05), World(drift=0.3)
    sigmas = []
    for world in (slow, fast):
        env = environment(world)
        before = env.drift.sigma
        *_, (_, _, stats) = play(env, world, 6)
        assert stats["index/sigma"] == env.drift.sigma != before and env.drift.updates == 6
        # A unit vector's score moves by about drift / 4 per step in each direction, candidates a little less.
        assert 0.4 * world.drift / 4 < env.drift.sigma < 1.5 * world.drift / 4
        sigmas.append(env.drift.sigma)
    assert sigmas[1] > 3 * sigmas[0]


def test_probe_drift_is_how_far_stored_vectors_are_from_current_ones():
    world = World()
    env = environment(world, probes=32)
    for _, _, stats in play(env, world, 4):
        stored, current = env.index.vectors[env.probes], world.vectors[env.probes]
        assert stats["index/probe_drift"] == pytest.approx(1 - (stored * current).sum(1).mean(), abs=1e-6)
    assert stats["index/probe_drift"] > 0.001
    assert len(np.unique(env.probes)) == 32


@pytest.mark.parametrize("kind", ["exact", "scann", "tree"])
def test_a_restored_environment_goes_on_alike(kind):
    world = World()
    vectors = world.vectors
    built = {"kind": "exact" if kind == "exact" else "scann"}
    if kind == "tree":
        built |= {"tree_above": 256, "leaves": 20}
    env = environment(world, VersionedIndex.build(vectors, 0, **built), probes=8)
    list(play(env, world, 3))
    state = env.state()
    later = [(r, s) for r, _, s in play(env, world, 3, first=4)]
    other = World()
    list(play(environment(other), other, 3))  # brings the world where it was
    twin = environment(other, VersionedIndex.build(np.ones((DOCUMENTS, 1)), 0, "exact"), probes=8)
    twin.restore(state)
    for (rewards, stats), (again, _, stats_again) in zip(later, play(twin, other, 3, first=4), strict=True):
        np.testing.assert_array_equal(rewards, again)
        assert {k: v for k, v in stats.items() if "time" not in k} == {
            k: v for k, v in stats_again.items() if "time" not in k
        }


def test_state_holds_arrays_that_do_not_change_with_the_environment():
    world = World()
    env = environment(world)
    list(play(env, world, 2))
    state = env.state()
    kept = {k: v.copy() for k, v in state["index"].items()}
    list(play(env, world, 2, first=3))
    for name, value in kept.items():
        assert isinstance(value, np.ndarray) and value.size
        np.testing.assert_array_equal(state["index"][name], value)


def test_low_recall_rebuilds_a_tree():
    world = World(drift=0.6)
    index = VersionedIndex.build(world.vectors, 0, "scann", tree_above=256, leaves=100)
    env = environment(world, index, policy="full", rebuild_below=0.999)
    rebuilt, calls = [], []
    index.rebuild, train = lambda: (calls.append(1), train())[1], index.rebuild
    for _, _, stats in play(env, world, 6):
        assert (stats["index/probe_recall"] < 0.999) == (stats["index/rebuilds"] > len(rebuilt))
        rebuilt = [1] * stats["index/rebuilds"]
    assert rebuilt and len(calls) == len(rebuilt)
    assert int(env.state()["rebuilds"]) == len(rebuilt)


def test_high_recall_rebuilds_nothing():
    world = World()
    env = environment(world, rebuild_below=0.9)
    assert all(s["index/rebuilds"] == 0 and s["index/probe_recall"] == 1 for _, _, s in play(env, world, 3))


def test_rounds_of_a_step_share_its_budget():
    world = World()
    env = environment(world, policy="boundary")
    world.move()
    spent = []
    for rounds in (3, 2, 1):
        _, stats = env.score(world.rollouts(), world.encode, 1, rounds=rounds)
        spent.append(stats["index/reencoded"])
    assert spent[0] == REFRESH["budget"] // 3 < spent[1] < spent[2] <= REFRESH["budget"]
    assert world.encoded == spent[2] == (env.index.versions == 1).sum()  # nothing twice


def test_a_users_reward_may_not_be_finite():
    world = World()
    env = environment(world, name="tests.user_rewards.nan_for_row_0")
    rollouts = world.rollouts()
    rollouts.relevant[4:8, 0], rollouts.emitted[5] = 0, False
    rewards, _ = env.score(rollouts, world.encode, 1)
    assert np.isnan(rewards[[4, 6, 7]]).all() and np.isfinite(np.delete(rewards, [4, 6, 7])).all()


def test_a_mix_is_the_weighted_sum_of_its_parts():
    found = {}
    for name in ("ndcg", "log_rank", "ndcg:0.5,log_rank:0.25,tests.user_rewards.closeness:2"):
        world = World()
        env = environment(world, name=name)
        rollouts = world.rollouts()
        env.score(rollouts, world.encode, 1)
        found[name] = env.terms
    mix = found.pop(name)
    np.testing.assert_allclose(mix["ndcg"], found["ndcg"]["retrieval"])
    np.testing.assert_allclose(mix["log_rank"], found["log_rank"]["retrieval"])
    np.testing.assert_allclose(mix["retrieval"], 0.5 * mix["ndcg"] + 0.25 * mix["log_rank"] + 2 * mix["closeness"])
    assert mix["closeness"][~rollouts.emitted].max() == 0 < mix["closeness"].max()
    assert set(found["ndcg"]) == {"retrieval", "format", "length"}


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("broken", "failed: ZeroDivisionError: division by zero (user_rewards.py:"),
        ("one_number", "must return one number for each of the 24 rollouts, not"),
    ],
)
def test_a_users_reward_that_fails_is_named(name, sentence):
    world = World()
    with pytest.raises(UserError) as error:
        environment(world, name=f"tests.user_rewards.{name}").score(world.rollouts(), world.encode, 1)
    assert str(error.value).startswith(f"config.rl.reward.name: tests.user_rewards.{name} ") and sentence in str(
        error.value
    )
