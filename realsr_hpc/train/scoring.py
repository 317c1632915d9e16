"""Log-probabilities of a microbatch's loss tokens, with the same masks and options as the sampler's."""

from __future__ import annotations

from torch import Tensor

from realsr_hpc.behaviour.logprobs import TokenScores, behaviour_scores
from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel.layout import even_parts
from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
from realsr_hpc.train.batches import joined_microbatch


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


def add_logprobs(
    policy: Policy, microbatches: list[Microbatch], masks: MaskTable, name: str, *, at_once: int = 1, multiple: int = 1
) -> None:
    """Score the microbatches without gradient; the log-probabilities join their extras as `name`, on the last stage.

    Args:
        policy: whose log-probabilities.
        microbatches: of one shape.
        masks: the sampler's.
        name: of the new column.
        at_once: most microbatches in one pass.
        multiple: the number of passes is a multiple of this (interleaved pipeline schedules need it).
    """
    passes, together = even_parts(len(microbatches), at_once, multiple)
    first = microbatches[0]
    blank = Microbatch(first.tokens, first.segment_ids, first.branches)
    filled = [*microbatches, *[blank] * (passes * together - len(microbatches))]
    parts = [filled[start : start + together] for start in range(0, len(filled), together)]
    joined = [joined_microbatch(part) for part in parts]

    def keep(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        if microbatch.extras:
            scores = score_microbatch(hidden, output_weight, microbatch, masks.allowed, policy)
            microbatch.extras[name] = scores.logprobs.detach()
        return hidden.new_zeros(()), {}

    policy.eval()
    run_pipeline(policy, joined, keep, forward_only=True)
    for part, whole in zip(parts, joined, strict=True):
        scored = [microbatch for microbatch in part if microbatch.extras]
        if name in whole.extras:
            columns = whole.extras[name].split([len(microbatch.extras["positions"]) for microbatch in scored])
            for microbatch, column in zip(scored, columns, strict=True):
                microbatch.extras[name] = column


def nothing_to_score(hidden: Tensor, output_weight: Tensor) -> Tensor:
    """Loss of a microbatch without loss tokens: zero, with a gradient of zeros for every parameter."""
    return (hidden.sum() + output_weight.sum()).float() * 0.0
