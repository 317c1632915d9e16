"""Area resize as a table: which source rows make each target row, and with what weights.

The same as `torch.nn.functional.interpolate(mode="area")`, which Real-ESRGAN's degradation uses: a target pixel is
the mean of all source pixels it touches. Separable: rows and columns of a square image take the same table. DALI has
no such resize.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True)
class AreaTaps:
    """`target_px * count` source rows, grouped by target row, and their weights; each group sums to 1."""

    index: Int32[np.ndarray, " taps"]
    weights: Float32[np.ndarray, "taps 1"]
    count: int
    """Source rows a target row takes; unused ones weigh 0."""


def area_taps(source_px: int, target_px: int) -> AreaTaps:
    """The table of one pair of sides, shrinking or enlarging."""
    rows = np.arange(target_px)
    first = rows * source_px // target_px
    last = -(-(rows + 1) * source_px // target_px)
    lengths = (last - first)[:, None]
    offsets = np.arange(lengths.max())[None, :]
    index = np.minimum(first[:, None] + offsets, source_px - 1)
    weights = (offsets < lengths) / lengths
    return AreaTaps(index.astype(np.int32).ravel(), weights.astype(np.float32).reshape(-1, 1), offsets.shape[1])
