# pyright: strict, reportUnknownMemberType=false
"""Generation reward: the quality of the final image, by an expert without a reference.

Experts: `niqe` (natural scene statistics, quality/niqe.py), `ranker` (a small CNN trained to rank degradations,
quality/ranker.py) and `pyiqa` (its no-reference metrics, with weights staged by the user). docs/rewards.md compares
them. Mapping to [0, 1]: niqe -> 1 / (1 + (d / half)^2), where `half` is the distance that scores 1/2; ranker ->
logistic function of its score, which is about 2 for clean and -2 for heavily degraded images; pyiqa -> its stated range
and direction. The score is multiplied by the stripe guard, unless the recipe turns that off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from realsr_hpc.config.reward_options import GenerationOptions
from realsr_hpc.paths import resolve
from realsr_hpc.quality.niqe import NIQEModel, niqe
from realsr_hpc.quality.ranker import Ranker
from realsr_hpc.quality.stripes import stripe_guard
from realsr_hpc.records import Candidate
from realsr_hpc.rewards.base import FINAL_IMAGE, Reward

NIQE_PATH = "recipes/assets/tiny/niqe_pristine.npz"
RANKER_PATH = "recipes/assets/tiny/ranker.safetensors"
NIQE_HALF = 6.0
"""NIQE distance that scores 1/2."""


class Expert(Protocol):
    """A function that rates images."""

    def __call__(self, images: Sequence[np.ndarray], /) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        ...

    def to(self, device: torch.device, /) -> None:
        """Move the expert to a device."""
        ...


class GenerationReward(Reward):
    """Score of an expert on the final image."""

    needs_image = True
    judges = FINAL_IMAGE

    def __init__(self, options: GenerationOptions, device: torch.device | str = "cpu"):
        self.options = options
        self.expert = build_expert(options, device)

    def to(self, device: torch.device) -> None:
        """Move the expert."""
        self.expert.to(device)

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        images = [item.image for item in candidates if item.image is not None]
        scores = self.expert(images)
        return scores * stripe_guard(images, [item.gt for item in candidates]) if self.options.stripe_guard else scores

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """Scores by place [n, codes]: the score plus the first-order contribution of each place, so that their mean is
        the score.

        Only for the ranker, whose score is a statistic over positions; None for the other experts.
        """
        grids = {item.trace.images[-1].shape for item in candidates if item.trace.images[-1] is not None}
        if not isinstance(self.expert, _Ranked) or not grids:
            return None
        [shape] = grids
        scores = np.full((len(candidates), shape[0] * shape[1]), np.nan)
        shown = [(number, item) for number, item in enumerate(candidates) if item.image is not None]
        images = [item.image for _, item in shown if item.image is not None]
        fields = self.expert.places(images)  # [n, h, w]
        if self.options.stripe_guard:
            fields *= stripe_guard(images, [item.gt for _, item in shown])[:, None, None]
        places = torch.nn.functional.interpolate(torch.from_numpy(fields)[:, None], shape, mode="nearest")
        scores[[number for number, _ in shown]] = places.flatten(1).numpy()
        return scores


def build_expert(options: GenerationOptions, device: torch.device | str = "cpu") -> Expert:
    """The expert that the options name, on its device.

    It maps RGB uint8 images [H, W, 3] to scores [n] in [0, 1], higher is better, NaN for images that are too small.
    """
    if options.expert == "pyiqa":
        from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics

        return PyiqaMetrics(options.metrics, options.weights_dir, device)
    if options.expert == "niqe":
        return _Niqe(NIQEModel.load(resolve(options.weights or NIQE_PATH)), device)
    return _Ranked(Ranker.load(resolve(options.weights or RANKER_PATH)).to(device))


class _Niqe:
    def __init__(self, model: NIQEModel, device: torch.device | str):
        self.model, self.device = model, device

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return niqe_to_unit(niqe(images, self.model, self.device))

    def to(self, device: torch.device) -> None:
        self.device = device


class _Ranked:
    def __init__(self, ranker: Ranker):
        self.ranker = ranker

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return sigmoid(self.ranker.score(images))

    def places(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Scores of images of one size plus the first-order contribution of each position, float64 [n, h, w]."""
        scores, shares = self.ranker.shares(images)
        score = sigmoid(scores)[:, None, None]
        return score + score * (1.0 - score) * shares  # chain rule: times the derivative of the sigmoid

    def to(self, device: torch.device) -> None:
        self.ranker.to(device)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Logistic function, elementwise."""
    return 1.0 / (1.0 + np.exp(-scores))


def niqe_to_unit(distance: np.ndarray) -> np.ndarray:
    """Map distances to scores: 1 at distance 0, 1/2 at `NIQE_HALF`, decreasing to 0."""
    return 1.0 / (1.0 + (distance / NIQE_HALF) ** 2)
