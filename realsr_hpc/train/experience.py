"""Collects scored rollouts: of the next training images, and of the fixed held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from realsr_hpc.config.learning import GRPOConfig
from realsr_hpc.config.reward_options import is_elsewhere
from realsr_hpc.parallel.reduce import reduce_float, reduce_floats
from realsr_hpc.records import LQBatch, ScoredGroup, StepReport
from realsr_hpc.rollout.policy_restorer import FIRST_ID
from realsr_hpc.train.parts import GRPOParts, clock
from realsr_hpc.train.rewarding import rewarded
from realsr_hpc.train.updates import teaches_nothing


class BatchSource(Protocol):
    """Source of a step's images: `data.loader.LQLoader`."""

    def next(self) -> LQBatch:
        """The next images of this rank, the same number each time."""
        ...


def collect(parts: GRPOParts, source: BatchSource, seconds: dict[str, float] | None = None) -> list[ScoredGroup]:
    """This rank's groups of one step; with `zero_variance=resample`, groups that teach nothing are replaced.

    Every rank takes the same number of rounds, so that all ranks read equally far into the data. The times of rollouts
    and rewards are added to `seconds`.
    """
    grpo, seconds = parts.config.grpo, {} if seconds is None else seconds
    batch, groups = _next_groups(parts, source, seconds)
    if grpo.zero_variance != "resample":
        return groups
    for _ in range(grpo.max_resample_rounds):
        kept = [group for group in groups if not teaches_nothing(group)]
        missing = len(batch) - len(kept)
        # as long as any rank needs groups, every rank samples another round: so their loaders stay aligned
        if not reduce_float(float(missing), parts.groups.dp, parts.groups.device, "max"):
            break
        groups = kept + _next_groups(parts, source, seconds)[1]
        groups = groups[: len(batch)]
    return groups


def _next_groups(parts: GRPOParts, source: BatchSource, seconds: dict[str, float]) -> tuple[LQBatch, list[ScoredGroup]]:
    with clock(seconds, "rollout"):
        batch = source.next()
    return batch, rollout(parts, batch, parts.config.grpo.group_size, batch.index.tolist(), seconds)


def heldout_due(grpo: GRPOConfig, step: int) -> bool:
    """Whether the held-out images are sampled after `step`; 0: before the first."""
    every = grpo.heldout_every_steps
    return every > 0 and (step % every == 0 or step == grpo.num_steps)


def held_out(parts: GRPOParts, batch: LQBatch, step: int) -> StepReport:
    """Mean rewards of the fixed held-out images after `step`; every step uses the same random draws."""
    seconds: dict[str, float] = {}
    with clock(seconds, "heldout"):
        ids = [FIRST_ID + index for index in batch.index.tolist()]
        groups = rollout(parts, batch, parts.config.grpo.heldout_rollouts, ids, {})
        parts.sampler.counts.read()  # discarded: a step reports the counts of its training rollouts only
        means = {f"heldout/{name}/mean": value for name, value in _reward_means(groups).items()}
        means["heldout/well_formed/mean"] = _well_formed(groups)
        means = reduce_floats(means, parts.groups.dp, parts.groups.device)
    return StepReport(step, means | parts.slowest(seconds), tuple(groups))


def rollout(
    parts: GRPOParts, batch: LQBatch, group_size: int, sample_ids: Sequence[int], seconds: dict[str, float]
) -> list[ScoredGroup]:
    """A group of `group_size` rollouts of each image, with rewards and advantages; adds the times to `seconds`.

    The draws depend only on the samples' ids (one per image), not on the batch, the step or the rank.
    """
    # one id per rollout, [images x G]: it selects the random stream that the rollout is drawn from
    ids = [sample * group_size + member for sample in sample_ids for member in range(group_size)]
    parts.policy.eval()
    with clock(seconds, "rollout"):
        groups = parts.sampler.generate(parts.tokens.prompts(batch.lq), group_size, ids)
    with clock(seconds, "rewards"):
        return rewarded(parts, batch, groups)


def group_metrics(parts: GRPOParts, groups: Sequence[ScoredGroup], rollout_s: float) -> dict[str, float]:
    """Rewards and rollout health of a step, means over all ranks."""
    lengths = torch.cat([group.rollouts.lengths for group in groups]).double()  # [groups x G], in tokens
    metrics = {f"rewards/{name}/mean": value for name, value in _reward_means(groups).items()}
    metrics |= parts.sampler.counts.read()
    metrics |= {
        "rewards/total/std_in_group": float(torch.stack([group.rewards.total.std() for group in groups]).mean()),
        "rewards/failures/count": float(sum(sum(group.rewards.failures.values()) for group in groups)),
        "rollout/length/mean": float(lengths.mean()),
        "rollout/well_formed/mean": _well_formed(groups),
        "rollout/tokens_per_s/mean": float(lengths.sum()) / rollout_s,
        "grpo/dropped_groups/mean": sum(teaches_nothing(group) for group in groups) / len(groups),
    }
    for name, term in parts.config.rewards.terms.items():
        if is_elsewhere(term):  # a remote service can be unreachable: its failures have a separate metric
            metrics[f"rewards/failures/{name}"] = float(sum(group.rewards.failures[name] for group in groups))
    return reduce_floats(metrics, parts.groups.dp, parts.groups.device)


def _reward_means(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    means = {"total": float(torch.cat([group.rewards.total for group in groups]).mean())}
    for name in groups[0].rewards.breakdown:
        means[name] = float(torch.cat([group.rewards.breakdown[name] for group in groups]).mean())
    return means


def _well_formed(groups: Sequence[ScoredGroup]) -> float:
    traces = [trace for group in groups for trace in group.traces]
    return sum(trace.well_formed for trace in traces) / len(traces)
