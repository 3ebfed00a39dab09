"""Rewards: small cases by hand, a plain-loop reference on random ones, and the inputs that are refused."""

import math

import numpy as np
import pytest

from r3jax.rl.rewards import (
    REWARDS,
    combine,
    dcg_scaled,
    format_term,
    length_term,
    log_rank,
    margin,
    mrr,
    ndcg,
    overlong_term,
)

# Two rollouts of one query each; document 7 is relevant to the first, 2 and 9 to the second.
CASE = {
    "rows": np.array([[5, 7, 1, 0], [2, 3, 9, 4]]),
    "scores": np.array([[0.9, 0.8, 0.4, 0.1], [0.6, 0.5, -0.2, -0.3]]),
    "relevant": np.array([[7, -1], [2, 9]]),
    "positive_scores": np.array([[0.8, np.nan], [0.6, -0.2]]),
}


def call(reward, k=3, size=100, **changes):
    return reward(**(CASE | changes), k=k, size=size, **({"ranks": [2, 1]} if reward is log_rank else {}))


def test_dcg_scaled_by_hand():
    ideal = 1 + 1 / math.log2(3)
    np.testing.assert_allclose(call(dcg_scaled), [0.8 / math.log2(3), (0.6 + 0.0) / ideal])
    np.testing.assert_allclose(call(dcg_scaled, k=1), [0.0, 0.6])  # one place, so the ideal has one document


def test_grades_weigh_what_is_found_and_what_could_be():
    gains = np.array([[2, 0], [1, 3]])
    ideal = 3 + 1 / math.log2(3)
    np.testing.assert_allclose(call(ndcg, gains=gains), [1 / math.log2(3), (1 + 3 * 0.5) / ideal])
    np.testing.assert_allclose(call(dcg_scaled, gains=gains), [0.8 / math.log2(3), 0.6 / ideal])
    np.testing.assert_allclose(call(dcg_scaled, k=1, gains=gains), [0.0, 0.6 / 3])
    for reward in (mrr, log_rank, margin):
        np.testing.assert_array_equal(call(reward, gains=gains), call(reward))
    with pytest.raises(ValueError, match="gains"):
        call(ndcg, gains=gains[:, :1])
    with pytest.raises(ValueError, match="gains"):
        call(ndcg, gains=-gains)


def test_the_other_rewards_by_hand():
    ideal = 1 + 1 / math.log2(3)
    np.testing.assert_allclose(call(ndcg), [1 / math.log2(3), (1 + 0.5) / ideal])
    np.testing.assert_allclose(call(mrr), [0.5, 1.0])
    np.testing.assert_allclose(call(mrr, k=1), [0.0, 1.0])
    np.testing.assert_allclose(call(log_rank), [1 - math.log(2) / math.log(100), 1.0])
    np.testing.assert_allclose(call(margin), [0.8 - 0.9, 0.6 - 0.5])
    assert log_rank(**CASE, k=3, size=100, ranks=[100, 1])[0] == pytest.approx(0.0, abs=1e-12)


def test_margin_looks_beyond_k_and_at_positives_outside_the_candidates():
    changes = {"relevant": np.array([[7, -1], [50, -1]]), "positive_scores": np.array([[0.8, 0], [-0.5, 0]])}
    np.testing.assert_allclose(call(margin, k=1, **changes), [0.8 - 0.9, -0.5 - 0.6])


def test_where_there_is_no_document_there_is_no_negative():
    """Documents beyond their maximum age leave such places behind, as -1 of score -1."""
    changes = {"relevant": np.array([[7, -1], [2, -1]]), "positive_scores": np.array([[0.8, 0], [0.6, 0]])}
    changes["rows"] = np.array([[7, -1, -1, -1], [2, 3, -1, -1]])
    changes["scores"] = np.array([[0.8, -1, -1, -1], [0.6, 0.5, -1, -1]])
    np.testing.assert_allclose(call(margin, **changes), [0.0, 0.6 - 0.5])


def reference(name, rows, scores, relevant, positive_scores, k):
    wanted = {d for d in relevant if d >= 0}
    if not wanted:
        return 0.0
    place = {d: i + 1 for i, d in enumerate(rows[:k])}
    score = dict(zip(rows, scores, strict=True))
    if name == "mrr":
        return max((1 / place[d] for d in wanted if d in place), default=0.0)
    if name == "margin":
        best = max(s for d, s in zip(relevant, positive_scores, strict=True) if d >= 0)
        return best - max(score[d] for d in rows if d not in wanted)
    closeness = {d: max(score[d], 0) if name == "dcg_scaled" else 1.0 for d in rows}
    found = sum(closeness[d] / math.log2(place[d] + 1) for d in wanted if d in place)
    return found / sum(1 / math.log2(i + 2) for i in range(min(len(wanted), k)))


@pytest.mark.parametrize("name", ["dcg_scaled", "ndcg", "mrr", "margin"])
def test_rewards_equal_a_plain_loop(name):
    rng = np.random.default_rng(0)
    rollouts, candidates, positives, documents, k = 60, 12, 4, 40, 5
    rows = np.argsort(rng.random((rollouts, documents)), axis=1)
    vectors = -np.sort(-rng.uniform(-1, 1, (rollouts, documents)), axis=1)
    relevant = np.argsort(rng.random((rollouts, documents)), axis=1)[:, :positives]
    places = np.take_along_axis(np.argsort(rows, axis=1), relevant, axis=1)
    positive_scores = np.take_along_axis(vectors, places, axis=1)
    relevant[rng.random(relevant.shape) < 0.4] = -1
    rows, vectors = rows[:, :candidates], vectors[:, :candidates]
    got = REWARDS[name](rows, vectors, relevant, positive_scores, k=k, size=documents)
    inputs = zip(rows, vectors, relevant, positive_scores, strict=True)
    want = [reference(name, *(x.tolist() for x in row), k) for row in inputs]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert got.std() > 0.05 and (relevant == -1).all(axis=1).any()


@pytest.mark.parametrize("name", REWARDS)
def test_no_token_no_reward_whatever_stands_in_the_arrays(name):
    scores = CASE["scores"].copy()
    scores[1] = np.nan
    extra = {"ranks": [2, 0]} if name == "log_rank" else {}
    got = REWARDS[name](**(CASE | {"scores": scores}), k=3, size=100, emitted=np.array([True, False]), **extra)
    assert got[1] == 0.0 and got[0] == call(REWARDS[name])[0]


@pytest.mark.parametrize("name", REWARDS)
def test_non_finite_numbers_name_the_rollout(name):
    for field in ("scores", "positive_scores"):
        for value in (np.nan, np.inf):
            array = CASE[field].copy()
            array[1, 0] = value
            with pytest.raises(ValueError, match=f"^{field} .*rollout 1"):
                call(REWARDS[name], **{field: array})


def test_mistakes_name_the_argument():
    for changes, message in [
        ({"k": 5}, "k must"),
        ({"k": 0}, "k must"),
        ({"scores": CASE["scores"][:, :2]}, "scores"),
        ({"relevant": CASE["relevant"][:1]}, "relevant"),
        ({"emitted": [True]}, "emitted"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(dcg_scaled, **changes)
    with pytest.raises(ValueError, match="ranks are needed"):
        log_rank(**CASE, k=3, size=100)
    with pytest.raises(ValueError, match="rollout 1 has 101"):
        log_rank(**CASE, k=3, size=100, ranks=[1, 101])
    with pytest.raises(ValueError, match="size"):
        log_rank(**CASE, k=3, size=1, ranks=[1, 1])


def test_format_and_length_terms():
    assert format_term([True, False]).tolist() == [1.0, 0.0]
    got = length_term([0, 2, 4, 10, 15, 20, 99], minimum=4, maximum=10)
    np.testing.assert_allclose(got, [0, 0.5, 1, 1, 0.5, 0, 0])
    assert length_term([0, 3], minimum=0, maximum=3).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="minimum and maximum"):
        length_term([1], minimum=5, maximum=4)
    with pytest.raises(ValueError, match="lengths"):
        length_term([-1], minimum=1, maximum=4)


def test_the_soft_punishment_of_long_thoughts():
    got = overlong_term([0, 15, 16, 18, 20], limit=20, window=5)
    np.testing.assert_allclose(got, [0, 0, -0.2, -0.6, -1])
    for window in (0, 21):
        with pytest.raises(ValueError, match="window"):
            overlong_term([1], limit=20, window=window)


def test_combine():
    terms = {"retrieval": np.array([0.5, 1.0]), "format": np.array([1.0, 0.0])}
    np.testing.assert_allclose(combine(terms, {"retrieval": 1.0, "format": 0.5}), [1.0, 1.0])
    with pytest.raises(ValueError, match="length"):
        combine(terms, {"retrieval": 1.0, "format": 0.5, "length": 0.2})
    with pytest.raises(ValueError, match="format"):
        combine(terms, {"retrieval": 1.0})
    with pytest.raises(ValueError, match="rollout 1"):
        combine({"retrieval": np.array([0.0, np.nan])}, {"retrieval": 1.0})
