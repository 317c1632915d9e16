"""Turns a sample's drawn numbers into the small arrays that the DALI graph reads: kernels, resize tables, noise levels.

Pure NumPy. Inside the graph pixels are float32 in 0..255, and noise levels use the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from realsr_hpc.data.degradation import RESIZE_MODES, DegradationParameters, StageParameters, noise_field
from realsr_hpc.data.kernels import KernelParameters, build_factors
from realsr_hpc.pixels import resize_taps
from realsr_hpc.records import ResizeMode

WHOLE, SEPARABLE, NOTHING = range(3)
"""Ways to apply a kernel: as a 2-D filter, as a row and a column, not at all."""


@dataclass(frozen=True)
class DegradationInput:
    """Crop, drawn parameters and noise generator of one sample."""

    crop: UInt8[np.ndarray, "side side 3"]
    """Square window of the photograph, already mirrored."""
    parameters: DegradationParameters
    noise_rng: np.random.Generator
    """Draws two noise fields: for the first stage, then for the second."""


def graph_inputs(sample: DegradationInput, gt_px: int, lq_px: int, *, tables: bool) -> dict[str, np.ndarray]:
    """Arrays of one sample, by the name of the graph's input.

    tables: include the resize tables, which only DALI's own operators read.
    """
    p = sample.parameters
    first, second = p.first, p.second
    resizes: tuple[tuple[str, ResizeMode, int, int], ...] = (
        ("1", first.resize_mode, gt_px, first.side_px),
        ("2", second.resize_mode, first.side_px, second.side_px),
        ("3", p.final_resize_mode, second.side_px, lq_px),
    )
    table_arrays = [table_inputs(*resize) for resize in resizes] if tables else []
    return {
        "crop": sample.crop,
        **kernel_inputs("1", first.blur),
        **kernel_inputs("2", second.blur),
        **kernel_inputs("3", p.final_sinc),
        # one generator draws both fields, so their order matters
        "noise1": noise_field(sample.noise_rng, first),
        "noise2": noise_field(sample.noise_rng, second),
        **{f"resize{number}": resize_row(mode, source, side) for number, mode, source, side in resizes},
        "noising1": noise_row(first),
        "noising2": noise_row(second),
        "quality": np.array([first.jpeg_quality, second.jpeg_quality, int(p.jpeg_last)], np.int32),
        "sides": np.array([sample.crop.shape[0] != gt_px], np.int32),
        **{name: array for arrays in table_arrays for name, array in arrays.items()},
    }


def kernel_inputs(number: str, parameters: KernelParameters | None) -> dict[str, np.ndarray]:
    """How to apply a kernel (2-D, separable or none), the kernel, and its column if it is separable."""
    kernel, column = build_factors(parameters)
    way = NOTHING if parameters is None else SEPARABLE if column.size > 1 else WHOLE
    return {f"way{number}": np.array([way], np.int32), f"kernel{number}": kernel, f"column{number}": column}


def resize_row(mode: ResizeMode, source_px: int, target_px: int) -> np.ndarray:
    """int32 [3]: source side, target side, index of the mode."""
    return np.array([source_px, target_px, RESIZE_MODES.index(mode)], np.int32)


def table_inputs(number: str, mode: ResizeMode, source_px: int, target_px: int) -> dict[str, np.ndarray]:
    """Source rows of each target row [count, target], and their weights [count, target, 1]."""
    taps = resize_taps(source_px, target_px, mode)
    return {f"rows{number}": taps.index, f"weights{number}": taps.weights[..., None]}


def noise_row(stage: StageParameters) -> np.ndarray:
    """float32 [3]: level (Gaussian: standard deviation on 0..255, Poisson: a factor); is Poisson; is gray."""
    return np.array([stage.noise_level, stage.noise == "poisson", stage.gray], np.float32)
