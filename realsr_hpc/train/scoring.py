"""Log-probabilities of a microbatch's loss tokens, under the same masks and options as in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from realsr_hpc.behaviour.logprobs import TokenScores, behaviour_scores
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel.layout import even_parts
from realsr_hpc.parallel.pipeline import Microbatch, Outputs, run_pipeline
from realsr_hpc.records import LossTokens
from realsr_hpc.train.batches import joined_microbatch


def score_tokens(
    hidden: Tensor,
    output_weight: Tensor,
    loss: LossTokens,
    allowed: Tensor,
    policy: Policy,
    *,
    with_entropy: bool = False,
    with_logsumexp: bool = False,
) -> TokenScores:
    """Scores of the n loss tokens; with guidance, the second half of hidden [b, S, H] is the unconditional twins."""
    guided = loss.cfg_scale is not None
    streams = hidden.chunk(2) if guided else (hidden,)
    rows = [stream.flatten(0, 1)[loss.positions] for stream in streams]  # [rows, S, H] -> [rows x S, H] -> [n, H]
    return behaviour_scores(
        rows[0],
        output_weight,
        loss.targets,
        allowed,
        loss.mask_ids,
        loss.temperature,
        support=loss.support,
        unconditional_hidden=rows[1] if guided else None,
        cfg_scale=loss.cfg_scale,
        tp_group=policy.groups.tp,
        with_entropy=with_entropy,
        with_logsumexp=with_logsumexp,
    )


def logprobs_of(
    policy: Policy, microbatches: Sequence[Microbatch], allowed: Tensor, *, at_once: int = 1, multiple: int = 1
) -> list[Tensor | None]:
    """Log-probabilities [n] of each microbatch's loss tokens, without gradient.

    None for a microbatch without loss tokens; None for every microbatch on all pipeline stages but the last.

    Args:
        policy: the model that scores.
        microbatches: all of one shape.
        allowed: the sampler's masks, bool [masks, padded vocabulary].
        at_once: largest number of microbatches per pass.
        multiple: the number of passes is a multiple of this (interleaved pipeline schedules need it).
    """
    passes, together = even_parts(len(microbatches), at_once, multiple)
    first = microbatches[0]
    blank = Microbatch(first.tokens, first.segment_ids, first.branches, first.image_blocks)
    # passes x together microbatches: blank ones without loss tokens fill up the last pass
    filled = [*microbatches, *[blank] * (passes * together - len(microbatches))]
    parts = [filled[start : start + together] for start in range(0, len(filled), together)]

    def score(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        if microbatch.loss is None:
            return hidden.new_zeros(()), {}
        scores = score_tokens(hidden, output_weight, microbatch.loss, allowed, policy)
        return hidden.new_zeros(()), {"logprobs": scores.logprobs.detach()}

    policy.eval()
    outputs = run_pipeline(policy, [joined_microbatch(part) for part in parts], score, forward_only=True)
    if not outputs:
        return [None] * len(microbatches)
    scored = [logprobs for part, output in zip(parts, outputs, strict=True) for logprobs in _split(part, output)]
    return scored[: len(microbatches)]


def _split(part: Sequence[Microbatch], output: Outputs) -> list[Tensor | None]:
    """Split the log-probabilities of a pass, [n1 + n2 + ...], into those of its microbatches, [n1], [n2], ..."""
    lengths = [0 if microbatch.loss is None else len(microbatch.loss.positions) for microbatch in part]
    if not output:
        return [None] * len(part)
    columns = output["logprobs"].split(lengths)
    return [column if length else None for column, length in zip(columns, lengths, strict=True)]


def nothing_to_score(hidden: Tensor, output_weight: Tensor) -> Tensor:
    """Loss of a microbatch without loss tokens: zero, with a gradient of zeros for every parameter."""
    return (hidden.sum() + output_weight.sum()).float() * 0.0


def with_columns(microbatch: Microbatch, **columns: Tensor | None) -> Microbatch:
    """The microbatch with further columns (`reference_logprobs`, `old_logprobs`) of its loss tokens."""
    loss = microbatch.loss
    if loss is None or loss.rollouts is None:
        return microbatch
    return replace(microbatch, loss=replace(loss, rollouts=replace(loss.rollouts, **columns)))
