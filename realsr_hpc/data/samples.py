"""Makes the sample of a global index: its photograph, crop window and degradation parameters.

Each epoch has its own order, a permutation that depends on (seed, epoch). Everything else depends on (seed, index), and
nothing on batches, ranks or threads. A photograph that cannot be used is skipped, counted and named; the next one in
the order of the epoch takes its place under the same index.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.degradation import (
    Crop,
    DegradationParameters,
    Preset,
    Stream,
    generator,
    sample_crop,
    sample_degradation,
)
from realsr_hpc.data.manifest import Manifest, ManifestEntry, caption_fault
from realsr_hpc.files import printable

logger = logging.getLogger(__name__)
_logged: set[tuple[Path, str]] = set()
"""Photographs already logged as left out: once per process, even if several loaders read the same manifest."""
MIN_PHOTOGRAPH_PX = 32
"""Photographs with a shorter side below this are not used as truths."""

Pixels = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Geometry:
    """Sizes and shares that determine crop windows."""

    gt_size_px: int
    upscale: int
    min_scene_fraction: float
    hflip: float

    @property
    def lq_size_px(self) -> int:
        """Side of the degraded image."""
        return self.gt_size_px // self.upscale


@dataclass(frozen=True)
class Sample:
    """A window of a photograph; images are RGB uint8 [h, w, 3].

    unpaired: `gt` is the square window at its original size, and `parameters` is the degradation to apply. paired: `gt`
    and `lq` are windows at their final sizes. lq_only: only `lq`.
    """

    index: int
    entry: ManifestEntry
    gt: Pixels | None
    lq: Pixels | None
    parameters: DegradationParameters | None


class Samples:
    """Samples of one split, by global index."""

    def __init__(
        self,
        manifest: Manifest,
        mode: Literal["unpaired", "paired", "lq_only"],
        geometry: Geometry,
        preset: Preset,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.manifest, self.mode, self.geometry, self.preset = manifest, mode, geometry, preset
        self.seed, self.shuffle = seed, shuffle
        self.skipped: dict[str, str] = {}
        """Reason, by key, for every photograph that could not be used so far."""
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    def __getitem__(self, index: int) -> Sample:
        """The sample of a global index.

        Raises:
            ValueError: if no photograph of the split can be used.
        """
        epoch, place = divmod(index, len(self.manifest))
        order = self._epoch_order(epoch)
        for step in range(len(order)):
            entry = self.manifest.entries[order[(place + step) % len(order)]]
            if entry.key in self.skipped:
                continue
            try:
                return self._make(index, entry)
            except BrokenImage as error:
                self._skip(entry, str(error))
        reasons = printable("; ".join(f"{key}: {why}" for key, why in list(self.skipped.items())[:5]))
        raise ValueError(
            f"data.manifest: none of the {len(order)} photographs of {self.manifest.root} can be used: {reasons}"
        )

    def _skip(self, entry: ManifestEntry, why: str) -> None:
        self.skipped[entry.key] = why
        if (self.manifest.root, entry.key) not in _logged:
            _logged.add((self.manifest.root, entry.key))
            logger.warning("left out: %s: %s", printable(entry.key), printable(why))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.manifest))
        known, order = self._order
        if known != epoch:
            order = generator(self.seed, epoch, Stream.ORDER).permutation(len(self.manifest))
            self._order = (epoch, order)
        return order

    def _make(self, index: int, entry: ManifestEntry) -> Sample:
        if fault := caption_fault(entry.scene.captions if entry.scene else ()):
            raise BrokenImage(fault)
        rng = generator(self.seed, index, Stream.CROP)
        if self.mode == "unpaired":
            return self._unpaired(index, entry, rng)
        if self.mode == "paired":
            return self._paired(index, entry, rng)
        image = _decode_at_least(self.manifest.path(entry), self.geometry.lq_size_px)
        crop = _window(rng, image, self.geometry.lq_size_px, self.geometry.hflip)
        return Sample(index, entry, None, cut(image, crop), None)

    def _unpaired(self, index: int, entry: ManifestEntry, rng: np.random.Generator) -> Sample:
        geometry = self.geometry
        image = _decode_at_least(self.manifest.path(entry), MIN_PHOTOGRAPH_PX)
        height, width = image.shape[:2]
        crop = sample_crop(rng, width, height, geometry.min_scene_fraction, geometry.hflip)
        if entry.word:  # part of a word, or its mirror image, would make its captions untrue
            side = min(width, height)
            crop = Crop((width - side) // 2, (height - side) // 2, side, False)
        drawn = sample_degradation(
            generator(self.seed, index, Stream.DEGRADATION), self.preset, geometry.gt_size_px, geometry.upscale
        )
        return Sample(index, entry, cut(image, crop), None, drawn)

    def _paired(self, index: int, entry: ManifestEntry, rng: np.random.Generator) -> Sample:
        """A pair of windows at native resolution: resampling would alter the real degradation."""
        upscale = self.geometry.upscale
        try:
            partner = self.manifest.lq_path(entry)
        except ValueError as error:
            raise BrokenImage(f"pair: {error}") from None
        truth, low = decode_image(self.manifest.path(entry)), decode_image(partner)
        lq, gt = fitted(low, truth, upscale)
        _refuse_small(lq, self.geometry.lq_size_px)
        crop = _window(rng, lq, self.geometry.lq_size_px, self.geometry.hflip)
        large = Crop(crop.left * upscale, crop.top * upscale, crop.side * upscale, crop.flip)
        return Sample(index, entry, cut(gt, large), cut(lq, crop), None)


def fitted(lq: Pixels, gt: Pixels, upscale: int) -> tuple[Pixels, Pixels]:
    """A pair whose sizes differ by `upscale`. If they are equal (RealSR as released), the LQ image is averaged down.

    Raises:
        BrokenImage: `pair`, if the sizes are neither equal nor differ by the factor `upscale`.
    """
    if lq.shape == gt.shape and min(gt.shape[:2]) >= upscale:
        gt = gt[: gt.shape[0] // upscale * upscale, : gt.shape[1] // upscale * upscale]
        lq = np.asarray(Image.fromarray(lq[: gt.shape[0], : gt.shape[1]]).reduce(upscale))
    if gt.shape[:2] != (lq.shape[0] * upscale, lq.shape[1] * upscale):
        raise BrokenImage(f"pair: truth {gt.shape[:2]} is not {upscale} x low quality {lq.shape[:2]}")
    return lq, gt


def cut(image: Pixels, crop: Crop) -> UInt8[np.ndarray, "side side 3"]:
    """The crop's window of an image [h, w, 3], mirrored if `crop.flip`."""
    window = image[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    return np.ascontiguousarray(window[:, ::-1] if crop.flip else window)


def _window(rng: np.random.Generator, image: Pixels, side: int, hflip: float) -> Crop:
    height, width = image.shape[:2]
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return Crop(left, top, side, bool(rng.random() < hflip))


def _decode_at_least(path: Path, side: int) -> Pixels:
    image = decode_image(path)
    _refuse_small(image, side)
    return image


def _refuse_small(image: Pixels, side: int) -> None:
    if min(image.shape[:2]) < side:
        raise BrokenImage(f"small: {image.shape[1]}x{image.shape[0]} px, at least {side} px a side are needed")
