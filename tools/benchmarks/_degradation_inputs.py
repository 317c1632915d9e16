"""The same crops and drawn degradations for whatever is compared."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from realsr_hpc.data.decoding import decode_image
from realsr_hpc.data.degradation import PRESETS, Stream, generator, sample_degradation
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.paths import project_root

UPSCALE = 4


def realesrgan_inputs(side: int, count: int) -> Callable[[], list[DegradationInput]]:
    """Makes `count` inputs of `side` px of the bundled photographs anew, each time the same: noise is used up."""
    manifest = read_manifest(project_root() / "recipes/assets/photographs/manifest.parquet")
    crops = [_crop(decode_image(manifest.path(entry)), side) for entry in manifest.entries[:count]]
    drawn = [
        sample_degradation(generator(0, i, Stream.DEGRADATION), PRESETS["realesrgan"], side, UPSCALE)
        for i in range(count)
    ]
    return lambda: [
        DegradationInput(crops[i % len(crops)], parameters, generator(0, i, Stream.NOISE))
        for i, parameters in enumerate(drawn)
    ]


def _crop(image: np.ndarray, side: int) -> np.ndarray:
    shorter = min(image.shape[:2])
    return cv2.resize(image[:shorter, :shorter], (side, side), interpolation=cv2.INTER_AREA)
