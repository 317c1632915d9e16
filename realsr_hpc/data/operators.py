"""The deterministic part of a drawn degradation, which rewards apply to a restored image.

Noise is excluded: the expected value of a noisy image is the image itself, for Gaussian and Poisson noise alike.
"""

from __future__ import annotations

from realsr_hpc.data.degradation import DegradationParameters
from realsr_hpc.data.kernels import KernelParameters, build_kernel
from realsr_hpc.records import JPEG, Blur, Operators, ResizeTo


def operators_of(parameters: DegradationParameters, lq_px: int) -> Operators:
    """Blurs, resizes and JPEGs in the order in which they were applied to the truth."""
    first, second = parameters.first, parameters.second
    stages = (
        *_blur(first.blur),
        ResizeTo(first.side_px, first.resize_mode),
        JPEG(first.jpeg_quality),
        *_blur(second.blur),
        ResizeTo(second.side_px, second.resize_mode),
    )
    end = (ResizeTo(lq_px, parameters.final_resize_mode), *_blur(parameters.final_sinc))
    last = JPEG(second.jpeg_quality)
    return (*stages, *end, last) if parameters.jpeg_last else (*stages, last, *end)


def _blur(kernel: KernelParameters | None) -> tuple[Blur, ...]:
    return () if kernel is None else (Blur(build_kernel(kernel)),)
