"""Group-relative advantages. The last dim is the group, the dims before it are prompts; groups never mix.

Computed in float64 and returned in the dtype of the rewards, so that a group of equal rewards gives exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from realsr_hpc.config.learning import GRPOConfig

AdvantageKind = Literal["mean_std", "mean", "leave_one_out"]


def group_advantages(
    rewards: Float[Tensor, "*prompts G"],
    *,
    kind: AdvantageKind = "mean_std",
    unbiased_std: bool = True,
    epsilon: float = 1e-4,
) -> Float[Tensor, "*prompts G"]:
    """Rewards centred in their group, higher is better.

    mean_std: (r - mean) / (std + epsilon), GRPO (DeepSeekMath, arXiv 2402.03300, eq. of section 4.1.2); RealSR-R1's
    release divides by the unbiased std plus 1e-4. mean: r - mean, Dr.GRPO (arXiv 2503.20783). leave_one_out: r minus
    the mean of the others, RLOO (arXiv 2402.14740). Raises ValueError for a group of one.
    """
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: an advantage compares siblings; use at least 2")
    exact = rewards.double()
    centred = exact - exact.mean(-1, keepdim=True)
    # equal rewards give exactly 0; otherwise the rounding of the mean would be divided by a tiny std
    centred = centred.masked_fill(zero_variance(rewards)[..., None], 0.0)
    if kind == "mean_std":
        centred = centred / (exact.std(-1, keepdim=True, correction=int(unbiased_std)) + epsilon)
    elif kind == "leave_one_out":
        centred = centred * (group_size / (group_size - 1))
    return centred.to(rewards.dtype)


def mixed_advantages(
    breakdown: Mapping[str, Float[Tensor, "*prompts G"]],
    weights: Mapping[str, float],
    *,
    normalise_each: bool = True,
    kind: AdvantageKind = "mean_std",
    unbiased_std: bool = True,
    epsilon: float = 1e-4,
) -> Float[Tensor, "*prompts G"]:
    """Advantages from several rewards.

    normalise_each: the weighted sum of each reward's own group advantages, so that no reward dominates by its scale
    (GDPO, arXiv 2601.05242, without its last normalisation over the batch, which would make a rollout's advantage
    depend on other prompts). Otherwise: the group advantage of the weighted sum, as in GRPO. Raises ValueError if
    rewards and weights have different names.
    """
    if not breakdown or set(breakdown) != set(weights):
        raise ValueError(
            f"rewards {sorted(breakdown)} and weights {sorted(weights)} differ; give every reward one weight"
        )
    names = sorted(breakdown)

    def advantage(rewards: Tensor) -> Tensor:
        return group_advantages(rewards, kind=kind, unbiased_std=unbiased_std, epsilon=epsilon)

    if normalise_each:
        # [terms, prompts, G] -> [prompts, G]
        return torch.stack([weights[name] * advantage(breakdown[name]) for name in names]).sum(0)
    return advantage(torch.stack([weights[name] * breakdown[name] for name in names]).sum(0))


def configured_advantages(
    breakdown: Mapping[str, Float[Tensor, "*prompts G"]], weights: Mapping[str, float], config: GRPOConfig
) -> Float[Tensor, "*prompts G"]:
    """`mixed_advantages` with the recipe's options."""
    return mixed_advantages(
        breakdown,
        weights,
        normalise_each=config.normalise_each_reward,
        kind=config.advantage,
        unbiased_std=config.unbiased_std,
        epsilon=config.advantage_epsilon,
    )


def contributions(
    breakdown: Mapping[str, Float[Tensor, "*prompts G"]], weights: Mapping[str, float], config: GRPOConfig
) -> dict[str, Float[Tensor, "*prompts G"]]:
    """What each reward contributes to `configured_advantages`, float64; up to rounding, they sum to the advantage.

    Without normalise_each_reward all rewards share one divisor, that of the weighted sum.
    """
    exact = {name: weights[name] * values.double() for name, values in breakdown.items()}
    if config.normalise_each_reward:
        return {
            name: weights[name] * configured_advantages({name: values}, {name: 1.0}, config).double()
            for name, values in breakdown.items()
        }
    # all terms are scaled by the factor [*prompts, 1] that the weighted sum is scaled by
    whole = torch.stack(list(exact.values())).sum(0)
    factor = torch.ones_like(whole[..., :1])
    if config.advantage == "mean_std":
        factor = 1 / (whole.std(-1, keepdim=True, correction=int(config.unbiased_std)) + config.advantage_epsilon)
    elif config.advantage == "leave_one_out":
        factor = factor * (whole.shape[-1] / (whole.shape[-1] - 1))
    factor = factor.masked_fill(zero_variance(whole)[..., None], 0.0)
    return {name: (values - values.mean(-1, keepdim=True)) * factor for name, values in exact.items()}


def place_advantages(
    scores: Float[Tensor, "*prompts G places"], *, epsilon: float = 1e-4
) -> Float[Tensor, "*prompts G places"]:
    """Each place's scores centred over the group's rollouts, divided by one number for all places.

    The divisor is the root mean square over places of the unbiased std, so that a place at which rollouts differ more
    weighs more, as it does in the mean over the image. NaN stays NaN and does not enter the means.
    """
    exact = scores.double()
    # the means run over the rollouts (dim -2) that have scores at a place
    known = ~exact.isnan()
    count = known.sum(-2, keepdim=True)
    centred = exact - exact.nansum(-2, keepdim=True) / count.clamp_min(1)
    variance = centred.square().nansum(-2, keepdim=True) / (count - 1).clamp_min(1)  # [*prompts, 1, places]
    return (centred / (variance.mean(-1, keepdim=True).sqrt() + epsilon)).to(scores.dtype)


def zero_variance(values: Float[Tensor, "*prompts G"], tolerance: float = 1e-6) -> Bool[Tensor, "*prompts"]:
    """Groups without a learning signal: their largest and smallest values differ by no more than the tolerance.

    The values are rewards, as in DAPO's dynamic sampling (arXiv 2503.14476, eq. 11), or mixed advantages, which differ
    from the summed rewards when terms cancel in the sum but not individually.
    """
    return values.amax(-1) - values.amin(-1) <= tolerance
