# pyright: strict, reportUnknownMemberType=false
"""The weighted sum of a recipe's rewards, together with the values of each term."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from realsr_hpc.config.reward_options import (
    DegradationOptions,
    FidelityOptions,
    FormatOptions,
    GenerationOptions,
    HttpOptions,
    UnderstandingOptions,
    read_options,
)
from realsr_hpc.parallel.layout import batches_of_rank
from realsr_hpc.records import Candidate, GroupRewards
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.degradation import DegradationReward
from realsr_hpc.rewards.fidelity import FidelityReward
from realsr_hpc.rewards.format import FormatReward
from realsr_hpc.rewards.generation import GenerationReward
from realsr_hpc.rewards.http import HttpReward
from realsr_hpc.rewards.understanding import UnderstandingReward

KINDS: dict[str, type[Reward]] = {
    "format": FormatReward,
    "degradation": DegradationReward,
    "understanding": UnderstandingReward,
    "generation": GenerationReward,
    "fidelity": FidelityReward,
}
"""The class of each kind of reward; a term computed over HTTP has the kind's `needs_image` and `judges`."""


@dataclass(frozen=True)
class TermScores:
    """Unweighted scores of n rollouts by term."""

    breakdown: dict[str, np.ndarray]
    """By term: scores, float64 [n], higher is better."""
    failures: dict[str, np.ndarray]
    """By term: which scores failed, bool [n]."""
    places: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """By term that scores places: float64 [n, places], NaN rows for traces that cannot be scored by place."""

    @classmethod
    def joined(cls, parts: Sequence[TermScores]) -> TermScores:
        """Several parts concatenated in order."""
        names = parts[0].breakdown
        return cls(
            {name: np.concatenate([part.breakdown[name] for part in parts]) for name in names},
            {name: np.concatenate([part.failures[name] for part in parts]) for name in names},
            {
                name: stacked([part.places.get(name) for part in parts], [len(part.failures[name]) for part in parts])
                for name in names
                if any(name in part.places for part in parts)
            },
        )

    def taken(self, places: np.ndarray | slice) -> TermScores:
        """The scores of the rollouts at these indices."""
        return TermScores(
            {name: column[places] for name, column in self.breakdown.items()},
            {name: column[places] for name, column in self.failures.items()},
            {name: rows[places] for name, rows in self.places.items()},
        )


class RewardMixture:
    """Every term of a recipe, scored over batches of rollouts."""

    def __init__(self, config: RewardsConfig, device: torch.device | str = "cpu", *, with_places: bool = False):
        """Build the terms.

        device: where their networks score; with `rewards.offload` they are in host memory in between. with_places:
        also compute scores by place, for the terms that have them.
        """
        if not config.terms:
            raise ValueError("rewards.terms is empty; name at least one reward")
        self.config, self.device, self.with_places = config, torch.device(device), with_places
        resting = torch.device("cpu") if config.offload else self.device
        self.rewards = {name: build_reward(name, term, resting) for name, term in config.terms.items()}
        self.at_step(1)

    def at_step(self, step: int) -> None:
        """Set the weights of a step, counted from 1. Ramped weights depend only on the step, so a resumed run has the
        same ones."""
        self.weights = {name: weight_at(term, step) for name, term in self.config.terms.items()}

    def score(self, candidates: Sequence[Candidate]) -> GroupRewards:
        """Rewards of one group's rollouts."""
        return self.score_groups([candidates])[0]

    def score_groups(self, groups: Sequence[Sequence[Candidate]]) -> list[GroupRewards]:
        """Rewards of many groups."""
        candidates = [item for members in groups for item in members]
        places = batches_of_rank(len(candidates), self.config.batch_size, 0, 1)
        scores = self.score_batches([candidates[part.start : part.stop] for part in places])
        return self.groups(scores, [len(members) for members in groups])

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> TermScores:
        """Scores of the candidates of all batches, in order."""
        candidates = [item for batch in batches for item in batch]
        malformed = np.array([not item.trace.well_formed for item in candidates], dtype=bool)
        breakdown: dict[str, np.ndarray] = {}
        failures: dict[str, np.ndarray] = {}
        places: dict[str, np.ndarray] = {}
        for name, reward in self.rewards.items():
            with self._at_work(reward):
                scored = reward.score_batches(batches)
            breakdown[name] = np.concatenate([np.zeros(0), *(scores for scores, _ in scored)])
            failures[name] = np.concatenate([np.zeros(0, dtype=bool), *(broken for _, broken in scored)])
            # an image within a malformed trace must not be rewarded
            if reward.needs_image and self.config.gate_malformed:
                breakdown[name] = np.where(malformed, reward.range[0], breakdown[name])
            if self.with_places:
                scored_places = [reward.score_places(batch) for batch in batches]
                if any(rows is not None for rows in scored_places):
                    rows = stacked(scored_places, [len(batch) for batch in batches])
                    places[name] = np.where(malformed[:, None] & reward.needs_image, np.nan, rows)
        return TermScores(breakdown, failures, places)

    def groups(self, scores: TermScores, sizes: Sequence[int]) -> list[GroupRewards]:
        """Split scores into groups of the given sizes and weight them with the weights of the step."""
        ends = np.cumsum(sizes)
        return [self._group(scores.taken(slice(end - size, end))) for end, size in zip(ends, sizes, strict=True)]

    @contextmanager
    def _at_work(self, reward: Reward) -> Generator[None, None, None]:
        """Within this block an offloaded term's networks are on the device."""
        if not self.config.offload:
            yield
            return
        reward.to(self.device)
        try:
            yield
        finally:
            reward.to(torch.device("cpu"))

    def _group(self, scores: TermScores) -> GroupRewards:
        return GroupRewards(
            total=weighted_total(scores.breakdown, self.weights),
            breakdown={name: torch.from_numpy(column.copy()).float() for name, column in scores.breakdown.items()},
            weights=dict(self.weights),
            failures={name: int(broken.sum()) for name, broken in scores.failures.items()},
            places={name: torch.from_numpy(rows.copy()).float() for name, rows in scores.places.items()},
        )


def weighted_total(breakdown: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> torch.Tensor:
    """The reward of n rollouts, float32 [n]: the weighted sum of their scores by term, each float64 [n]."""
    return torch.from_numpy(np.asarray(sum(weights[name] * column for name, column in breakdown.items()))).float()


def stacked(parts: Sequence[np.ndarray | None], lengths: Sequence[int]) -> np.ndarray:
    """Parts [length, places] concatenated along the rows; NaN rows for a part that is None or has no places."""
    places = max(part.shape[1] for part in parts if part is not None)
    missing = [np.full((length, places), np.nan) for length in lengths]
    return np.concatenate(
        [empty if part is None or not part.size else part for part, empty in zip(parts, missing, strict=True)]
    )


def weight_at(term: RewardTerm, step: int) -> float:
    """The term's weight at a step: linear between the ends of its ramp, constant outside."""
    if term.final_weight is None or term.ramp_steps is None:
        return term.weight
    first, last = term.ramp_steps
    return float(np.interp(step, (first, last), (term.weight, term.final_weight)))


def build_reward(name: str, term: RewardTerm, device: torch.device | str = "cpu") -> Reward:
    """The reward of one recipe term. Raises ValueError naming the term and the invalid option."""
    match read_options(name, term):
        case HttpOptions() as options:
            kind = KINDS[term.kind]
            return HttpReward(name, options, needs_image=kind.needs_image, judges=kind.judges)
        case FormatOptions() as options:
            return FormatReward(options)
        case DegradationOptions() as options:
            return DegradationReward(options)
        case UnderstandingOptions() as options:
            return UnderstandingReward(options, device)
        case GenerationOptions() as options:
            return GenerationReward(options, device)
        case FidelityOptions() as options:
            return FidelityReward(options, device)
        case other:
            raise ValueError(f"rewards.terms.{name}: no reward reads {type(other).__name__}; add it in mixture.py")
