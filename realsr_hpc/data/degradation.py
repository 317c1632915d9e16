"""Draws the parameters of a sample's second-order degradation.

Pure NumPy. A sample's crop, parameters and noise come from one Philox generator keyed on (seed, global sample index),
so they do not depend on sharding, batch size or threads. `dali_pipeline.py` applies them to pixels. Published values:
Real-ESRGAN's `train_realesrgan_x4plus` and SeeSR's milder variant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

from realsr_hpc.data.kernels import SHAPES, KernelParameters, Shape
from realsr_hpc.records import Resize, ResizeMode

Noise = Literal["gaussian", "poisson"]
Range = tuple[float, float]

RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
MIN_SIDE_PX = 8
"""Smallest side of an intermediate image: a JPEG block, and enough for the widest kernel's reflected border."""


@dataclass(frozen=True)
class StagePreset:
    """Ranges and probabilities of one stage."""

    resize_probabilities: tuple[float, float, float]
    """Probabilities of upsample, downsample and keep."""
    resize_range: Range
    gaussian_range: Range
    """Standard deviation, on 0..255."""
    poisson_range: Range
    """Factor on the noise of a photon count; 1: unchanged."""
    jpeg_range: tuple[int, int]
    """JPEG quality, both ends included."""
    blur_sigma: Range
    blur_probability: float = 1.0
    kernel_sizes_px: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    shape_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_probability: float = 0.1
    beta_generalised: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    gaussian_probability: float = 0.5
    gray_probability: float = 0.4


@dataclass(frozen=True)
class Preset:
    """Ranges and probabilities of both stages and of the final resize, JPEG and sinc filter."""

    first: StagePreset
    second: StagePreset
    final_sinc_probability: float = 0.8
    final_sinc_sizes_px: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    jpeg_last_probability: float = 0.5


PRESETS: dict[str, Preset] = {
    "realesrgan": Preset(
        first=StagePreset((0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0), (30, 95), (0.2, 3.0)),
        second=StagePreset(
            (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), (30, 95), (0.2, 1.5), blur_probability=0.8
        ),
    ),
    "seesr": Preset(
        first=StagePreset((0.2, 0.7, 0.1), (0.3, 1.5), (1.0, 15.0), (0.05, 2.0), (60, 95), (0.2, 3.0)),
        second=StagePreset(
            (0.3, 0.4, 0.3),
            (0.6, 1.2),
            (1.0, 12.0),
            (0.05, 1.0),
            (60, 100),
            (0.2, 1.5),
            blur_probability=0.5,
            kernel_sizes_px=(7, 9, 11),
        ),
    ),
}


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one stage: blur, resize and noise in this order, then its JPEG."""

    blur: KernelParameters | None
    resize: Resize
    resize_factor: float
    resize_mode: ResizeMode
    side_px: int
    """Side of the image after the resize, in px."""
    noise: Noise
    noise_level: float
    gray: bool
    """Whether the three channels share one noise field."""
    jpeg_quality: int


@dataclass(frozen=True)
class DegradationParameters:
    """Parameters of every operation on an image after its crop."""

    first: StageParameters
    second: StageParameters
    final_sinc: KernelParameters | None
    final_resize_mode: ResizeMode
    jpeg_last: bool
    """True: resize, sinc, JPEG. False: JPEG, resize, sinc."""


@dataclass(frozen=True)
class Crop:
    """Square window of a photograph, px, and whether it is mirrored left to right."""

    left: int
    top: int
    side: int
    flip: bool


class Stream(IntEnum):
    """Independent random streams of one key."""

    CROP = 0
    DEGRADATION = 1
    NOISE = 2
    ORDER = 3


def generator(seed: int, index: int, stream: Stream) -> np.random.Generator:
    """Philox generator keyed on (seed, index), whose counter starts in the stream's own part.

    `index` is the global sample index, or the epoch for `Stream.ORDER`.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, int(stream)]))


def sample_crop(rng: np.random.Generator, width: int, height: int, min_fraction: float, hflip: float) -> Crop:
    """A square at a random place, whose side is between `min_fraction` of the shorter side and all of it."""
    shorter = min(width, height)
    side = min(shorter, max(1, round(shorter * rng.uniform(min_fraction, 1.0))))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return Crop(left, top, side, bool(rng.random() < hflip))


def sample_degradation(
    rng: np.random.Generator, preset: Preset, gt_size_px: int, upscale: int
) -> DegradationParameters:
    """Draw the parameters of both stages and of the final operations.

    The first resize is relative to the truth's side, the second to the LQ image's, as published; sides below
    `MIN_SIDE_PX` are raised to it.
    """
    # The order of the draws must not change: a sample's degradation follows from it.
    first = _sample_stage(rng, preset.first, gt_size_px)
    second = _sample_stage(rng, preset.second, gt_size_px // upscale)
    sinc = None
    if rng.random() < preset.final_sinc_probability:
        sinc = KernelParameters(
            "sinc", int(rng.choice(preset.final_sinc_sizes_px)), omega=rng.uniform(math.pi / 3, math.pi)
        )
    mode = RESIZE_MODES[rng.integers(3)]
    return DegradationParameters(first, second, sinc, mode, bool(rng.random() < preset.jpeg_last_probability))


def _sample_stage(rng: np.random.Generator, preset: StagePreset, base_px: int) -> StageParameters:
    blur = _sample_blur(rng, preset) if rng.random() < preset.blur_probability else None
    word, factor = _sample_resize(rng, preset)
    mode = RESIZE_MODES[rng.integers(3)]
    gaussian = rng.random() < preset.gaussian_probability
    return StageParameters(
        blur=blur,
        resize=word,
        resize_factor=factor,
        resize_mode=mode,
        side_px=max(MIN_SIDE_PX, int(base_px * factor)),
        noise="gaussian" if gaussian else "poisson",
        noise_level=rng.uniform(*(preset.gaussian_range if gaussian else preset.poisson_range)),
        gray=bool(rng.random() < preset.gray_probability),
        jpeg_quality=int(rng.integers(*preset.jpeg_range, endpoint=True)),
    )


def _sample_resize(rng: np.random.Generator, preset: StagePreset) -> tuple[Resize, float]:
    words: tuple[Resize, ...] = get_args(Resize)
    word = words[rng.choice(3, p=preset.resize_probabilities)]
    low, high = preset.resize_range
    ranges = {"upsample": (1.0, high), "downsample": (low, 1.0), "keep": (1.0, 1.0)}
    return word, rng.uniform(*ranges[word])


def _sample_blur(rng: np.random.Generator, preset: StagePreset) -> KernelParameters:
    size_px = int(rng.choice(preset.kernel_sizes_px))
    if rng.random() < preset.sinc_probability:
        lowest = sinc_omega_range(size_px)[0]
        return KernelParameters("sinc", size_px, omega=rng.uniform(lowest, math.pi))
    shape = SHAPES[rng.choice(len(SHAPES), p=preset.shape_probabilities)]
    sigma_x = rng.uniform(*preset.blur_sigma)
    if not shape.endswith("aniso"):
        return KernelParameters(shape, size_px, sigma_x, sigma_x, 0.0, _sample_beta(rng, preset, shape))
    sigma_y, rotation = rng.uniform(*preset.blur_sigma), rng.uniform(-math.pi, math.pi)
    return KernelParameters(shape, size_px, sigma_x, sigma_y, rotation, _sample_beta(rng, preset, shape))


def _sample_beta(rng: np.random.Generator, preset: StagePreset, shape: Shape) -> float:
    """The shape's exponent; below 1 in half of the draws, as published."""
    if shape in ("iso", "aniso"):
        return 1.0
    low, high = preset.beta_generalised if shape.startswith("gen") else preset.beta_plateau
    return rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)


def sinc_omega_range(size_px: int) -> Range:
    """Lowest and highest cut-off, in radians per px, for a sinc kernel of this side.

    Small kernels cannot represent low cut-offs.
    """
    return (math.pi / 3 if size_px < 13 else math.pi / 5, math.pi)


def noise_field(rng: np.random.Generator, stage: StageParameters) -> Float32[np.ndarray, "side side 3"]:
    """Standard normal noise [side, side, 3] for the image after the stage's resize; equal channels if `stage.gray`."""
    channels = 1 if stage.gray else 3
    field = rng.standard_normal((stage.side_px, stage.side_px, channels), dtype=np.float32)
    return np.repeat(field, 3, axis=2) if stage.gray else field
