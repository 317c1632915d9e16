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
    """`count` source rows for each of `target` rows, and their weights; those of one target row sum to 1."""

    index: Int32[np.ndarray, "count target"]
    weights: Float32[np.ndarray, "count target 1"]

    @property
    def count(self) -> int:
        """Source rows a target row takes; unused ones weigh 0."""
        return len(self.index)

    def with_count(self, count: int) -> AreaTaps:
        """The same with unused rows up to `count`."""
        more = count - self.count
        index = np.pad(self.index, ((0, more), (0, 0)), mode="edge")
        return AreaTaps(index, np.pad(self.weights, ((0, more), (0, 0), (0, 0))))


def area_taps(source_px: int, target_px: int) -> AreaTaps:
    """The table of one pair of sides, shrinking or enlarging."""
    rows = np.arange(target_px)
    first = rows * source_px // target_px
    last = -(-(rows + 1) * source_px // target_px)
    lengths = (last - first)[None, :]
    offsets = np.arange(lengths.max())[:, None]
    index = np.minimum(first[None, :] + offsets, source_px - 1)
    weights = (offsets < lengths) / lengths
    return AreaTaps(index.astype(np.int32), weights.astype(np.float32)[..., None])
