"""The policy loss: one microbatch's share of a mean over the whole update.

Token and rollout counts of the whole update are arguments, so loss and gradient are plain sums over microbatches and
ranks: every way of splitting the rollouts gives the same result. A single rollout is never split.

Three policies are involved. The *policy* is being trained; the *old* policy is the same at the start of the step (ratio
and clipping are against it); the *rollout* log-probabilities are what the sampler reported for the old policy, and
differ from it by numerics only. The reference is frozen. All are log-probabilities of the same behaviour distribution.

Not implemented: critics, learned rewards, losses over tokens that the grammar forced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from realsr_hpc.config.learning import GRPOConfig

MAX_LOG_RATIO = 20.0
"""Logarithms of ratios are clamped to +-20, as verl does: e^20 is 5e8, and e^89 is inf in float32."""


@dataclass(frozen=True)
class GlobalCounts:
    """Size of the whole update, over all ranks and microbatches."""

    num_tokens: int
    """Tokens that carry loss."""
    num_rollouts: int
    """Rollouts that carry loss (at least one such token)."""
    max_tokens: int
    """Dr.GRPO's constant length: the recipe's max_new_tokens."""


@dataclass(frozen=True)
class LossTerms:
    """A microbatch's contribution; the update's value is the sum over microbatches and ranks."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]
    """Detached; each already divided by its global count, so sums of contributions are means; `.../count` are not."""


@dataclass(frozen=True)
class Mismatch:
    """Difference of the trainer's log-probabilities from the sampler's: sums over tokens, to be summed over ranks."""

    abs_sum: Float[Tensor, ""]
    """|policy - rollout| log-probability in nats; `rollout/mismatch_abs` is this divided by the number of tokens."""
    kl_sum: Float[Tensor, ""]
    """KL(rollout || policy) in nats; `rollout/mismatch_kl` is this divided by the number of tokens."""


def policy_loss(
    policy_logprobs: Float[Tensor, "N T"],
    rollout_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    loss_mask: Bool[Tensor, "N T"],
    reference_logprobs: Float[Tensor, "N T"] | None = None,
    *,
    counts: GlobalCounts,
    config: GRPOConfig,
    old_logprobs: Float[Tensor, "N T"] | None = None,
    entropy: Float[Tensor, "N T"] | None = None,
) -> LossTerms:
    """Clipped surrogate, KL to the reference and entropy bonus of one microbatch; whole rollouts in any order.

    advantages: of rollouts, or of their tokens. old_logprobs None: the policy's own, detached: ratio 1 (first update).
    Values outside `loss_mask` are ignored, even -inf and NaN. ValueError: an option needs an argument that is missing.
    """
    _check(counts, config, reference_logprobs, entropy)
    mask = loss_mask
    policy = _masked(policy_logprobs, mask)
    old = policy.detach() if old_logprobs is None else _masked(old_logprobs, mask).detach()
    surrogate, means, counted = _surrogate(policy, old, _masked(rollout_logprobs, mask), advantages, mask, config)
    objective = surrogate  # [N, T], per token; maximised
    if reference_logprobs is not None:
        reference = _masked(reference_logprobs, mask).detach()
        divergence = kl_estimate(policy, reference, config.kl_estimator)
        means["grpo/kl_reference/mean"] = divergence
        if config.kl_estimator == "k3":
            counted["grpo/kl_clamped/count"] = (policy - reference).detach().abs() > MAX_LOG_RATIO
        objective = objective - config.kl_beta * divergence if config.kl_beta > 0 else objective
    if entropy is not None:
        bounded = _masked(entropy, mask)
        means["grpo/entropy/mean"] = bounded
        objective = objective + config.entropy_weight * bounded if config.entropy_weight else objective
    # divided by global counts, so that the sums over microbatches and ranks are means over the update
    contributions = {name: (value.detach() * mask).sum() / counts.num_tokens for name, value in means.items()}
    contributions |= {name: (where & mask).sum().to(policy.dtype) for name, where in counted.items()}
    contributions["grpo/policy_loss/mean"] = -aggregate(surrogate.detach(), mask, counts, config.aggregation)
    loss = -aggregate(objective, mask, counts, config.aggregation)
    contributions["grpo/loss/mean"] = loss.detach().clone()
    return LossTerms(loss, contributions)


def _surrogate(
    policy: Tensor, old: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, config: GRPOConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Clipped surrogate [N, T] of every token; metrics to be averaged over tokens, and to be counted (bool)."""
    ratio, clamped = importance_ratio(policy - old, mask, config.importance)
    # [N, T], or [N] -> [N, 1], which broadcasts over tokens
    per_token = advantages if advantages.dim() == 2 else advantages[:, None]
    surrogate, clipped = clipped_objective(ratio, per_token.to(policy.dtype), config)
    means = {"grpo/ratio/mean": ratio, "grpo/clip_fraction/mean": clipped.to(policy.dtype)}
    if config.mismatch_cap is not None or config.mismatch_bounds is not None:
        weight = mismatch_weight(old, rollout, cap=config.mismatch_cap, bounds=config.mismatch_bounds)
        surrogate = surrogate * weight
        means["grpo/mismatch_weight/mean"] = weight
    return surrogate, means, {"grpo/ratio_clamped/count": clamped}


def importance_ratio(
    log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], importance: str
) -> tuple[Float[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """exp(policy - old) per token, or GSPO's ratio per rollout, (pi / pi_old)^(1/|y|), repeated over its tokens.

    GSPO: arXiv 2507.18071, eq. 7. With aggregation "sequence" the loss is then exactly its eq. 5. The second result
    marks where the exponent was clamped; the gradient is 0 there.
    """
    if importance == "sequence":  # the geometric mean of the token ratios
        length = mask.sum(-1, keepdim=True).clamp_min(1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / length).expand_as(log_ratio)  # [N, 1] -> [N, T]
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), log_ratio.detach().abs() > MAX_LOG_RATIO


def clipped_objective(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N 1"] | Float[Tensor, "N T"], config: GRPOConfig
) -> tuple[Float[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """min(r A, clip(r, 1 - low, 1 + high) A), and where clipping removed the gradient.

    low = high: PPO, GRPO. high > low: DAPO's clip-higher (arXiv 2503.14476, eq. 10). None: no clipping on that side.
    dual_clip c: for A < 0 the objective is at least c A (arXiv 1912.09729, eq. 5).
    """
    free = ratio * advantage
    objective = free
    if config.clip_low is not None or config.clip_high is not None:
        low = None if config.clip_low is None else 1.0 - config.clip_low
        high = None if config.clip_high is None else 1.0 + config.clip_high
        objective = torch.minimum(free, ratio.clamp(low, high) * advantage)
    if config.dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, config.dual_clip * advantage), objective)
    return objective, objective.detach() != free.detach()


def mismatch_weight(
    old_logprobs: Float[Tensor, "N T"],
    rollout_logprobs: Float[Tensor, "N T"],
    *,
    cap: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "N T"]:
    """Weight that corrects for numerical differences between sampler and trainer; k = pi_old / pi_rollout, no gradient.

    cap: truncated importance sampling, min(k, cap) (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). bounds: a token whose k is outside [low, high] gets weight 0; with a cap of at least
    `high` this is IcePop, k inside and 0 outside (Ling team 2025, arXiv 2510.18855). A masked token still counts in the
    denominator.
    """
    k = (old_logprobs - rollout_logprobs).detach().exp()
    weight = torch.ones_like(k) if cap is None else k.clamp_max(cap)
    if bounds is None:
        return weight
    return weight * ((k >= bounds[0]) & (k <= bounds[1]))


def kl_estimate(
    policy_logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"], estimator: str
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) from one sample of the policy, nats (Schulman, "Approximating KL divergence", 2020).

    With d = log policy - log reference. k1: d, unbiased, any sign; as a loss its gradient is 0 on average. k2: d^2 / 2.
    k3: exp(-d) - 1 + d, unbiased, never negative; GRPO's (arXiv 2402.03300, eq. 4). d is clamped to +-20.
    """
    difference = policy_logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return _k3(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _k3(difference: Tensor) -> Tensor:
    # expm1 keeps the small values that a difference of exponentials would round to noise.
    return torch.expm1(-difference) + difference


def aggregate(
    values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], counts: GlobalCounts, aggregation: str
) -> Float[Tensor, ""]:
    """This microbatch's share of the mean over the update.

    token: over all its tokens, DAPO (arXiv 2503.14476, eq. 8, with the update in place of one group). sequence: over
    rollouts of the mean over their tokens, GRPO (arXiv 2402.03300, eq. 3). dr_grpo: sum over tokens, divided by
    rollouts x a constant length, Dr.GRPO (arXiv 2503.20783).
    """
    # [N, T] -> [N], sums over the tokens of each rollout
    total = (values * mask).sum(-1)
    if aggregation == "token":
        return total.sum() / counts.num_tokens
    if aggregation == "sequence":
        return (total / mask.sum(-1).clamp_min(1)).sum() / counts.num_rollouts
    return total.sum() / (counts.num_rollouts * counts.max_tokens)


def mismatch(
    rollout_logprobs: Float[Tensor, "*shape"],
    policy_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Mismatch:
    """Compare sampler and trainer on the same tokens and weights; KL(rollout || policy) by k3, never clamped."""
    rollout = _masked(rollout_logprobs, mask).detach()
    policy = _masked(policy_logprobs, mask).detach()
    return Mismatch((policy - rollout).abs().sum(), _k3(rollout - policy).sum())


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the mask, so that -inf or NaN there reaches neither loss nor gradient."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _check(counts: GlobalCounts, config: GRPOConfig, reference: Tensor | None, entropy: Tensor | None) -> None:
    if counts.num_tokens < 1 or counts.num_rollouts < 1 or counts.max_tokens < 1:
        raise ValueError(f"{counts} has a zero; skip the update when no rollout carries loss")
    if config.kl_beta > 0 and reference is None:
        raise ValueError(f"grpo.kl_beta is {config.kl_beta} but reference_logprobs is None; score the reference")
    if config.entropy_weight != 0 and entropy is None:
        raise ValueError(f"grpo.entropy_weight is {config.entropy_weight} but entropy is None; score with entropy")
