"""Means with bootstrap intervals over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """Mean over images with its 95 % bootstrap interval (percentile, resampled over images)."""

    mean: float
    low: float
    high: float
    num_images: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.num_images else "–"


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of the finite values with its 95 % percentile interval."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed).integers(0, len(values), (_NUM_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), len(values))
