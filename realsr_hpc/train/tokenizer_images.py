"""Images to train the tokenizer on: photographs, cropped at many scales, and synthetic images.

One image depends only on (seed, step, place in the batch), so a resumed run needs no data state. Crops span whole
scenes to native resolution because the tokenizer encodes the same scene at 32, 64 and 128 px; some are degraded
first because it also encodes LQ images. This degradation is approximate; the exact, labelled one is in data/.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from realsr_hpc.config.schema import RunConfig, TokenizerTrainingConfig
from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.data.shapes import dead_leaves
from realsr_hpc.data.signs import Ground, make_sign
from realsr_hpc.files import printable
from realsr_hpc.paths import resolve

logger = logging.getLogger(__name__)
CROP_DIVISORS = (1, 2, 2, 2, 4)
"""Crop sides of the steps, as divisors of `crop_px`; small crops come in larger batches, so steps cost the same."""
DECODED = 256
"""Number of decoded photographs kept in memory; the others of a larger set are decoded again."""
HELDOUT = 64
"""Largest number of held-out scenes to measure on."""


class Photographs(Sequence[Image.Image]):
    """RGB photographs, decoded on access; an unreadable one is logged and replaced by the next. ValueError: none."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self._unreadable = paths, set[Path]()
        self._decoded = functools.lru_cache(DECODED)(lambda path: Image.fromarray(decode_image(path)))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:  # pyright: ignore[reportIncompatibleMethodOverride]
        for number in range(index, index + len(self.paths)):
            path = self.paths[number % len(self.paths)]
            try:
                return self._decoded(path)
            except (BrokenImage, OSError) as error:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    count = len(self._unreadable)
                    logger.warning("%s skipped: %s (%d unreadable so far)", printable(path), error, count)
        raise ValueError(f"data.manifest: none of {len(self.paths)} photographs can be read, first {self.paths[0]}")


class Grounds(Sequence[Ground]):
    """The same photographs, as backgrounds of signs."""

    def __init__(self, photographs: Sequence[Image.Image]) -> None:
        self.photographs = photographs

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> Ground:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Ground(self.photographs[index], "a photograph")


class TokenizerImages:
    """Batches float32 [B, 3, side, side] in [-1, 1] of RGB photographs; made in `num_threads` threads."""

    def __init__(
        self, photographs: Sequence[Image.Image], config: TokenizerTrainingConfig, seed: int, num_threads: int = 1
    ) -> None:
        if not photographs:
            raise ValueError("data.train_split has no photograph: the tokenizer needs at least one")
        self.photographs, self.grounds = photographs, Grounds(photographs)
        self.config, self.seed = config, seed
        self.threads = ThreadPoolExecutor(num_threads)

    def batch(self, step: int) -> Float[Tensor, "B 3 side side"]:
        """The images of a step; `batch_size` counts images of `crop_px`."""
        rng = np.random.default_rng([self.seed, step])
        divisor = int(rng.choice(CROP_DIVISORS))
        side, size = self.config.crop_px // divisor, self.config.batch_size * divisor**2
        draws = [np.random.default_rng([self.seed, step, i]) for i in range(size)]
        images = np.stack(list(self.threads.map(functools.partial(self._image, side=side), draws)))
        return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1.0

    def _image(self, rng: np.random.Generator, side: int) -> UInt8[np.ndarray, "side side 3"]:
        kind, shapes = rng.random(), self.config.dead_leaves_share
        if kind < shapes:
            image = dead_leaves(rng, side)
        elif kind < shapes + self.config.signs_share:
            image = make_sign(rng, side, self.grounds).image
        else:
            image = _crop(rng, self.photographs[int(rng.integers(len(self.photographs)))], side)
        if rng.random() < self.config.degraded_share:
            image = _degrade(rng, image)
        return _recolour(rng, np.rot90(np.asarray(image), int(rng.integers(4)))[:, :: rng.choice((-1, 1))])


def _crop(rng: np.random.Generator, photograph: Image.Image, side: int) -> Image.Image:
    """A square between native resolution and the whole scene, log-uniform in scale, resized to `side`."""
    largest = min(photograph.size)
    smallest = min(side, largest)
    source = round(smallest * (largest / smallest) ** rng.random())
    left, top = (int(rng.integers(length - source + 1)) for length in photograph.size)
    box = (left, top, left + source, top + source)
    return photograph.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _degrade(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Blur, shrink, noise, JPEG, enlarge: about what an LQ image in the prompt looks like."""
    side = image.width
    small = max(8, round(side / rng.uniform(1, 4)))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.5)))).resize((small, small))
    pixels = np.asarray(image) + rng.normal(size=(small, small, 3)) * rng.uniform(0, 20)
    stored = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stored, "JPEG", quality=int(rng.integers(30, 96)))
    return Image.open(stored).resize((side, side), Image.Resampling.BICUBIC)


def _recolour(rng: np.random.Generator, image: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Leave half the images unchanged; permute and scale the others' channels, change saturation and brightness."""
    if rng.random() < 0.5:
        return image
    pixels = image[..., rng.permutation(3)].astype(np.float32)
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.3, 1.5)
    pixels *= rng.uniform(0.5, 1.3, 3)
    pixels = (pixels - 128) * rng.uniform(0.6, 1.2) + 128 + rng.uniform(-30, 30)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def photographs_of(config: RunConfig, split: str) -> Photographs:
    """The manifest's photographs of a split."""
    manifest = read_manifest(resolve(config.data.manifest)).split(split)
    return Photographs([manifest.path(entry) for entry in manifest.entries])


def heldout_images(config: RunConfig) -> Float[Tensor, "B 3 S S"]:
    """Whole held-out scenes (central squares) at `crop_px`, in [-1, 1]: the first HELDOUT of them."""
    size = config.tokenizer_training.crop_px
    photographs, squares = photographs_of(config, config.data.heldout_split), []
    for photograph in (photographs[index] for index in range(min(HELDOUT, len(photographs)))):
        side, (width, height) = min(photograph.size), photograph.size
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        square = photograph.resize((size, size), Image.Resampling.BICUBIC, box=box)
        squares.append(torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3))
    return torch.stack(squares).movedim(-1, 1).float() / 127.5 - 1.0
