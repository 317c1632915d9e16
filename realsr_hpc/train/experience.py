"""Rollouts with rewards, and the batches made of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from realsr_hpc.config.learning import GRPOConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.grpo.advantages import configured_advantages, zero_variance
from realsr_hpc.parallel.reduce import reduce_float, reduce_floats
from realsr_hpc.records import GRPOBatch, LQBatch, RolloutGroup, ScoredGroup, TrainingSequence
from realsr_hpc.rewards.base import Candidate
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.restorer import FIRST_ID
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.train.kept import write_rollouts
from realsr_hpc.train.run import TrainingRun


class Experience:
    """Samples and scores groups for training, and for the fixed held-out images."""

    def __init__(self, run: TrainingRun, sampler: Sampler, rewards: RewardMixture):
        self.run, self.sampler, self.rewards = run, sampler, rewards
        self._latest: tuple[LQBatch, list[ScoredGroup]] | None = None

    def collect(self, loader: LQLoader) -> list[ScoredGroup]:
        """This rank's groups of one step; with `zero_variance=resample`, groups that teach nothing are replaced.

        Every rank takes the same number of rounds, so that their loaders stay side by side.
        """
        grpo = self.run.config.grpo
        batch = loader.next()
        groups = self.rollout(batch, grpo.group_size, [int(index) for index in batch.index])
        if grpo.zero_variance != "resample":
            return groups
        for _ in range(grpo.max_resample_rounds):
            kept = [group for group in groups if not teaches_nothing(group, grpo)]
            missing = len(batch) - len(kept)
            if not reduce_float(float(missing), self.run.groups.dp, self.run.groups.device, "max"):
                break
            extra = loader.next()
            groups = kept + self.rollout(extra, grpo.group_size, [int(index) for index in extra.index])
            groups = groups[: len(batch)]
        return groups

    def heldout(self, batch: LQBatch) -> dict[str, float]:
        """Mean rewards of the fixed held-out images; the same draws each time, whatever the step."""
        rollouts = self.run.config.grpo.heldout_rollouts
        groups = self.rollout(batch, rollouts, [FIRST_ID + int(index) for index in batch.index])
        means = {f"heldout/{name}/mean": value for name, value in _reward_means(groups).items()}
        means["heldout/well_formed/mean"] = _well_formed(groups)
        return reduce_floats(means, self.run.groups.dp, self.run.groups.device)

    def rollout(self, batch: LQBatch, group_size: int, sample_ids: list[int]) -> list[ScoredGroup]:
        """Groups of a batch with their rewards; the draws depend on the samples' ids alone."""
        tokens, policy = self.run.tokens, self.sampler.policy
        ids = [sample * group_size + member for sample in sample_ids for member in range(group_size)]
        policy.eval()
        groups = self.sampler.generate(tokens.prompts(batch.lq), group_size, ids)
        self._latest = (batch, self._score(batch, groups))
        return self._latest[1]

    def keep(self, step: int, kind: Literal["train", "heldout"]) -> None:
        """Save the first groups of the last rollouts for people to look at, where the recipe wants it at this step."""
        tracking, run = self.run.config.tracking, self.run
        every, latest = tracking.rollouts_every_steps, self._latest
        if not (run.groups.is_main and latest and every and (step % every == 0 or step in (1, run.num_steps))):
            return
        batch, groups = latest[0], latest[1][: tracking.rollouts_groups]
        traces = [trace for group in groups for trace in group.traces]
        stages = [run.tokens.decode([trace.images[stage] for trace in traces]) for stage in range(3)]
        advantages = [group_advantages(group, run.config.grpo).tolist() for group in groups]
        write_rollouts(run.run_dir, step, kind, batch, groups, advantages, stages)

    def _score(self, batch: LQBatch, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        tokens = self.run.tokens
        traces = [tokens.codec.parse_group(group) for group in groups]
        images = iter(tokens.decode([trace.images[2] for members in traces for trace in members]))
        candidates = []
        for row, members in enumerate(traces):
            lq, gt = (None if x is None else x[row].movedim(0, -1).numpy() for x in (batch.lq, batch.gt))
            known = (batch.labels[row], batch.scenes[row], batch.operators[row] if batch.operators else None)
            candidates.append([Candidate(trace, next(images), lq, gt, *known) for trace in members])
        return self.rewards.score_groups(groups, candidates)


def group_advantages(group: ScoredGroup, config: GRPOConfig) -> Tensor:
    """Advantages [G] as the recipe says."""
    return configured_advantages(group.reward_breakdown, group.weights, config)


def teaches_nothing(group: ScoredGroup, config: GRPOConfig) -> bool:
    """All advantages of the group are zero."""
    return bool(zero_variance(group_advantages(group, config)))


def grpo_batches(run: TrainingRun, groups: list[ScoredGroup], sampler: Sampler) -> list[GRPOBatch]:
    """The step's updates: rollouts that carry loss, spread over `updates_per_step` batches with their global counts.

    An update for which no rank has a loss token is left out.
    """
    grpo = run.config.grpo
    used = [group for group in groups if grpo.zero_variance == "keep" or not teaches_nothing(group, grpo)]
    sequences = [sequence for group in used for sequence in training_sequences(group, sampler, grpo)]
    batches = []
    for part in range(grpo.updates_per_step):
        mine = tuple(sequences[part :: grpo.updates_per_step])
        num_tokens = run.count(sum(len(sequence.positions) for sequence in mine))
        num_rollouts = run.count(len(mine))
        if num_tokens:
            batches.append(GRPOBatch(mine, num_tokens, num_rollouts))
    return batches


def training_sequences(group: ScoredGroup, sampler: Sampler, config: GRPOConfig) -> list[TrainingSequence]:
    """A group's rollouts with the distribution each token was sampled from; without a free token: left out."""
    rollouts = group.rollouts
    advantages = group_advantages(group, config)
    prompt_length = len(rollouts.prompt)
    sequences = []
    for row, length in enumerate(rollouts.lengths.tolist()):
        free = (~rollouts.forced[row, :length]).nonzero()[:, 0]
        if not len(free):
            continue
        tokens = torch.cat([rollouts.prompt, rollouts.tokens[row, :length]])
        mask_ids = rollouts.mask_ids[row, free]
        blocks = (~sampler.masks.continues_block.cpu()[tokens]).cumsum(0) if sampler.masks.guided else None
        sequences.append(
            TrainingSequence(
                tokens=tokens,
                positions=prompt_length - 1 + free,
                mask_ids=mask_ids,
                temperature=sampler.masks.temperature.cpu()[mask_ids],
                rollout_logprobs=rollouts.rollout_logprobs[row, free],
                prompt_length=prompt_length,
                advantage=float(advantages[row]),
                support=None if rollouts.support is None else rollouts.support[row, free],
                cfg_scale=sampler.masks.cfg_scale.cpu()[mask_ids] if sampler.masks.guided else None,
                blocks=blocks,
            )
        )
    return sequences


def group_metrics(run: TrainingRun, groups: list[ScoredGroup], rollout_s: float) -> dict[str, float]:
    """Rewards and rollout health of a step, means over all ranks."""
    lengths = torch.cat([group.rollouts.lengths for group in groups]).double()
    metrics = {f"rewards/{name}/mean": value for name, value in _reward_means(groups).items()}
    metrics |= {
        "rewards/total/std_in_group": float(torch.stack([group.rewards.std() for group in groups]).mean()),
        "rewards/failures/count": float(sum(sum(group.failures.values()) for group in groups)),
        "rollout/length/mean": float(lengths.mean()),
        "rollout/well_formed/mean": _well_formed(groups),
        "rollout/tokens_per_s/mean": float(lengths.sum()) / rollout_s,
        "grpo/dropped_groups/mean": sum(teaches_nothing(group, run.config.grpo) for group in groups) / len(groups),
    }
    return reduce_floats(metrics, run.groups.dp, run.groups.device)


def _reward_means(groups: list[ScoredGroup]) -> dict[str, float]:
    means = {"total": float(torch.cat([group.rewards for group in groups]).mean())}
    for name in groups[0].reward_breakdown:
        means[name] = float(torch.cat([group.reward_breakdown[name] for group in groups]).mean())
    return means


def _well_formed(groups: list[ScoredGroup]) -> float:
    traces = [trace for group in groups for trace in group.traces]
    return sum(trace.well_formed for trace in traces) / len(traces)
