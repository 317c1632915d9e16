"""Images of equal size are measured in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def same_shapes(images: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """Images of one shape stacked for batched scoring: (their places, uint8 [n, H, W, 3]) a shape."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    return [(where, np.stack([images[i] for i in where])) for where in places.values()]
