"""Turns scored groups into the updates of a step: rollouts with the distribution that each token was sampled from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.grpo.advantages import zero_variance
from realsr_hpc.records import GRPOBatch, LossTokens, RolloutTokens, ScoredGroup, TrainingGroup, TrainingSequence
from realsr_hpc.train.credit import token_advantages
from realsr_hpc.train.parts import GRPOParts


def grpo_batches(parts: GRPOParts, groups: Sequence[ScoredGroup], masks: MaskTable) -> list[GRPOBatch]:
    """The step's updates: this rank's rollouts with loss tokens in `updates_per_step` batches, with global counts.

    An update for which no rank has a loss token is skipped.
    """
    grpo = parts.config.grpo
    used = [group for group in groups if grpo.zero_variance == "keep" or not teaches_nothing(group)]
    credit = [token_advantages(parts, group) if grpo.credit == "part" else None for group in used]
    training = [training_group(group, masks, each) for group, each in zip(used, credit, strict=True)]
    batches = []
    for number in range(grpo.updates_per_step):
        mine = every_nth_rollout(training, number, grpo.updates_per_step)
        sequences = [sequence for group in mine for sequence in group.sequences]
        # over all ranks: the loss is a mean over the whole update, not over this rank's part of it
        num_tokens = parts.count(sum(len(sequence.loss.positions) for sequence in sequences))
        num_rollouts = parts.count(len(sequences))
        if num_tokens:
            batches.append(GRPOBatch(mine, num_tokens, num_rollouts))
    return batches


def teaches_nothing(group: ScoredGroup) -> bool:
    """Whether all advantages of the group are zero, and its rollouts do not differ at any place of the image either."""
    assert group.advantages is not None, "a group of one has no advantages: it is not to be trained on"
    # terms with weight 0 teach nothing; rollouts without places (NaN) are not compared
    weighted = [scores for name, scores in group.rewards.places.items() if group.rewards.weights[name]]
    places = [scores[~scores.isnan().any(1)] for scores in weighted]  # [rollouts, places] each
    differ = any(len(scores) and not zero_variance(scores.T).all() for scores in places)
    return bool(zero_variance(group.advantages)) and not differ


def every_nth_rollout(groups: Sequence[TrainingGroup], first: int, nth: int) -> tuple[TrainingGroup, ...]:
    """Rollouts first, first + nth, ... counted over all groups, still grouped; groups that become empty are dropped."""
    numbers = itertools.count()
    shares = [
        replace(group, sequences=tuple(s for s in group.sequences if next(numbers) % nth == first)) for group in groups
    ]
    return tuple(group for group in shares if group.sequences)


def training_group(group: ScoredGroup, masks: MaskTable, credit: Tensor | None = None) -> TrainingGroup:
    """A group's rollouts with loss tokens; rollouts in which every token was forced are dropped.

    credit: advantages of every token, float [G, T]; None: each token has its rollout's.
    """
    rollouts = group.rollouts
    free = [(~forced).nonzero()[:, 0] for forced in rollouts.forced]  # positions at which there was a choice, int64 [n]
    members = (_sequence(group, row, places, masks, credit) for row, places in enumerate(free) if len(places))
    return TrainingGroup(len(rollouts.prompt), tuple(members))


def _sequence(group: ScoredGroup, row: int, free: Tensor, masks: MaskTable, credit: Tensor | None) -> TrainingSequence:
    """One rollout; free: its loss tokens, int64 [n] positions in the response."""
    rollouts = group.rollouts
    assert group.advantages is not None, "a group of one has no advantages: it is not to be trained on"
    tokens = torch.cat([rollouts.prompt, rollouts.tokens[row, : rollouts.lengths[row]]])  # [L + length]
    mask_ids = rollouts.mask_ids[row, free]
    loss = LossTokens(
        # response token i is at position L + i of the sequence, and the hidden state before it predicts it
        positions=len(rollouts.prompt) - 1 + free,
        targets=rollouts.tokens[row, free],
        mask_ids=mask_ids,
        temperature=masks.temperature.cpu()[mask_ids],
        support=None if rollouts.support is None else rollouts.support[row, free],
        cfg_scale=masks.cfg_scale.cpu()[mask_ids] if masks.guided else None,
        # a single rollout, number 0, whose n loss tokens are the columns 0..n-1; joining renumbers them
        rollouts=RolloutTokens(
            rollout=torch.zeros(len(free), dtype=torch.long),
            column=torch.arange(len(free)),
            advantages=group.advantages[row : row + 1],
            rollout_logprobs=rollouts.rollout_logprobs[row, free],
            token_advantages=None if credit is None else credit[row, free],
        ),
    )
    # [L + length]: a token that does not continue an image block begins a new one (or is a separate block)
    blocks = (~masks.continues_block.cpu()[tokens]).cumsum(0) if masks.guided else None
    return TrainingSequence(tokens, loss, blocks)
