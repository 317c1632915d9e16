"""Blur kernels of the second-order degradation, in NumPy: Gaussian, generalised Gaussian, plateau, sinc.

After BasicSR's `degradations.py` (Wang et al., Real-ESRGAN; generalised shapes from Liu et al., "Estimating
Generalized Gaussian Blur Kernels"). Every kernel is square, of odd side, non-negative except sinc, and sums to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import j1

Shape = Literal["iso", "aniso", "gen_iso", "gen_aniso", "plateau_iso", "plateau_aniso", "sinc"]
SHAPES: tuple[Shape, ...] = ("iso", "aniso", "gen_iso", "gen_aniso", "plateau_iso", "plateau_aniso")
"""The bell shapes, in the order of the published probabilities."""


@dataclass(frozen=True)
class KernelParameters:
    """Parameters of one kernel; fields that its shape does not use keep their defaults."""

    shape: Shape
    size_px: int
    """Side, odd."""
    sigma_x: float = 0.0
    """Standard deviation along the kernel's first axis, px of the image it is applied to."""
    sigma_y: float = 0.0
    rotation: float = 0.0
    """Radians, -pi..pi."""
    beta: float = 1.0
    """Exponent of the generalised and plateau shapes; 1 is the Gaussian."""
    omega: float = 0.0
    """Cut-off of the sinc filter, radians per px, up to pi."""


IDENTITY: Float32[np.ndarray, "1 1"] = np.ones((1, 1), np.float32)
"""The kernel that leaves an image unchanged."""


def build_kernel(parameters: KernelParameters | None) -> Float32[np.ndarray, "size size"]:
    """The kernel's weights; the identity for None."""
    if parameters is None:
        return IDENTITY
    weights = _sinc(parameters) if parameters.shape == "sinc" else _bell(parameters)
    return (weights / weights.sum()).astype(np.float32)


def build_factors(
    parameters: KernelParameters | None,
) -> tuple[Float32[np.ndarray, "rows columns"], Float32[np.ndarray, "size 1"]]:
    """Two kernels that, applied one after the other, equal that of `build_kernel`; cheaper if it is separable.

    The isotropic Gaussian, the most frequent shape, gives a row and a column; others their kernel and the identity.
    """
    if parameters is None or parameters.shape != "iso":
        return build_kernel(parameters), IDENTITY
    half = parameters.size_px // 2
    line = np.exp(-0.5 * (np.arange(-half, half + 1) / parameters.sigma_x) ** 2)
    line = (line / line.sum()).astype(np.float32)
    return line[None, :], line[:, None]


def _bell(parameters: KernelParameters) -> Float64[np.ndarray, "size size"]:
    """Gaussian exp(-q/2), generalised exp(-q^beta/2) or plateau 1/(1 + q^beta), q = x^T C^-1 x."""
    x, y = _grid(parameters.size_px)
    cos, sin = math.cos(parameters.rotation), math.sin(parameters.rotation)
    along, across = cos * x + sin * y, -sin * x + cos * y
    power = ((along / parameters.sigma_x) ** 2 + (across / parameters.sigma_y) ** 2) ** parameters.beta
    if parameters.shape.startswith("plateau"):
        return 1.0 / (power + 1.0)
    return np.exp(-0.5 * power)


def _sinc(parameters: KernelParameters) -> Float64[np.ndarray, "size size"]:
    """Circular low-pass filter: omega J1(omega r) / (2 pi r), omega^2 / (4 pi) at the centre."""
    x, y = _grid(parameters.size_px)
    radius = np.hypot(x, y)
    omega = parameters.omega
    centre = radius == 0
    safe = np.where(centre, 1.0, radius)
    return np.where(centre, omega**2 / (4 * math.pi), omega * j1(omega * safe) / (2 * math.pi * safe))


def _grid(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    if size_px < 1 or size_px % 2 == 0:
        raise ValueError(f"size_px of a kernel is {size_px}: it must be odd and positive, so that it has a centre")
    half = size_px // 2
    axis = np.arange(-half, half + 1, dtype=np.float64)
    return np.meshgrid(axis, axis)
