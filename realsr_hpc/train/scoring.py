"""Log-probabilities of a microbatch's loss tokens, with the same masks and options as the sampler's."""

from __future__ import annotations

from torch import Tensor

from realsr_hpc.behaviour.logprobs import TokenScores, behaviour_scores
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
from realsr_hpc.rollout.sampler import MaskTable


def score_microbatch(
    hidden: Tensor,
    output_weight: Tensor,
    microbatch: Microbatch,
    allowed: Tensor,
    policy: Policy,
    *,
    with_entropy: bool = False,
    with_logsumexp: bool = False,
) -> TokenScores:
    """Scores of the loss tokens [n]; hidden [b, S, H] holds the unconditional twins in its second half, if any."""
    extras = microbatch.extras
    cfg_scale = extras.get("cfg_scale")
    streams = [hidden] if cfg_scale is None else list(hidden.chunk(2))
    rows = [stream.flatten(0, 1)[extras["positions"]] for stream in streams]
    return behaviour_scores(
        rows[0],
        output_weight,
        extras["targets"],
        allowed,
        extras["mask_ids"],
        extras["temperature"],
        support=extras.get("support"),
        unconditional_hidden=rows[1] if cfg_scale is not None else None,
        cfg_scale=cfg_scale,
        tp_group=policy.groups.tp,
        with_entropy=with_entropy,
        with_logsumexp=with_logsumexp,
    )


def add_logprobs(policy: Policy, microbatches: list[Microbatch], masks: MaskTable, name: str) -> None:
    """Score the microbatches without gradient; the log-probabilities join their extras as `name`, on the last stage."""

    def keep(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        if microbatch.extras:
            scores = score_microbatch(hidden, output_weight, microbatch, masks.allowed, policy)
            microbatch.extras[name] = scores.logprobs.detach()
        return hidden.new_zeros(()), {}

    policy.eval()
    run_pipeline(policy, microbatches, keep, forward_only=True)


def nothing_to_score(hidden: Tensor, output_weight: Tensor) -> Tensor:
    """Loss of a microbatch without loss tokens: zero, with a gradient of zeros for every parameter."""
    return (hidden.sum() + output_weight.sum()).float() * 0.0
