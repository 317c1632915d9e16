"""Statistics over several draws of one image: best, mean and worst.

One draw per image does not show how much a sampling method varies. So each image may be restored `M` times: best, mean
and worst of M are means over images of each image's best, mean and worst value; the worst tenth is the mean over the
tenth of the images whose mean over draws is worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from realsr_hpc.evaluate.intervals import Interval, bootstrap
from realsr_hpc.records import Case

_DRAW_STRIDE = 1 << 24
"""A case's index seeds its draw; further draws add multiples of this, which exceeds the size of any set."""


@dataclass(frozen=True)
class OverDraws:
    """One metric of one method, over images and draws."""

    best: Interval
    mean: Interval
    worst: Interval
    worst_tenth: float


def redrawn(cases: Sequence[Case], draw: int) -> list[Case]:
    """The same cases with the indices of draw number `draw`; draw 0 leaves them unchanged."""
    return [replace(case, index=case.index + draw * _DRAW_STRIDE) for case in cases]


def over_draws(values: np.ndarray, *, lower_is_better: bool) -> OverDraws:
    """Statistics of values [images, draws]. NaN marks a missing value; images without any value are ignored."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values).any(axis=1)]
    low, high = (np.nanmin(values, axis=1), np.nanmax(values, axis=1)) if len(values) else (np.empty(0), np.empty(0))
    best, worst = (low, high) if lower_is_better else (high, low)
    means = np.nanmean(values, axis=1) if len(values) else np.empty(0)
    return OverDraws(bootstrap(best), bootstrap(means), bootstrap(worst), worst_tenth(means, lower_is_better))


def worst_tenth(values: np.ndarray, lower_is_better: bool) -> float:
    """Mean of the worst tenth of the finite values (at least one value); NaN if there are none."""
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        return float("nan")
    count = max(1, round(len(values) / 10))
    return float((values[-count:] if lower_is_better else values[:count]).mean())
