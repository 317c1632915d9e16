"""Applies the drawn numbers to pixels: one DALI graph for crop -> truth -> degraded image.

Nothing is drawn here: kernels, noise and parameters arrive with each sample, so a sample's bytes do not depend on its
place in a batch or on the threads. One description serves both devices; only `dali_operators.py` differs between them.
Pixels are float32 on 0..255 between two JPEGs.

There are three differences from Real-ESRGAN's operators. Poisson noise is a normal approximation with the same mean and
variance, and its mean is not rounded to 8 bits first. Its photon count follows from the image's span of levels, theirs
from the number of levels in use. JPEG is libjpeg's, theirs a differentiable approximation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from jaxtyping import UInt8
from nvidia.dali import pipeline_def  # pyright: ignore[reportPrivateImportUsage]

from realsr_hpc.data.dali_operators import DALIOperators, HostOperators
from realsr_hpc.data.graph_inputs import DegradationInput, graph_inputs


class DegradationPipeline:
    """Runs batches of up to `max_batch_size` samples through the graph, one batch at a time, without prefetching.

    device_id: the GPU to run on; None: the CPU. operators: None: those of the device.
    """

    def __init__(
        self,
        max_batch_size: int,
        gt_size_px: int,
        upscale: int,
        *,
        usm_sharpen_gt: bool,
        num_threads: int = 1,
        device_id: int | None = None,
        operators: HostOperators | DALIOperators | None = None,
    ) -> None:
        self.gt_size_px, self.lq_size_px = gt_size_px, gt_size_px // upscale
        self._map = ThreadPoolExecutor(num_threads, thread_name_prefix="degrade").map if num_threads > 1 else map
        if operators is None:
            operators = HostOperators(self._map) if device_id is None else DALIOperators("gpu")
        self._operators = operators
        self._pipeline = _graph(
            operators,
            gt_size_px,
            usm_sharpen_gt,
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
        """Degraded images uint8 [B, h, w, 3] and truths uint8 [B, H, W, 3] of the samples, in their order."""
        rows = list(self._map(self._inputs, samples))
        for name in self._operators.sources:
            self._pipeline.feed_input(name, [row[name] for row in rows])
        lq, gt = self._pipeline.run()
        # Copies: DALI writes its next batch into the same memory.
        return np.array(lq.as_cpu().as_array()), np.array(gt.as_cpu().as_array())

    def _inputs(self, sample: DegradationInput) -> dict[str, np.ndarray]:
        return graph_inputs(sample, self.gt_size_px, self.lq_size_px, tables=self._operators.reads_tables)


def _remove_generated_sources() -> None:
    """Remove DALI's temporary files of the graph's conditionals now: a killed process would leave them behind."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            Path(str(module.__file__)).unlink(missing_ok=True)


@pipeline_def(enable_conditionals=True)  # pyright: ignore[reportArgumentType]
def _graph(operators, gt_size_px, usm_sharpen_gt):
    """Crop -> resize to the truth's size (antialiased) -> USM -> two stages -> final operations; returns uint8."""
    crop = operators.array("crop", "HWC")
    if operators.numbers("sides")[0] > 0:
        # a crop of another size than the truth is resized first
        gt = fn.resize(crop, size=[gt_size_px, gt_size_px], interp_type=types.INTERP_CUBIC, antialias=True)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        gt = crop
    x = gt
    if usm_sharpen_gt:
        x = operators.sharpened(gt)
        gt = operators.to_bytes(x)
    first, second = (_stage_sources(operators, number) for number in "12")
    last_resize, sinc = operators.resize_sources("3"), _blur_sources(operators, "3")
    quality = operators.numbers("quality")
    x = _jpeg(operators.stage(x, *first), quality[0])
    # the order of the last resize with its sinc filter and the last JPEG is drawn at random, as in Real-ESRGAN
    if quality[2] > 0:
        x = _jpeg(operators.stage_and_end(x, *second, last_resize, sinc), quality[1])
    else:
        x = operators.end(_jpeg(operators.stage(x, *second), quality[1]), last_resize, sinc)
    return x, gt


def _stage_sources(operators, number):
    """The graph inputs of a stage's blur, resize and noise."""
    noise = operators.array(f"noise{number}", "HWC"), operators.numbers(f"noising{number}")
    return _blur_sources(operators, number), operators.resize_sources(number), noise


def _blur_sources(operators, number):
    return operators.numbers(f"way{number}"), operators.array(f"kernel{number}"), operators.array(f"column{number}")


def _jpeg(x, quality):
    """Compress to JPEG and decompress."""
    return fn.jpeg_compression_distortion(x, quality=quality)
