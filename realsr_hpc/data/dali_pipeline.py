"""What the drawn numbers do to pixels: one DALI graph for crop -> truth -> degraded image.

Nothing is drawn here: kernels, noise and parameters come in with each sample, so a sample's bytes do not depend on
its place in a batch or on the threads. One description serves the CPU (`device_id=None`, what the tests run) and a GPU,
where pixels, kernels and noise are uploaded and every operator has its device version.

Stated differences from Real-ESRGAN's own operators: bicubic has a = -0.5 (theirs -0.75); Poisson is its normal
approximation with the same mean and variance, its value not rounded to 8 bits first and its photon count taken from
the image's span of levels (theirs from the number of levels in use); JPEG is libjpeg's (theirs a differentiable
imitation of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from jaxtyping import UInt8
from nvidia.dali import pipeline_def

from realsr_hpc.data.area import area_taps
from realsr_hpc.data.degradation import DegradationParameters, ResizeMode, StageParameters, noise_field
from realsr_hpc.data.kernels import KernelParameters, build_factors

_LUMA = np.array([[[0.2989, 0.587, 0.114]]], np.float32)
"""Weights of R, G, B in a gray value (ITU-R 601), as PyTorch's and BasicSR's."""
_USM_BLUR = KernelParameters("iso", 51, 8.0, 8.0)
_USM_AMOUNT, _USM_THRESHOLD = 0.5, 10.0
"""BasicSR's USMSharp: radius 50 (made odd), the sigma OpenCV derives from it; amount, and threshold of 255."""


@dataclass(frozen=True)
class DegradationInput:
    """One sample as the graph takes it."""

    crop: UInt8[np.ndarray, "side side 3"]
    """Square cut of the photograph, already mirrored."""
    parameters: DegradationParameters
    noise_rng: np.random.Generator
    """Drawn from twice: the first stage's field, then the second's."""


class DegradationPipeline:
    """Runs batches of up to `max_batch_size` samples through the graph, one at a time, nothing prefetched."""

    def __init__(
        self,
        max_batch_size: int,
        gt_size_px: int,
        upscale: int,
        *,
        usm_sharpen_gt: bool,
        num_threads: int = 1,
        device_id: int | None = None,
    ) -> None:
        self.gt_size_px, self.lq_size_px = gt_size_px, gt_size_px // upscale
        self._pipeline = _graph(
            gt_size_px,
            self.lq_size_px,
            usm_sharpen_gt,
            device_id is not None,
            batch_size=max_batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        self._pipeline.build()

    def run(
        self, samples: Sequence[DegradationInput]
    ) -> tuple[UInt8[np.ndarray, "B h w 3"], UInt8[np.ndarray, "B H W 3"]]:
        """Degraded images and truths of the samples, in their order."""
        rows = [self._feed(sample) for sample in samples]
        for name in rows[0]:
            self._pipeline.feed_input(name, [row[name] for row in rows])
        lq, gt = self._pipeline.run()
        # Copies: DALI writes its next batch into the same memory.
        return np.array(lq.as_cpu().as_array()), np.array(gt.as_cpu().as_array())

    def _feed(self, sample: DegradationInput) -> dict[str, np.ndarray]:
        p = sample.parameters
        first, second, lq_px = p.first, p.second, self.lq_size_px
        return {
            "crop": sample.crop,
            **_kernel_inputs("1", first.blur),
            **_kernel_inputs("2", second.blur),
            **_kernel_inputs("3", p.final_sinc),
            "noise1": noise_field(sample.noise_rng, first),
            "noise2": noise_field(sample.noise_rng, second),
            **_resize_inputs("1", first.resize_mode, self.gt_size_px, first.side_px),
            **_resize_inputs("2", second.resize_mode, first.side_px, second.side_px),
            **_resize_inputs("3", p.final_resize_mode, second.side_px, lq_px),
            "noising1": _noise_row(first),
            "noising2": _noise_row(second),
            "quality": np.array([first.jpeg_quality, second.jpeg_quality, int(p.jpeg_last)], np.int32),
        }


def _kernel_inputs(number: str, parameters: KernelParameters | None) -> dict[str, np.ndarray]:
    kernel, column = build_factors(parameters)
    return {f"kernel{number}": kernel, f"column{number}": column}


def _resize_inputs(number: str, mode: ResizeMode, source_px: int, target_px: int) -> dict[str, np.ndarray]:
    """Sides and mode: [source, target, taps of a target row, is area, is bicubic]; the area table where it is one."""
    taps = area_taps(source_px, target_px if mode == "area" else 1)
    row = np.array([source_px, target_px, taps.count, mode == "area", mode == "bicubic"], np.int32)
    return {f"resize{number}": row, f"taps{number}": taps.index, f"weights{number}": taps.weights}


def _noise_row(stage: StageParameters) -> np.ndarray:
    """[level on 0..1 for Gaussian, factor for Poisson; is Poisson; is gray]."""
    poisson = stage.noise == "poisson"
    return np.array([stage.noise_level if poisson else stage.noise_level / 255, poisson, stage.gray], np.float32)


@pipeline_def(enable_conditionals=True)
def _graph(gt_size_px, lq_size_px, usm_sharpen_gt, gpu):
    """Crop -> resize to the truth's size (antialiased) -> USM -> two stages -> the end; 8 bits out."""
    crop = _pixels("crop", gpu)
    gt = fn.resize(crop, size=[gt_size_px, gt_size_px], interp_type=types.INTERP_CUBIC, antialias=True,
                   dtype=types.FLOAT)  # fmt: skip
    gt = dmath.clamp(gt / 255.0, 0.0, 1.0)
    if usm_sharpen_gt:
        gt = _usm_sharpen(gt, "gpu" if gpu else "cpu")
    quality = fn.external_source(name="quality")
    x = _stage(gt, "1", gpu)
    x = _jpeg(x, quality[0])
    x = _stage(x, "2", gpu)
    kernel, column = _kernel_sources("3", gpu)
    row, taps, weights = _resize_sources("3", gpu)
    if quality[2] > 0:
        x = _filter(_resize(x, row, taps, weights), kernel, column)
        x = _jpeg(x, quality[1])
    else:
        x = _jpeg(x, quality[1])
        x = _filter(_resize(x, row, taps, weights), kernel, column)
    return _to_bytes(x), _to_bytes(gt)


def _stage(x, number, gpu):
    x = _filter(x, *_kernel_sources(number, gpu))
    x = _resize(x, *_resize_sources(number, gpu))
    return _add_noise(x, _pixels(f"noise{number}", gpu), fn.external_source(name=f"noising{number}"))


def _pixels(name, gpu, layout="HWC"):
    source = fn.external_source(name=name, layout=layout)
    return source.gpu() if gpu else source


def _kernel_sources(number, gpu):
    return _pixels(f"kernel{number}", gpu, layout=None), _pixels(f"column{number}", gpu, layout=None)


def _filter(x, kernel, column):
    return fn.filter(fn.filter(x, kernel, border="reflect_101"), column, border="reflect_101")


def _resize_sources(number, gpu):
    row, taps = fn.external_source(name=f"resize{number}"), fn.external_source(name=f"taps{number}")
    return row, taps, _pixels(f"weights{number}", gpu, layout=None)


def _resize(x, row, taps, weights):
    """Without antialiasing, as PyTorch's interpolate."""
    size = fn.cast(fn.stack(row[1], row[1]), dtype=types.FLOAT)
    if row[3] > 0:
        y = _gather_rows(x, taps, weights, row, row[0])
        y = _gather_rows(fn.transpose(y, perm=[1, 0, 2]), taps, weights, row, row[1])
        y = fn.reshape(fn.transpose(y, perm=[1, 0, 2]), layout="HWC")
    elif row[4] > 0:
        y = fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=False)
    else:
        y = fn.resize(x, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    return y


def _gather_rows(x, taps, weights, row, width):
    """[source, width, 3] -> [target, width, 3]: weighted sums of `count` source rows each."""
    source, target, count = row[0], row[1], row[2]
    y = fn.reshape(x, shape=fn.stack(source, width * 3), layout="FC")
    y = fn.sequence_rearrange(y, new_order=taps) * weights
    y = fn.reductions.sum(fn.reshape(y, shape=fn.stack(target, count, width * 3), layout="FTC"), axes=[1])
    return fn.reshape(y, shape=fn.stack(target, width, 0 * width + 3), layout="HWC")


def _add_noise(x, field, row):
    """Gaussian: level * field. Poisson: factor * sqrt(v / n) * field, v the (gray) value, n photons a unit."""
    if row[1] > 0:
        if row[2] > 0:
            value = dmath.clamp(fn.reductions.sum(x * types.Constant(_LUMA), axes=[2], keep_dims=True), 0.0, 1.0)
        else:
            value = dmath.clamp(x, 0.0, 1.0)
        amplitude = dmath.sqrt(value / _photons(value)) * row[0]
        y = x + amplitude * field
    else:
        y = x + row[0] * field
    return fn.reshape(dmath.clamp(y, 0.0, 1.0), layout="HWC")


def _photons(value):
    """A power of two, the first that is no less than the image's span of 8-bit levels."""
    highest = fn.reductions.max(value, axes=[0, 1, 2])
    lowest = fn.reductions.min(value, axes=[0, 1, 2])
    span = dmath.floor(highest * 255.0 + 0.5) - dmath.floor(lowest * 255.0 + 0.5)
    return dmath.fpow(2.0, dmath.ceil(dmath.log2(span + 1.0)))


def _jpeg(x, quality):
    return fn.cast(fn.jpeg_compression_distortion(_to_bytes(x), quality=quality), dtype=types.FLOAT) / 255.0


def _usm_sharpen(x, device):
    """BasicSR's USMSharp: add half of what a wide blur removes, where that is more than a threshold."""
    # Two one-dimensional filters: eight times as fast as fn.gaussian_blur on a CPU.
    blur = [types.Constant(factor, device=device) for factor in build_factors(_USM_BLUR)]
    residual = x - _filter(x, *blur)
    mask = fn.cast(dmath.abs(residual) * 255.0 > _USM_THRESHOLD, dtype=types.FLOAT)
    soft = _filter(fn.reshape(mask, layout="HWC"), *blur)
    sharp = dmath.clamp(x + _USM_AMOUNT * residual, 0.0, 1.0)
    return fn.reshape(x + soft * (sharp - x), layout="HWC")


def _to_bytes(x):
    """Clamped, rounded to nearest: DALI's cast does both."""
    return fn.reshape(fn.cast(x * 255.0, dtype=types.UINT8), layout="HWC")
