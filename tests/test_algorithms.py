"""Advantages, policy losses and KL terms against torch's autograd, and the properties a trainer relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.rl import algorithms
from r3jax.rl.algorithms import (
    KLS,
    NORMALISERS,
    RATIOS,
    advantages,
    group_spread,
    importance,
    kl,
    masked_mean,
    policy_loss,
)

R, T, V = 8, 6, 5
LIMIT = 7


@pytest.fixture(scope="module")
def batch():
    """Log-probabilities near the old ones (so that both bounds clip some), one row without any token."""
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, -0.1, (R, T)).astype(np.float32)
    logp = (old + rng.normal(0, 0.3, (R, T))).astype(np.float32)
    mask = (np.arange(T) < rng.integers(1, T + 1, (R, 1))).astype(np.float32)
    mask[3] = 0
    return logp, old, rng.normal(size=R).astype(np.float32), mask


def torch_mean(values, mask, normalise):
    total = 0.0
    for row, row_mask in zip(values, mask, strict=True):
        kept = row[row_mask > 0]
        total = total + (kept.mean() if normalise == "sequence" and len(kept) else kept.sum())
    counts = {"token": mask.sum(), "sequence": (mask.sum(1) > 0).sum(), "dr_grpo": len(mask) * LIMIT}
    return total / counts[normalise]


def torch_policy_loss(logp, old, advantage, mask, low, high, normalise, ratio):
    gap = (logp - old) * mask
    if ratio == "sequence":
        gap = (gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand(-1, T)
    ratios, gain = gap.exp(), advantage[:, None]
    surrogate = -torch.min(ratios * gain, ratios.clamp(1 - low, 1 + high) * gain)
    return torch_mean(surrogate, mask, normalise)


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_policy_loss_equals_torch(batch, normalise, ratio):
    logp, old, advantage, mask = batch

    def loss(logp):
        return policy_loss(
            logp,
            old,
            advantage,
            mask,
            clip_low=0.1,
            clip_high=0.15,
            normalise=normalise,
            ratio=ratio,
            max_tokens=LIMIT,
        )

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp))
    theirs = torch.tensor(logp, requires_grad=True)
    arguments = [torch.tensor(x) for x in (old, advantage, mask)]
    want = torch_policy_loss(theirs, *arguments, 0.1, 0.15, normalise, ratio)
    want.backward()
    assert float(value) == pytest.approx(want.item(), rel=1e-4)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-7)
    assert theirs.grad.abs().max() > 0.01
    if ratio == "token":
        assert 0 < stats["clip_low"] < 1 and 0 < stats["clip_high"] < 1


def test_stats_by_hand():
    old = jnp.zeros((2, 3))
    logp = jnp.log(jnp.array([[0.5, 1.0, 1.5], [0.5, 1.5, 9.0]]))
    mask = jnp.array([[1.0, 1, 1], [1, 1, 0]])
    _, stats = policy_loss(logp, old, jnp.array([1.0, -1.0]), mask)
    assert float(stats["clip_high"]) == pytest.approx(1 / 5)  # 1.5 with a gain
    assert float(stats["clip_low"]) == pytest.approx(1 / 5)  # .5 with a loss
    assert float(stats["ratio"]) == pytest.approx(1.0)
    assert float(stats["logp_gap"]) == pytest.approx((2 * np.log(2) + 2 * np.log(1.5)) / 5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_reinforce(batch, ratio):
    _, old, advantage, mask = batch

    def loss(logp):
        return policy_loss(logp, old, advantage, mask, ratio=ratio, normalise="sequence")

    (_, stats), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(old))
    assert float(stats["ratio"]) == 1.0
    assert float(stats["clip_low"]) == float(stats["clip_high"]) == float(stats["logp_gap"]) == 0.0
    tokens = np.maximum(mask.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(gradient, -advantage[:, None] * mask / tokens / (mask.sum(1) > 0).sum(), rtol=1e-5)


def test_importance_by_hand():
    sampler = np.log([[0.5, 0.5, 0.1, 0.2]]).astype(np.float32)
    old = np.log([[0.5, 0.25, 0.9, np.nan]]).astype(np.float32)
    weights, stats = importance(old, sampler, np.array([[1.0, 1, 1, 0]]), cap=2.0)
    np.testing.assert_allclose(weights, [[1, 0.5, 2, 1]], rtol=1e-6)
    assert float(stats["importance"]) == pytest.approx(3.5 / 3) and float(stats["importance_cut"]) == pytest.approx(
        1 / 3
    )
    assert float(stats["logp_gap"]) == pytest.approx((np.log(2) + np.log(9)) / 3)
    with pytest.raises(ValueError, match="cap"):
        importance(old, sampler, np.ones((1, 4)), cap=0.0)


def test_importance_makes_up_for_another_sampler():
    """Exact expectation over a small categorical: the gradient of E_policy[A], though another policy sampled."""
    rng = np.random.default_rng(4)
    logits, advantage = rng.normal(size=V).astype(np.float32), rng.normal(size=V).astype(np.float32)
    sampler = jax.nn.log_softmax(jnp.asarray(logits + rng.normal(size=V).astype(np.float32)))

    def each_token(x, cap):
        logp = jax.nn.log_softmax(x)[:, None]
        mask = jnp.ones((V, 1))
        weights, _ = importance(jax.lax.stop_gradient(logp), sampler[:, None], mask, cap)
        # One row at a time, for the loss is a mean.
        rows = [
            policy_loss(
                logp[i : i + 1],
                jax.lax.stop_gradient(logp)[i : i + 1],
                advantage[i : i + 1],
                mask[:1],
                weights=weights[i : i + 1],
            )[0]
            for i in range(V)
        ]
        return jnp.stack(rows)

    def expected(cap):
        return jnp.exp(sampler) @ jax.jacrev(lambda x: each_token(x, cap))(jnp.asarray(logits))

    want = jax.grad(lambda x: -(jax.nn.softmax(x) * advantage).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(expected(100.0), want, rtol=1e-3, atol=1e-6)
    assert np.abs(np.asarray(expected(1.0) - want)).max() > 0.01  # truncated: less variance, some bias


def test_zero_advantage_gives_zero_gradient(batch):
    logp, old, advantage, mask = batch
    advantage = advantage.copy()
    advantage[:4] = 0
    gradient = jax.grad(lambda x: policy_loss(x, old, advantage, mask)[0])(jnp.asarray(logp))
    assert not np.asarray(gradient)[:4].any() and np.asarray(gradient)[4:].any()


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_garbage_never_spreads(batch, normalise, ratio):
    logp, old, advantage, mask = batch
    options = {"normalise": normalise, "ratio": ratio, "max_tokens": LIMIT}
    dirty = np.where(mask > 0, logp, -np.inf)
    dirty_old = np.where(mask > 0, old, np.nan)

    def loss(logp, old, mask):
        penalty = masked_mean(kl(logp, old, "k3", mask), mask, normalise=normalise, max_tokens=LIMIT)
        return policy_loss(logp, old, advantage, mask, **options)[0] + penalty

    clean = jax.value_and_grad(loss)(jnp.asarray(logp), old, mask)
    got = jax.value_and_grad(loss)(jnp.asarray(dirty), dirty_old, mask)
    assert float(got[0]) == float(clean[0])
    np.testing.assert_array_equal(np.asarray(got[1])[mask > 0], np.asarray(clean[1])[mask > 0])
    assert not np.asarray(got[1])[mask == 0].any()
    nothing = jax.value_and_grad(loss)(jnp.asarray(logp), old, np.zeros_like(mask))
    assert float(nothing[0]) == 0.0 and not np.asarray(nothing[1]).any()


@pytest.mark.parametrize("kind", algorithms.ADVANTAGES)
def test_advantages_equal_torch(kind):
    rewards = np.random.default_rng(1).random((5, 4)).astype(np.float32)
    ours = advantages(jnp.asarray(rewards), kind, eps=1e-4)
    r = torch.tensor(rewards)
    others = torch.stack([r[:, [j for j in range(4) if j != i]].mean(1) for i in range(4)], dim=1)
    mean = r.mean(1, keepdim=True)
    want = {"grpo": (r - mean) / (r.std(1, keepdim=True) + 1e-4), "dr_grpo": r - mean, "rloo": r - others}[kind]
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", algorithms.ADVANTAGES)
def test_equal_rewards_give_exactly_zero(kind):
    rewards = jnp.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7], [0.1, 0.2, 0.3]])  # .1 + .1 + .1 is not 3 * .1
    got = np.asarray(advantages(rewards, kind))
    assert not got[:2].any() and got[2].any()
    np.testing.assert_allclose(group_spread(rewards), [0, 0, 0.2], atol=1e-7)
    assert not np.asarray(advantages(rewards[:, :1], kind)).any()


def test_kl_values_equal_torch(batch):
    logp, ref, _, mask = batch
    gap = torch.tensor(logp).double() - torch.tensor(ref).double()
    want = {"none": 0 * gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}
    for kind in KLS:
        got = np.asarray(kl(logp, ref, kind, mask))
        np.testing.assert_allclose(got, want[kind] * torch.tensor(mask), rtol=1e-4, atol=1e-6)
    assert (np.asarray(kl(logp, ref, "k3", mask)) >= 0).all()


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_expected_kl_gradient_is_that_of_the_true_kl(kind):
    """Exact expectation over a small categorical, against torch's gradient of KL(policy || reference)."""
    rng = np.random.default_rng(2)
    logits, ref_logits = (rng.normal(size=V).astype(np.float32) for _ in range(2))
    ref_logp = jax.nn.log_softmax(jnp.asarray(ref_logits))

    def each_token(logits):
        logp = jax.nn.log_softmax(logits)
        return kl(logp[:, None], ref_logp[:, None], kind, jnp.ones((V, 1)))[:, 0]

    per_token = jax.jacrev(each_token)(jnp.asarray(logits))  # [V, V]: the gradient if token v was sampled
    expected = jax.nn.softmax(jnp.asarray(logits)) @ per_token
    theirs = torch.tensor(logits, requires_grad=True)
    logp = torch.log_softmax(theirs, 0)
    (logp.exp() * (logp - torch.log_softmax(torch.tensor(ref_logits), 0))).sum().backward()
    np.testing.assert_allclose(expected, theirs.grad, rtol=1e-4, atol=1e-7)
    assert theirs.grad.abs().max() > 0.05


def test_the_expected_k3_value_is_the_true_kl():
    rng = np.random.default_rng(3)
    logp, ref = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=V).astype(np.float32))) for _ in range(2))
    value = (jnp.exp(logp) * kl(logp[:, None], ref[:, None], "k3", jnp.ones((V, 1)))[:, 0]).sum()
    assert float(value) == pytest.approx(float((jnp.exp(logp) * (logp - ref)).sum()), rel=1e-4)


def test_a_sharded_batch_gives_the_same(batch):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))

    def both(logp, old, advantage, mask):
        def loss(logp):
            options = {"normalise": "sequence", "ratio": "sequence"}
            penalty = masked_mean(kl(logp, old, "k3", mask), mask, normalise="sequence")
            return policy_loss(logp, old, advantage, mask, **options)[0] + penalty

        return jax.value_and_grad(loss)(logp)

    want = both(*(jnp.asarray(x) for x in batch))
    with jax.set_mesh(mesh):
        rows = ("data", "fsdp")
        place = [jax.device_put(x, NamedSharding(mesh, P(rows, *[None] * (x.ndim - 1)))) for x in batch]
        got = jax.jit(both)(*place)
        grouped = jax.device_put(batch[0], NamedSharding(mesh, P(rows, None)))
        spread = jax.jit(lambda x: advantages(x, "rloo"))(grouped)
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(spread, advantages(jnp.asarray(batch[0]), "rloo"), rtol=1e-5, atol=1e-6)


def test_unknown_names_are_refused(batch):
    logp, old, advantage, mask = batch
    for message, call in [
        ("kind", lambda: advantages(jnp.ones((1, 2)), "ppo")),
        ("kind", lambda: kl(logp, old, "k1", mask)),
        ("ratio", lambda: policy_loss(logp, old, advantage, mask, ratio="word")),
        ("normalise", lambda: policy_loss(logp, old, advantage, mask, normalise="mean")),
        ("max_tokens", lambda: policy_loss(logp, old, advantage, mask, normalise="dr_grpo")),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
