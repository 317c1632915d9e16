"""Combines several restored images of one input: takes the one that an expert rates highest, or their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from realsr_hpc.config.restoring import refuse_unknown_choice
from realsr_hpc.config.reward_options import FidelityOptions, GenerationOptions
from realsr_hpc.records import Case, RestoredImage
from realsr_hpc.rewards.fidelity import FidelityReward
from realsr_hpc.rewards.generation import build_expert

Expert = Callable[[Sequence[RestoredImage], Case], np.ndarray]
"""Results and their case -> one score each; higher is better, NaN if a result cannot be scored."""


class ManyRestorer(Protocol):
    """A restorer that can return several results for each input (`PolicyRestorer`)."""

    def candidates(self, cases: Sequence[Case], count: int) -> list[list[RestoredImage]]:
        """`count` results of each case."""
        ...


@dataclass(frozen=True)
class Chosen(RestoredImage):
    """The chosen result and the expert's score of each candidate."""

    chosen: int
    """Number of the chosen candidate; -1: the mean of all."""
    scores: tuple[float, ...]


class BestOf:
    """A restorer that samples `count` candidates and keeps one."""

    def __init__(self, restorer: ManyRestorer, count: int, expert: Expert | None):
        """expert: from `build_chooser`; None: take the mean."""
        self.restorer, self.count, self.expert = restorer, count, expert

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """The chosen candidate of each case. One without an image is chosen only if no candidate has an image."""
        found = self.restorer.candidates(cases, self.count)
        return [self._choose(candidates, case) for candidates, case in zip(found, cases, strict=True)]

    def _choose(self, found: list[RestoredImage], case: Case) -> RestoredImage:
        given = [item for item in found if item.image is not None]
        if not given:
            return found[0]
        if self.expert is None:
            return _mean(given)
        scores = np.full(len(found), -np.inf)  # candidates without an image or a score rank last
        scores[[item.image is not None for item in found]] = np.nan_to_num(self.expert(given, case), nan=-np.inf)
        best = int(scores.argmax())
        item = found[best]
        return Chosen(item.trace, item.images, best, tuple(scores.tolist()))


def build_chooser(choice: str, weights_dir: str | None = None) -> Expert | None:
    """The expert named `choice`: one of `config.restoring.CHOICES` or pyiqa:METRIC. None for `mean`.

    Raises ValueError for any other name, or if its weights are missing.
    """
    refuse_unknown_choice(choice)
    if choice == "mean":
        return None
    if choice == "fidelity":
        reward = FidelityReward(FidelityOptions())
        return lambda found, case: reward.score([case.candidate(item.trace, item.image) for item in found])
    kind, _, metric = choice.partition(":")
    options = (
        GenerationOptions(expert="pyiqa", metrics=[metric], weights_dir=weights_dir)
        if kind == "pyiqa"
        else GenerationOptions(expert=choice)  # type: ignore[arg-type]
    )
    expert = build_expert(options)
    return lambda found, case: expert([item.image for item in found if item.image is not None])


def _mean(given: list[RestoredImage]) -> RestoredImage:
    """Pixel means of the rough, middle and final images, with the texts of the candidate nearest to the mean."""
    # [candidates, H, W, 3]
    finals = np.stack([item.image for item in given if item.image is not None]).astype(np.float32)
    distances = np.square(finals - finals.mean(0)).mean((1, 2, 3))
    nearest = given[int(distances.argmin())]
    images = tuple(_mean_of(sizes) for sizes in zip(*(item.images for item in given), strict=True))
    return Chosen(nearest.trace, images, -1, tuple((-distances).tolist()))  # type: ignore[arg-type]


def _mean_of(images: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [image for image in images if image is not None]
    return np.stack(known).astype(np.float32).mean(0).round().astype(np.uint8) if known else None
