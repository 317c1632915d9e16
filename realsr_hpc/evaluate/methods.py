"""What restores: bicubic, a folder of finished images, or whatever is called with cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.evaluate.cases import Case
from realsr_hpc.evaluate.sets import stems
from realsr_hpc.records import ParsedTrace, RestoredImage

log = logging.getLogger(__name__)
Method = Callable[[Sequence[Case]], list[RestoredImage]]
BICUBIC = "bicubic"
NO_TRACE = ParsedTrace(None, (None, None, None), (None, None, None), ("no trace: not a model's output",))


class Bicubic:
    """Pillow's bicubic to the truth's size, or by `upscale` where there is no truth."""

    def __init__(self, upscale: float):
        self.upscale = upscale

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """One image each."""
        return [finished(self._enlarge(case)) for case in cases]

    def _enlarge(self, case: Case) -> np.ndarray:
        shape = case.lq.shape if case.gt is None else case.gt.shape
        factor = self.upscale if case.gt is None else 1.0
        size = (round(shape[1] * factor), round(shape[0] * factor))
        return np.asarray(Image.fromarray(case.lq).resize(size, Image.Resampling.BICUBIC))


class FinishedImages:
    """Another method's results: a folder with one file a case, of its name (endings and tags like _LR4 aside)."""

    def __init__(self, folder: Path):
        """ValueError when the folder holds no images."""
        self.folder = folder
        self.files = stems(folder)
        if not self.files:
            raise ValueError(f"images={folder}: no images there; name the folder of the method's results")

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """The file of each case; none where it is missing, or broken, which is said."""
        return [finished(self._read(case.key)) for case in cases]

    def _read(self, key: str) -> np.ndarray | None:
        if key not in self.files:
            return None
        try:
            return decode_image(self.files[key])
        except BrokenImage as error:
            log.warning("%s counts as not restored: %s", self.files[key], error)
            return None


def finished(image: np.ndarray | None) -> RestoredImage:
    """An image without reasoning."""
    return RestoredImage(image, NO_TRACE, (None, None, None))
