"""The second-order degradation as others run it: OpenCV and NumPy an image at a time, PyTorch after BasicSR.

Written for the comparison, from the published description, and given every advantage that changes no result: kernels at
their own size, isotropic Gaussians as two passes, libjpeg in place of BasicSR's differentiable JPEG. Same parameters,
same noise, same order as the graph of data/dali_pipeline.py. Pixels are float32 on 0..255.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from realsr_hpc.data.degradation import StageParameters, noise_field
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.kernels import KernelParameters, build_factors, build_kernel

_OPENCV_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_LUMA = np.float32([0.2989, 0.587, 0.114])  # pyright: ignore[reportArgumentType]
_KERNEL_PX = 21
"""Side that BasicSR pads every kernel to."""


def degrade_opencv(sample: DegradationInput, lq_px: int) -> np.ndarray:
    """Degraded image, uint8 [h, w, 3]."""
    p = sample.parameters
    first, second = noise_field(sample.noise_rng, p.first), noise_field(sample.noise_rng, p.second)
    x = _opencv_stage(sample.crop.astype(np.float32), p.first, first)
    x = _opencv_stage(_jpeg(x, p.first.jpeg_quality).astype(np.float32), p.second, second)
    if p.jpeg_last:
        x = _opencv_filter(_opencv_resize(x, p.final_resize_mode, lq_px), p.final_sinc)
        return _jpeg(x, p.second.jpeg_quality)
    x = _opencv_resize(_jpeg(x, p.second.jpeg_quality).astype(np.float32), p.final_resize_mode, lq_px)
    return to_bytes(_opencv_filter(x, p.final_sinc))


def _opencv_stage(x: np.ndarray, stage: StageParameters, field: np.ndarray) -> np.ndarray:
    x = _opencv_resize(_opencv_filter(x, stage.blur), stage.resize_mode, stage.side_px)
    if stage.noise == "gaussian":
        return np.clip(x + np.float32(stage.noise_level) * field, 0, 255)
    value = np.clip(x @ _LUMA if stage.gray else x, 0, 255)
    noise = np.sqrt(value * np.float32(255 / photons(float(value.min()), float(value.max()))))
    return np.clip(x + np.float32(stage.noise_level) * (noise[..., None] if stage.gray else noise) * field, 0, 255)


def _opencv_filter(x: np.ndarray, blur: KernelParameters | None) -> np.ndarray:
    if blur is None:
        return x
    if blur.shape == "iso":
        row, column = build_factors(blur)
        return cv2.sepFilter2D(x, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
    return cv2.filter2D(x, -1, build_kernel(blur), borderType=cv2.BORDER_REFLECT_101)


def _opencv_resize(x: np.ndarray, mode: str, side: int) -> np.ndarray:
    return x if x.shape[0] == side else cv2.resize(x, (side, side), interpolation=_OPENCV_MODES[mode])


def photons(low: float, high: float) -> float:
    """The power of two that holds the image's span of levels."""
    return 2.0 ** math.ceil(math.log2(round(high) - round(low) + 1))


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Clamped and rounded."""
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    coded = cv2.imencode(".jpg", to_bytes(x), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)  # pyright: ignore[reportReturnType]


def degrade_torch(sample: DegradationInput, lq_px: int) -> np.ndarray:
    """Degraded image, uint8 [h, w, 3], by the operators of BasicSR's `RealESRGANModel.feed_data`."""
    p = sample.parameters
    first, second = noise_field(sample.noise_rng, p.first), noise_field(sample.noise_rng, p.second)
    x = _torch_stage(_to_tensor(sample.crop), p.first, first)
    x = _torch_stage(_torch_jpeg(x, p.first.jpeg_quality), p.second, second)
    if p.jpeg_last:
        x = _torch_filter(_torch_resize(x, p.final_resize_mode, lq_px), p.final_sinc)
        return _from_tensor(_torch_jpeg(x, p.second.jpeg_quality))
    x = _torch_resize(_torch_jpeg(x, p.second.jpeg_quality), p.final_resize_mode, lq_px)
    return _from_tensor(_torch_filter(x, p.final_sinc))


def _torch_stage(x: torch.Tensor, stage: StageParameters, noise: np.ndarray) -> torch.Tensor:
    x = _torch_resize(_torch_filter(x, stage.blur), stage.resize_mode, stage.side_px)
    field = torch.from_numpy(noise).permute(2, 0, 1)[None]
    if stage.noise == "gaussian":
        return (x + stage.noise_level * field).clamp(0, 255)
    gray = (x * torch.from_numpy(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    value = (gray if stage.gray else x).clamp(0, 255)
    amplitude = (value * (255 / photons(float(value.min()), float(value.max())))).sqrt()
    return (x + stage.noise_level * amplitude * field).clamp(0, 255)


def _torch_filter(x: torch.Tensor, blur: KernelParameters | None) -> torch.Tensor:
    """BasicSR's filter2D: every kernel padded to 21 px, reflected borders, the channels as batch."""
    if blur is None:
        return x
    kernel = build_kernel(blur)
    margin = (_KERNEL_PX - kernel.shape[0]) // 2
    weight = torch.from_numpy(np.pad(kernel, margin))[None, None]
    padded = F.pad(x, (_KERNEL_PX // 2,) * 4, mode="reflect")
    return F.conv2d(padded.transpose(0, 1), weight).transpose(0, 1)


def _torch_resize(x: torch.Tensor, mode: str, side: int) -> torch.Tensor:
    return F.interpolate(x, size=(side, side), mode=mode)


def _torch_jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    return _to_tensor(_jpeg(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()), quality))


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def _from_tensor(x: torch.Tensor) -> np.ndarray:
    return to_bytes(x[0].permute(1, 2, 0).numpy())
