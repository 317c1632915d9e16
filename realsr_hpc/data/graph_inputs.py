"""A sample's drawn numbers as the small arrays that the DALI graph reads: kernels, resize tables, noise levels.

Pure NumPy. Pixels are float32 on 0..255 inside the graph, so levels of noise are of 255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from realsr_hpc.data.area import area_taps
from realsr_hpc.data.degradation import DegradationParameters, ResizeMode, StageParameters, noise_field
from realsr_hpc.data.kernels import KernelParameters, build_factors

SEPARABLE, PLAIN, STRIPS, NOTHING = range(4)
"""Ways to apply a kernel."""
NUM_STRIPS = 4
_STRIPS_FROM_PX = 13
"""OpenCV's filter, which DALI runs on a CPU, turns to a Fourier transform from 12 x 12 on; strips of the kernel stay
below that and are faster up to the largest side of 21."""
_FAST_TAPS = (2, 4)
"""Numbers of source rows a target row that the graph sums without a reduction."""


@dataclass(frozen=True)
class DegradationInput:
    """One sample as the graph takes it."""

    crop: UInt8[np.ndarray, "side side 3"]
    """Square cut of the photograph, already mirrored."""
    parameters: DegradationParameters
    noise_rng: np.random.Generator
    """Drawn from twice: the first stage's field, then the second's."""


def graph_inputs(sample: DegradationInput, gt_px: int, lq_px: int) -> dict[str, np.ndarray]:
    """The arrays of one sample by the name of the graph's source."""
    p = sample.parameters
    first, second = p.first, p.second
    return {
        "crop": sample.crop,
        **kernel_inputs("1", first.blur, gt_px),
        **kernel_inputs("2", second.blur, first.side_px),
        **kernel_inputs("3", p.final_sinc, lq_px),
        "noise1": noise_field(sample.noise_rng, first),
        "noise2": noise_field(sample.noise_rng, second),
        **resize_inputs("1", first.resize_mode, gt_px, first.side_px),
        **resize_inputs("2", second.resize_mode, first.side_px, second.side_px),
        **resize_inputs("3", p.final_resize_mode, second.side_px, lq_px),
        "noising1": noise_row(first),
        "noising2": noise_row(second),
        "quality": np.array([first.jpeg_quality, second.jpeg_quality, int(p.jpeg_last)], np.int32),
        "sides": np.array([sample.crop.shape[0] != gt_px], np.int32),
    }


def kernel_inputs(number: str, parameters: KernelParameters | None, image_px: int) -> dict[str, np.ndarray]:
    """The kernel and its column, how to apply them, and for strips the rows of an image with its borders.

    `way` is [way, image side, then the first kernel row of each strip and the end].
    """
    kernel, column = build_factors(parameters)
    way, reflected = SEPARABLE, np.zeros(1, np.int32)
    if parameters is None:
        way = NOTHING
    elif parameters.shape != "iso":
        way = STRIPS if parameters.size_px >= _STRIPS_FROM_PX else PLAIN
    if way == STRIPS:
        reflected = np.pad(np.arange(image_px, dtype=np.int32), parameters.size_px // 2, mode="reflect")
    starts = [part[0] for part in np.array_split(np.arange(max(kernel.shape[0], NUM_STRIPS)), NUM_STRIPS)]
    row = np.array([way, image_px, *starts, kernel.shape[0]], np.int32)
    return {f"kernel{number}": kernel, f"column{number}": column, f"way{number}": row, f"rows{number}": reflected}


def resize_inputs(number: str, mode: ResizeMode, source_px: int, target_px: int) -> dict[str, np.ndarray]:
    """Sides and mode: [source, target, taps of a target row, is area, is bicubic]; the area table where it is one."""
    taps = area_taps(source_px, target_px if mode == "area" else 1)
    count = next((fast for fast in _FAST_TAPS if taps.count <= fast), taps.count)
    taps = taps.with_count(count)
    row = np.array([source_px, target_px, count, mode == "area", mode == "bicubic"], np.int32)
    return {f"resize{number}": row, f"taps{number}": taps.index, f"weights{number}": taps.weights}


def noise_row(stage: StageParameters) -> np.ndarray:
    """[level, of 255 for Gaussian, a factor for Poisson; is Poisson; is gray]."""
    return np.array([stage.noise_level, stage.noise == "poisson", stage.gray], np.float32)
