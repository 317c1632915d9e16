"""What the drawn numbers do to pixels: one DALI graph for crop -> truth -> degraded image.

Nothing is drawn here: kernels, noise and parameters come in with each sample, so a sample's bytes do not depend on
its place in a batch or on the threads. One description serves the CPU (`device_id=None`, what the tests run) and a GPU,
where pixels, kernels and noise are uploaded and every operator has its device version. Pixels are float32 on 0..255.

Stated differences from Real-ESRGAN's own operators: bicubic has a = -0.5 (theirs -0.75); Poisson is its normal
approximation with the same mean and variance, its value not rounded to 8 bits first and its photon count taken from
the image's span of levels (theirs from the number of levels in use); JPEG is libjpeg's (theirs a differentiable
imitation of it).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from jaxtyping import UInt8
from nvidia.dali import pipeline_def

from realsr_hpc.data.graph_inputs import NOTHING, NUM_STRIPS, SEPARABLE, STRIPS, DegradationInput, graph_inputs
from realsr_hpc.data.kernels import KernelParameters, build_factors

_LUMA = (0.2989, 0.587, 0.114)
"""Weights of R, G, B in a gray value (ITU-R 601), as PyTorch's and BasicSR's."""
_USM_BLUR = KernelParameters("iso", 51, 8.0, 8.0)
_USM_AMOUNT, _USM_THRESHOLD = 0.5, 10.0
"""BasicSR's USMSharp: radius 50 (made odd), the sigma OpenCV derives from it; amount, and threshold of 255."""


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
        _remove_generated_sources()

    def run(
        self, samples: Sequence[DegradationInput]
    ) -> tuple[UInt8[np.ndarray, "B h w 3"], UInt8[np.ndarray, "B H W 3"]]:
        """Degraded images and truths of the samples, in their order."""
        rows = [graph_inputs(sample, self.gt_size_px, self.lq_size_px) for sample in samples]
        for name in rows[0]:
            self._pipeline.feed_input(name, [row[name] for row in rows])
        lq, gt = self._pipeline.run()
        # Copies: DALI writes its next batch into the same memory.
        return np.array(lq.as_cpu().as_array()), np.array(gt.as_cpu().as_array())


def _remove_generated_sources() -> None:
    """DALI writes the graph's conditionals into temporary files, and a killed process would leave them there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            Path(str(module.__file__)).unlink(missing_ok=True)


@pipeline_def(enable_conditionals=True)
def _graph(gt_size_px, lq_size_px, usm_sharpen_gt, gpu):
    """Crop -> resize to the truth's size (antialiased) -> USM -> two stages -> the end; 8 bits out."""
    gt = _truth(_pixels("crop", gpu), gt_size_px, fn.external_source(name="sides"))
    if usm_sharpen_gt:
        gt = _usm_sharpen(gt, "gpu" if gpu else "cpu")
    quality = fn.external_source(name="quality")
    x = _jpeg(_stage(gt, "1", gpu), quality[0])
    x = _stage(_to_float(x), "2", gpu)
    sinc, resize = _filter_sources("3", gpu), _resize_sources("3", gpu)
    if quality[2] > 0:
        # Clamped here only: where bytes follow, the cast to them clamps.
        x = _filter(_resize(_clamp(x), *resize), *sinc)
        x = _jpeg(x, quality[1])
    else:
        x = _to_float(_jpeg(x, quality[1]))
        x = _to_bytes(_filter(_resize(x, *resize), *sinc))
    return x, _to_bytes(gt)


def _truth(crop, gt_size_px, sides):
    if sides[0] > 0:
        gt = _clamp(fn.resize(crop, size=[gt_size_px, gt_size_px], interp_type=types.INTERP_CUBIC, antialias=True,
                              dtype=types.FLOAT))  # fmt: skip
    else:
        gt = _to_float(crop)
    return gt


def _stage(x, number, gpu):
    """Blur, resize, noise; not clamped."""
    x = _filter(x, *_filter_sources(number, gpu))
    x = _resize(x, *_resize_sources(number, gpu))
    return _add_noise(x, _pixels(f"noise{number}", gpu), fn.external_source(name=f"noising{number}"))


def _pixels(name, gpu, layout="HWC"):
    source = fn.external_source(name=name, layout=layout)
    return source.gpu() if gpu else source


def _filter_sources(number, gpu):
    kernel, column = (_pixels(f"{name}{number}", gpu, layout=None) for name in ("kernel", "column"))
    return kernel, column, fn.external_source(name=f"way{number}"), fn.external_source(name=f"rows{number}"), gpu


def _filter(x, kernel, column, way, rows, gpu=False):
    """By the way that `kernel_inputs` chose; the GPU needs no strips."""
    if way[0] == NOTHING:
        y = x
    elif way[0] == SEPARABLE:
        y = _correlate(_correlate(x, kernel), column)
    elif way[0] == STRIPS:
        y = _correlate(x, kernel) if gpu else _filter_strips(x, kernel, way, rows)
    else:
        y = _correlate(x, kernel)
    return y


def _correlate(x, kernel):
    return fn.filter(x, kernel, border="reflect_101")


def _filter_strips(x, kernel, way, rows):
    """The sum of filters by strips of the kernel's rows, each over the image with its reflected rows written out."""
    side = way[1]
    padded = fn.reshape(x, layout="FHC")
    padded = fn.reshape(fn.sequence_rearrange(padded, new_order=rows), layout="HWC")
    parts = []
    for strip in range(NUM_STRIPS):
        first, end = way[2 + strip], way[3 + strip]
        start = first + (end - first) // 2
        parts.append(fn.slice(_correlate(padded, kernel[first:end]), start, side, axes=[0]))
    return fn.reshape(parts[0] + parts[1] + parts[2] + parts[3], layout="HWC")


def _resize_sources(number, gpu):
    row, taps = fn.external_source(name=f"resize{number}"), fn.external_source(name=f"taps{number}")
    return row, taps, _pixels(f"weights{number}", gpu, layout=None)


def _resize(x, row, taps, weights):
    """Without antialiasing, as PyTorch's interpolate; one to the same size changes nothing."""
    size = fn.cast(fn.stack(row[1], row[1]), dtype=types.FLOAT)
    if row[0] == row[1]:
        y = x
    elif row[3] > 0:
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
    x = fn.reshape(x, shape=fn.stack(source, width * 3), layout="FC")
    if count == 2:
        y = _tap(x, taps, weights, 0) + _tap(x, taps, weights, 1)
    elif count == 4:
        y = (
            _tap(x, taps, weights, 0)
            + _tap(x, taps, weights, 1)
            + _tap(x, taps, weights, 2)
            + _tap(x, taps, weights, 3)
        )
    else:
        y = fn.sequence_rearrange(x, new_order=fn.reshape(taps, shape=[-1]))
        y = fn.reshape(y, shape=fn.stack(count, target, width * 3), layout="TFC") * weights
        y = fn.reductions.sum(y, axes=[0])
    return fn.reshape(y, shape=fn.stack(target, width, 0 * width + 3), layout="HWC")


def _tap(x, taps, weights, number):
    """Each target row's source row of one number, weighted."""
    return fn.sequence_rearrange(x, new_order=taps[number]) * weights[number]


def _add_noise(x, field, row):
    """Gaussian: level * field. Poisson: factor * sqrt(255 v / n) * field, v the (gray) value of 255, n photons."""
    if row[1] > 0:
        if row[2] > 0:
            value = _clamp(x[:, :, 0:1] * _LUMA[0] + x[:, :, 1:2] * _LUMA[1] + x[:, :, 2:3] * _LUMA[2])
        else:
            value = _clamp(x)
        y = x + dmath.sqrt(value * (255.0 / _photons(value))) * (row[0] * field)
    else:
        y = x + row[0] * field
    return fn.reshape(y, layout="HWC")


def _photons(value):
    """A power of two, the first that is no less than the image's span of 8-bit levels."""
    highest = fn.reductions.max(value, axes=[0, 1, 2])
    lowest = fn.reductions.min(value, axes=[0, 1, 2])
    span = dmath.floor(highest + 0.5) - dmath.floor(lowest + 0.5)
    return dmath.fpow(2.0, dmath.ceil(dmath.log2(span + 1.0)))


def _jpeg(x, quality):
    """Bytes of float pixels that went through a JPEG file."""
    return fn.jpeg_compression_distortion(_to_bytes(x), quality=quality)


def _usm_sharpen(x, device):
    """BasicSR's USMSharp: add half of what a wide blur removes, where that is more than a threshold."""
    # Two one-dimensional filters: eight times as fast as fn.gaussian_blur on a CPU.
    row, column = (types.Constant(factor, device=device) for factor in build_factors(_USM_BLUR))
    residual = x - _correlate(_correlate(x, row), column)
    mask = fn.cast(dmath.abs(residual) > _USM_THRESHOLD, dtype=types.FLOAT)
    soft = _correlate(_correlate(fn.reshape(mask, layout="HWC"), row), column)
    return fn.reshape(x + soft * (_clamp(x + _USM_AMOUNT * residual) - x), layout="HWC")


def _clamp(x):
    # dmath.clamp takes three times as long on a CPU.
    return dmath.min(dmath.max(x, 0.0), 255.0)


def _to_float(x):
    return fn.cast(x, dtype=types.FLOAT)


def _to_bytes(x):
    """Clamped, rounded to nearest: DALI's cast does both."""
    return fn.reshape(fn.cast(x, dtype=types.UINT8), layout="HWC")
