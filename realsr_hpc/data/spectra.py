"""Frequency responses of the degradation's operators: blurs, resizes, JPEG. NumPy on small arrays.

A spectrum [8, 8] holds the power at positive frequencies: at the centres of eight equal parts of 0..pi radians per
pixel, vertically and horizontally, which is the resolution of JPEG's coefficients. Its mean is the variance of a pixel.
Borders are neglected, and a target pixel may have any phase relative to the source pixels. Gains are real because every
kernel here is symmetric about its centre.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Float64
from PIL import Image

from realsr_hpc.pixels import KEYS_A
from realsr_hpc.records import ResizeMode

BANDS = 8
CENTRES: Float64[np.ndarray, "8"] = (np.arange(BANDS) + 0.5) * math.pi / BANDS
"""Frequencies of a spectrum's rows and columns, radians per pixel."""
ALIASES = 2 * math.pi * np.arange(-4, 5)
"""Offsets of the frequencies that alias to one target frequency, radians per target pixel."""
PLACES = 16
"""Largest number of target pixels averaged over for an area resize, which weights each one differently."""


def kernel_gains(kernel: Float32[np.ndarray, "n n"], frequency: np.ndarray) -> Float64[np.ndarray, "2 f f"]:
    """Gain of a filter at (u, v) and at (u, -v), in radians per pixel down and across."""
    return _gains(kernel, _waves(frequency, len(kernel)))


def kernel_power(kernel: Float32[np.ndarray, "n n"]) -> Float64[np.ndarray, "8 8"]:
    """Squared gain at a spectrum's frequencies, the mean over (u, v) and (u, -v)."""
    return np.square(_gains(kernel, _centre_waves(len(kernel)))).mean(0)


def _gains(kernel: np.ndarray, waves: np.ndarray) -> np.ndarray:
    half = waves @ kernel
    return np.stack([(half @ waves.T).real, (half @ waves.conj().T).real])  # pyright: ignore[reportAttributeAccessIssue]


def _waves(frequency: np.ndarray, size: int) -> np.ndarray:
    return np.exp(1j * np.outer(frequency, np.arange(size) - size // 2))


@lru_cache
def _centre_waves(size: int) -> np.ndarray:
    return _waves(CENTRES, size)


def resize_gain(frequency: np.ndarray, source_px: int, target_px: int, mode: ResizeMode) -> np.ndarray:
    """Gain of a resize at frequencies in radians per source pixel; beyond pi the gain of the source's replicas."""
    if source_px == target_px:
        return np.ones_like(frequency)
    cycles = frequency / (2 * math.pi)
    if mode == "bilinear":
        return np.sinc(cycles) ** 2
    return _area_gain(cycles, source_px, target_px) if mode == "area" else _keys_gain(cycles)


def _area_gain(cycles: np.ndarray, source_px: int, target_px: int) -> np.ndarray:
    """Gain of `adaptive_avg_pool2d`: a target pixel is the mean of the source pixels that it overlaps."""
    rows = np.linspace(0, target_px - 1, min(target_px, PLACES)).astype(int)
    first = rows * source_px // target_px
    length = -(-(rows + 1) * source_px // target_px) - first
    away = first + length / 2 - (rows + 0.5) * source_px / target_px
    half = math.pi * cycles[..., None]
    one = np.where(np.abs(np.sin(half)) < 1e-6, 1e-6, np.sin(half))
    return (np.sin(half * length) / (length * one) * np.cos(2 * half * away)).mean(-1)


def _keys_gain(cycles: np.ndarray) -> np.ndarray:
    """Fourier transform of the cubic convolution kernel (Keys 1981)."""
    f = np.where(np.abs(cycles) < 1e-3, 1e-3, cycles)
    one, two, four = np.sinc(f), np.sinc(2 * f), np.sinc(4 * f)
    smooth, sharp = one**2 - two, 3 * two**2 - 2 * two - four
    return (3 * smooth + 2 * KEYS_A * sharp) / (math.pi * f) ** 2


@lru_cache(maxsize=4096)
def folding(source_px: int, target_px: int, mode: ResizeMode) -> Float64[np.ndarray, "8 8"]:
    """Matrix F of a resize along one dim: a source spectrum P becomes the target spectrum F P F^T, with aliasing."""
    if source_px == target_px:
        return np.eye(BANDS)
    ratio = target_px / source_px
    theta = (CENTRES[:, None] + ALIASES) * ratio
    # An area resize that enlarges repeats pixels; beyond pi its gain is that of a box filter.
    box = mode == "area" and ratio > 1
    gain = np.sinc(theta / (2 * math.pi)) if box else resize_gain(theta, source_px, target_px, mode)
    power = np.where(np.abs(theta) <= math.pi * (3 if ratio > 1 else 1), ratio * gain**2, 0.0)
    place = np.abs((theta + math.pi) % (2 * math.pi) - math.pi) * BANDS / math.pi - 0.5
    near = np.clip(1 - np.abs(place.clip(0, BANDS - 1)[..., None] - np.arange(BANDS)), 0, 1)
    return (power[..., None] * near).sum(1)


@lru_cache
def jpeg_steps(quality: int) -> tuple[Float64[np.ndarray, "8 8"], Float64[np.ndarray, "8 8"]]:
    """Quantisation steps of luma and chroma at a quality, as libjpeg writes them; rows are vertical frequencies."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, "JPEG", quality=quality)
    tables = Image.open(held).quantization  # type: ignore[attr-defined]
    luma, colour = (np.array(tables[number], np.float64).reshape(8, 8) for number in (0, 1))
    return luma, colour


def rounding_loss(variance: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Error of rounding a Gaussian coefficient to multiples of `step`, as a share of its variance."""
    return np.interp(0.5 * np.log(np.maximum(variance, 1e-9)) - np.log(step), _LOG_SIGMA, _LOSS)


def _rounding_losses(sigma: np.ndarray) -> np.ndarray:
    """Mean of (x - round(x))^2 over that of x^2, for normal x with these standard deviations in steps."""
    z = np.linspace(-8.0, 8.0, 4001)
    weights = np.exp(-0.5 * z * z) / np.exp(-0.5 * z * z).sum()
    x = sigma[:, None] * z
    return ((x - np.round(x)) ** 2 @ weights) / sigma**2


_LOG_SIGMA = np.linspace(math.log(0.03), math.log(30.0), 200)
_LOSS = _rounding_losses(np.exp(_LOG_SIGMA))
