"""Restoration methods: bicubic, a folder of finished images, or any function of cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from realsr_hpc.artifacts import restoration
from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.naming import matched, plain_stem
from realsr_hpc.evaluate.sets import images_below, names_of
from realsr_hpc.files import printable
from realsr_hpc.records import Case, ParsedTrace, RestoredImage

log = logging.getLogger(__name__)
Method = Callable[[Sequence[Case]], list[RestoredImage]]
BICUBIC = "bicubic"
NO_TRACE = ParsedTrace(None, (None, None, None), (None, None, None), ("no trace: not a model's output",))


class Bicubic:
    """Pillow's bicubic resampling to the truth's size, or by the factor `upscale` if there is no truth."""

    def __init__(self, upscale: float):
        self.upscale = upscale

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """One image for each case."""
        return [finished(self._enlarge(case)) for case in cases]

    def _enlarge(self, case: Case) -> np.ndarray:
        shape = case.lq.shape if case.gt is None else case.gt.shape
        factor = self.upscale if case.gt is None else 1.0
        size = (round(shape[1] * factor), round(shape[0] * factor))
        return np.asarray(Image.fromarray(case.lq).resize(size, Image.Resampling.BICUBIC))


class FinishedImages:
    """Another method's results: a folder with one file per case, named like the case except for suffix and tags such as
    `_LR4`."""

    def __init__(self, folder: Path):
        """Raises ValueError if the folder holds no images."""
        self.folder = folder
        unread: dict[str, str] = {}
        found = [path for path in images_below(folder, unread) if not restoration.is_steps(path)]
        if not found:
            example = "".join(f" ({name}: {why})" for name, why in list(unread.items())[:1])
            raise ValueError(f"{folder}: no images found{example}; name the folder of the method's results")
        for name, why in unread.items():
            log.warning("left out: %s: %s", name, why)
        self._names = dict(zip(names_of(found, folder), found, strict=True))
        self._files: dict[str, Path] = dict(self._names)

    def expect(self, keys: Sequence[str]) -> None:
        """Find the file of each case. ValueError if several files match one case, or no file matches any."""
        names = list(self._names)
        stand_ins = [PurePath(f"{name}.png") for name in names]
        pairs, _ = matched([PurePath(f"{key}.png") for key in keys], stand_ins)
        self._files = {keys[place]: self._names[names[file]] for place, file in pairs}
        for key in keys:
            candidates = [str(self._names[name]) for name in names if plain_stem(PurePath(f"{name}.png")) == key]
            if key not in self._files and len(candidates) > 1:
                raise ValueError(f"{self.folder}: {', '.join(candidates[:3])} could all be {key}; keep only one")
        if keys and not pairs:
            raise ValueError(
                f"{self.folder}: no file has the name of an image of the set: found {names[0]}, expected {keys[0]}"
            )

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """The image of each case; None if its file is missing, or damaged, which is logged."""
        return [finished(self._read(case.key)) for case in cases]

    def _read(self, key: str) -> np.ndarray | None:
        if key not in self._files:
            return None
        try:
            return decode_image(self._files[key])
        except BrokenImage as error:
            log.warning("%s counts as not restored: %s", printable(self._files[key]), error)
            return None


DETERMINISTIC = (Bicubic, FinishedImages)
"""Methods that give the same image at each call, so that further draws are pointless."""


def finished(image: np.ndarray | None) -> RestoredImage:
    """A result that consists of an image without reasoning."""
    return RestoredImage(NO_TRACE, (None, None, image))
