"""The weighted sum of rewards, with each term's own values kept beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from realsr_hpc.config.reward_options import (
    DegradationOptions,
    FidelityOptions,
    FormatOptions,
    GenerationOptions,
    UnderstandingOptions,
    read_options,
)
from realsr_hpc.records import Candidate, GroupRewards
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.degradation import DegradationReward
from realsr_hpc.rewards.fidelity import FidelityReward
from realsr_hpc.rewards.format import FormatReward
from realsr_hpc.rewards.generation import GenerationReward
from realsr_hpc.rewards.understanding import UnderstandingReward


class RewardMixture:
    """Every term of a recipe, scored over whole batches of rollouts."""

    def __init__(self, config: RewardsConfig):
        if not config.terms:
            raise ValueError("rewards.terms is empty; name at least one reward")
        self.config = config
        self.rewards = {name: build_reward(name, term) for name, term in config.terms.items()}
        self.at_step(1)

    def at_step(self, step: int) -> None:
        """Take the weights of a step (from 1): those of ramped terms change, so a resumed run goes on alike."""
        self.weights = {name: weight_at(term, step) for name, term in self.config.terms.items()}

    def score(self, candidates: Sequence[Candidate]) -> GroupRewards:
        """Rewards of one group's rollouts."""
        return self.score_groups([candidates])[0]

    def score_groups(self, groups: Sequence[Sequence[Candidate]]) -> list[GroupRewards]:
        """Rewards of many groups, every term in one batch over the rollouts of all of them."""
        breakdown, failures = self.score_terms([item for members in groups for item in members])
        ends = np.cumsum([len(members) for members in groups])
        starts = ends - [len(members) for members in groups]
        return [
            self._group(_slice(breakdown, start, end), _slice(failures, start, end))
            for start, end in zip(starts, ends, strict=True)
        ]

    def score_terms(self, candidates: Sequence[Candidate]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Unweighted scores [n] by term, and on which items the term broke, bool [n]."""
        breakdown, failures = {}, {}
        for name, reward in self.rewards.items():
            scores, broken = reward.score_counted(candidates)
            if reward.needs_image and self.config.gate_malformed:
                malformed = np.array([not item.trace.well_formed for item in candidates], dtype=bool)
                scores = np.where(malformed, reward.range[0], scores)
            breakdown[name], failures[name] = scores, broken
        return breakdown, failures

    def _group(self, breakdown: dict[str, np.ndarray], failures: dict[str, np.ndarray]) -> GroupRewards:
        total = sum(self.weights[name] * scores for name, scores in breakdown.items())
        return GroupRewards(
            total=torch.from_numpy(np.asarray(total)).float(),
            breakdown={name: torch.from_numpy(scores.copy()).float() for name, scores in breakdown.items()},
            weights=dict(self.weights),
            failures={name: int(broken.sum()) for name, broken in failures.items()},
        )


def _slice(values: dict[str, np.ndarray], start: int, end: int) -> dict[str, np.ndarray]:
    return {name: column[start:end] for name, column in values.items()}


def weight_at(term: RewardTerm, step: int) -> float:
    """The term's weight at a step: linear between the ramp's ends, constant outside."""
    if term.final_weight is None or term.ramp_steps is None:
        return term.weight
    first, last = term.ramp_steps
    return float(np.interp(step, (first, last), (term.weight, term.final_weight)))


def build_reward(name: str, term: RewardTerm) -> Reward:
    """The reward of one recipe term. Raises ValueError naming the term and a wrong option."""
    match read_options(name, term):
        case FormatOptions() as options:
            return FormatReward(options)
        case DegradationOptions() as options:
            return DegradationReward(options)
        case UnderstandingOptions() as options:
            return UnderstandingReward(options)
        case GenerationOptions() as options:
            return GenerationReward(options)
        case FidelityOptions() as options:
            return FidelityReward(options)
        case other:
            raise ValueError(f"rewards.terms.{name}: no reward reads {type(other).__name__}; add it in mixture.py")
