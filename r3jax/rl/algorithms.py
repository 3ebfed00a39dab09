"""Policy-gradient arithmetic as pure JAX functions over arrays and masks, apart from any loop.

Departures from GRPO as published (Shao et al., DeepSeekMath, arXiv 2402.03300):
- A group whose rewards are all equal gets advantages of exactly 0; no epsilon-sized noise is divided by
  itself.
- The loss's normaliser is an argument. The default is DAPO's mean over all tokens (arXiv 2503.14476); GRPO's
  own mean over sequences of their token means is `normalise="sequence"`, Dr. GRPO's constant length (arXiv
  2503.20783) is `normalise="dr_grpo"`.
- The two clip bounds differ (DAPO's clip-higher), and the ratio may be the sequence's (GSPO, arXiv
  2507.18071).
- Advantages may skip the standard deviation (Dr. GRPO) or leave the sample itself out of its baseline (RLOO,
  arXiv 2402.14740).
- The KL term has the gradient of KL(policy || reference). k3 differentiated directly has that of the opposite
  direction, KL(reference || policy), and k1's is zero in expectation. So "k3" here is k3's value (never
  negative, low variance) with k2's gradient, (log p - log q) * grad log p, which is unbiased where the
  samples are the policy's.
- One inner step per batch is the usual case: the ratio is then 1 and the clip idle, yet the gradient is the
  same. With several, the ratio is to the trainer's own log-probabilities before the first of them, and a
  truncated weight corrects for the sampler's being a little different (`importance`).

Axis legend: B prompts, G samples per prompt (group), R = B * G rollouts, T tokens. Masks are 1 at sampled
tokens, the terminal token included; a token that was forced (length limit) has mask 0. Everything is
elementwise or a sum over an axis, so R may be sharded over any mesh axes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ADVANTAGES = ("grpo", "dr_grpo", "rloo")
NORMALISERS = ("token", "sequence", "dr_grpo")
RATIOS = ("token", "sequence")
KLS = ("none", "k2", "k3")
OVERLONG = ("keep", "mask", "soft")  # what becomes of completions that reach the limit


def group_spread(rewards: Float[Array, "B G"]) -> Float[Array, " B"]:
    """Largest minus smallest reward of each group; 0 marks a group without a policy gradient."""
    return rewards.max(axis=1) - rewards.min(axis=1)


def advantages(rewards: Float[Array, "B G"], kind: str = "grpo", eps: float = 1e-6) -> Float[Array, "B G"]:
    """How much better each sample is than its group.

    "grpo": (r - mean) / (std + eps), std with G - 1; "dr_grpo": r - mean; "rloo": r minus the mean of the
    others. A group of equal rewards, and a group of one, gets exactly 0.
    """
    _one_of("kind", kind, ADVANTAGES)
    size = rewards.shape[1]
    if size == 1:
        return jnp.zeros_like(rewards)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if kind == "grpo":
        variance = (centred**2).sum(axis=1, keepdims=True) / (size - 1)
        centred = centred / (jnp.sqrt(variance) + eps)
    elif kind == "rloo":
        centred = centred * (size / (size - 1))
    # Rounding of the mean leaves 1e-8 in equal groups, which the division above would blow up.
    return jnp.where(group_spread(rewards)[:, None] > 0, centred, 0.0)


def masked_mean(
    values: Float[Array, "R T"],
    mask: Float[Array, "R T"],
    *,
    normalise: str = "token",
    max_tokens: int | None = None,
) -> Float[Array, ""]:
    """The batch's mean of `values` by one of NORMALISERS; where the mask is 0 anything may stand, NaN too.

    "token": sum over all tokens / tokens. "sequence": mean over sequences of each one's token mean.
    "dr_grpo": sum over all tokens / (rows * max_tokens). A sequence without a token in the mask counts for
    nothing, except under "dr_grpo", whose constant counts every row.
    """
    _one_of("normalise", normalise, NORMALISERS)
    values = jnp.where(mask > 0, values, 0.0)
    if normalise == "token":
        return values.sum() / jnp.maximum(mask.sum(), 1)
    if normalise == "sequence":
        tokens = mask.sum(axis=1, keepdims=True)
        return (values / jnp.maximum(tokens, 1)).sum() / jnp.maximum((tokens > 0).sum(), 1)
    if max_tokens is None or max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 with dr_grpo, it is {max_tokens}")
    return values.sum() / (mask.shape[0] * max_tokens)


def policy_loss(
    logp: Float[Array, "R T"],
    old_logp: Float[Array, "R T"],
    advantages: Float[Array, " R"],
    mask: Float[Array, "R T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalise: str = "token",
    ratio: str = "token",
    max_tokens: int | None = None,
    weights: Float[Array, "R T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped surrogate -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), averaged.

    Args:
      logp: log-probabilities of the sampled tokens under the policy that is trained.
      old_logp: the same under the policy before its first step on this batch, constants.
      advantages: one per rollout, constants.
      mask: 1 at sampled tokens.
      ratio: "token" = p / p_old of each token; "sequence" = their geometric mean over the rollout (GSPO, to
        be used with normalise="sequence").
      normalise, max_tokens: see `masked_mean`.
      weights: of each token's surrogate, constants (see `importance`); 1 where not given.

    Returns:
      The loss and float32 scalars, means over the tokens of the mask: `clip_low` and `clip_high`, the shares
      of tokens whose gradient the lower (upper) bound cut off; `ratio`; `logp_gap`, mean |logp - old_logp|.
    """
    _one_of("ratio", ratio, RATIOS)
    _one_of("normalise", normalise, NORMALISERS)
    used = mask > 0
    # Masked log-probabilities may be -inf; a where before exp keeps NaN out of the gradient too.
    gap = jnp.where(used, logp - jax.lax.stop_gradient(old_logp), 0.0)
    if ratio == "sequence":
        gap_used = gap.sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        gap_used = jnp.broadcast_to(gap_used, gap.shape)
    else:
        gap_used = gap
    ratios = jnp.exp(gap_used)
    gains = jax.lax.stop_gradient(advantages)[:, None]
    clipped = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = -jnp.minimum(ratios * gains, clipped * gains)
    if weights is not None:
        surrogate = surrogate * jax.lax.stop_gradient(weights)
    loss = masked_mean(surrogate, mask, normalise=normalise, max_tokens=max_tokens)
    stats = {
        "clip_low": masked_mean((ratios < 1.0 - clip_low) & (gains < 0), mask),
        "clip_high": masked_mean((ratios > 1.0 + clip_high) & (gains > 0), mask),
        "ratio": masked_mean(ratios, mask),
        "logp_gap": masked_mean(jnp.abs(gap), mask),
    }
    return loss, jax.lax.stop_gradient(stats)


def importance(
    old_logp: Float[Array, "R T"], sampler_logp: Float[Array, "R T"], mask: Float[Array, "R T"], cap: float
) -> tuple[Float[Array, "R T"], dict[str, Float[Array, ""]]]:
    """Truncated importance weights min(p_trainer / p_sampler, cap) of each token; 1 where masked.

    Sampler and trainer hold the same weights and compute in another order: the tokens come from the sampler's
    distribution, the gradient is the trainer's. Source: Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training" (2025, fengyao.notion.site/off-policy-rl).

    Returns:
      The weights, and means over the tokens of the mask: `importance`, of the weights; `importance_cut`, the share
      that was cut off; `logp_gap`, mean |old_logp - sampler_logp|.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, it is {cap}")
    gap = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    ratios = jnp.exp(gap)
    weights = jnp.minimum(ratios, cap)
    stats = {
        "importance": masked_mean(weights, mask),
        "importance_cut": masked_mean((ratios > cap).astype(jnp.float32), mask),
        "logp_gap": masked_mean(jnp.abs(gap), mask),
    }
    return jax.lax.stop_gradient((jnp.where(mask > 0, weights, 1.0), stats))


def kl(
    logp: Float[Array, "R T"], ref_logp: Float[Array, "R T"], kind: str, mask: Float[Array, "R T"]
) -> Float[Array, "R T"]:
    """KL(policy || reference) estimated at each sampled token, 0 where masked; average it with `masked_mean`.

    With d = logp - ref_logp: "k2" is d^2 / 2, "k3" is exp(-d) - 1 + d, "none" is 0. Both have the gradient
    d * grad logp, whose expectation under the policy is the gradient of KL(policy || reference).
    Source: Schulman, "Approximating KL Divergence" (2020) for the values; see the top of this file for the
    gradient.
    """
    _one_of("kind", kind, KLS)
    if kind == "none":
        return jnp.zeros_like(logp)
    gap = jnp.where(mask > 0, logp - jax.lax.stop_gradient(ref_logp), 0.0)
    k2 = 0.5 * gap**2
    if kind == "k2":
        return k2
    k3 = jnp.expm1(-gap) + gap
    return k2 + jax.lax.stop_gradient(k3 - k2)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
