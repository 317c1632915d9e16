"""A second implementation of the degradation chain, with SciPy, PyTorch, NumPy and OpenCV's JPEG; images in 0..1."""

import cv2
import numpy as np
import torch
from scipy.ndimage import correlate

from realsr_hpc.data.degradation import DegradationParameters, StageParameters
from realsr_hpc.data.kernels import KernelParameters, build_kernel


def filter2d(image, kernel):
    """Borders reflected without their outermost pixel."""
    return correlate(image, kernel[..., None], mode="mirror")


def resize(image, mode, side):
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size=(side, side), mode=mode)[0].permute(1, 2, 0).numpy()


def to_bytes(image):
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)


def jpeg(image, quality):
    ok, code = cv2.imencode(".jpg", to_bytes(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


def add_noise(image, field, stage: StageParameters):
    if stage.noise == "gaussian":
        return np.clip(image + field * stage.noise_level / 255, 0, 1)
    value = image @ np.float32([0.2989, 0.587, 0.114]) if stage.gray else image
    value = np.clip(value, 0, 1)
    levels = np.round(value.max() * 255) - np.round(value.min() * 255) + 1
    photons = 2 ** np.ceil(np.log2(levels))
    noise = np.sqrt(value / photons)
    return np.clip(image + stage.noise_level * (noise[..., None] if stage.gray else noise) * field, 0, 1)


def usm_sharpen(image):
    """BasicSR's USMSharp: amount .5, radius 50 (made 51), threshold 10."""
    kernel = build_kernel(KernelParameters("iso", 51, 8.0, 8.0))
    residual = image - filter2d(image, kernel)
    soft = filter2d((np.abs(residual) * 255 > 10).astype(np.float32), kernel)
    return soft * np.clip(image + 0.5 * residual, 0, 1) + (1 - soft) * image


def degrade(gt, p: DegradationParameters, fields, lq_size_px):
    """`gt` float32 [H, H, 3] on 0..1; `fields` both stages' noise. Returns uint8."""
    x = filter2d(gt, build_kernel(p.first.blur))
    x = add_noise(resize(x, p.first.resize_mode, p.first.side_px), fields[0], p.first)
    x = jpeg(x, p.first.jpeg_quality)
    x = filter2d(x, build_kernel(p.second.blur))
    x = add_noise(resize(x, p.second.resize_mode, p.second.side_px), fields[1], p.second)
    if p.jpeg_last:
        x = filter2d(resize(x, p.final_resize_mode, lq_size_px), build_kernel(p.final_sinc))
        return to_bytes(jpeg(x, p.second.jpeg_quality))
    x = resize(jpeg(x, p.second.jpeg_quality), p.final_resize_mode, lq_size_px)
    return to_bytes(filter2d(x, build_kernel(p.final_sinc)))
