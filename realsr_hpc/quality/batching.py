"""Groups images of equal size into batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def same_shapes(images: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """For each shape among the images: their indices, and the images stacked as uint8 [n, H, W, 3]."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    return [(where, np.stack([images[i] for i in where])) for where in places.values()]
