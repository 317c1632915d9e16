"""Turns rollouts into pixels, rewards and advantages. The ranks of a replica (TP x PP) share the work; all get the
result.

Every rank parses all traces, which is cheap. Final images are decoded and scored in batches of `rewards.batch_size`
rollouts that are distributed over the ranks, and the scores are gathered so that every rank trains on the same numbers.
Scoring does not overlap decoding: both would launch work on one device, and while the sampler captures a CUDA graph no
other thread may do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from realsr_hpc.grpo.advantages import configured_advantages
from realsr_hpc.parallel.layout import batches_of_rank
from realsr_hpc.parallel.reduce import gather_objects
from realsr_hpc.records import Candidate, Case, GroupRewards, LQBatch, ParsedTrace, RolloutGroup, ScoredGroup
from realsr_hpc.rewards.mixture import TermScores
from realsr_hpc.train.parts import GRPOParts


def rewarded(parts: GRPOParts, batch: LQBatch, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    """Score the groups of `batch`'s images; the same result on all ranks of a replica."""
    traces = [parts.tokens.codec.parse_group(group) for group in groups]
    sources = batch.cases()
    # all rollouts of all groups in one list, so that they can be distributed evenly
    rollouts = [
        (source, member, trace)
        for source, members in zip(sources, traces, strict=True)
        for member, trace in enumerate(members)
    ]
    images, scores = _shared(parts, rollouts)
    pictures = iter(images)
    rewards = parts.rewards.groups(scores, [len(members) for members in traces])
    return [
        ScoredGroup(source, group, tuple(members), _taken(pictures, len(members)), earned, _advantages(parts, earned))
        for source, group, members, earned in zip(sources, groups, traces, rewards, strict=True)
    ]


@dataclass(frozen=True)
class _Share:
    """One rank's part of the work: positions of its rollouts, their final images and scores."""

    places: list[int]
    images: list[np.ndarray | None]
    scores: TermScores


def _shared(
    parts: GRPOParts, rollouts: Sequence[tuple[Case, int, ParsedTrace]]
) -> tuple[list[np.ndarray | None], TermScores]:
    """Final images and scores of all rollouts; this rank computes its share of them."""
    groups, size = parts.groups, parts.config.rewards.batch_size
    mine = batches_of_rank(len(rollouts), size, groups.replica_rank, groups.replica_size)
    batches = [list(_candidates(parts, [rollouts[place] for place in places])) for places in mine]
    share = _Share(
        [place for places in mine for place in places],
        [item.image for items in batches for item in items],
        parts.rewards.score_batches(batches),
    )
    shares = [share] if groups.replica_size == 1 else gather_objects(share, groups.replica)
    images: list[np.ndarray | None] = [None] * len(rollouts)
    for one in shares:
        for place, image in zip(one.places, one.images, strict=True):
            images[place] = image
    # the shares hold the rollouts rank by rank: restore the order of `rollouts`
    order = np.argsort([place for one in shares for place in one.places])
    return images, TermScores.joined([one.scores for one in shares]).taken(order)


def _candidates(parts: GRPOParts, rollouts: Sequence[tuple[Case, int, ParsedTrace]]) -> Iterator[Candidate]:
    """Rollouts in the form that the rewards score; their final images are decoded in one batch."""
    images = parts.tokens.decode([trace.images[2] for _, _, trace in rollouts])
    for (source, member, trace), image in zip(rollouts, images, strict=True):
        yield source.candidate(trace, image, member)


def _taken(images: Iterator[np.ndarray | None], count: int) -> tuple[np.ndarray | None, ...]:
    return tuple(next(images) for _ in range(count))


def _advantages(parts: GRPOParts, rewards: GroupRewards) -> torch.Tensor | None:
    if len(rewards.total) == 1:
        return None
    return configured_advantages(rewards.breakdown, rewards.weights, parts.config.grpo)
