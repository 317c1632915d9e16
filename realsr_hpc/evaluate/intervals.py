"""Means with bootstrap intervals over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

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
    """Mean of the finite values of an array [images], with its 95 % percentile interval; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    if len(values) == 1:  # nothing to resample
        return Interval(mean, mean, mean, 1)
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((values,), np.mean, n_resamples=_NUM_RESAMPLES, method="percentile", rng=rng)
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high), len(values))
