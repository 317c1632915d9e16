"""The degradation chain written a second time, with OpenCV, PyTorch and NumPy."""

import cv2
import numpy as np
import torch

from realsr_hpc.data.degradation import DegradationParameters, StageParameters
from realsr_hpc.data.kernels import build_kernel

cv2.setNumThreads(1)


def filter2d(image, kernel):
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def cubic_weights(source, target, a=-0.5):
    """Keys' kernel at the four nearest pixels, edges repeated; [target, source]."""
    positions = (np.arange(target) + 0.5) * source / target - 0.5
    weights = np.zeros((target, source))
    for row, position in enumerate(positions):
        for tap in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            x = abs(position - tap)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, np.clip(tap, 0, source - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return weights


def resize(image, mode, side):
    source = image.shape[0]
    if mode == "bicubic":
        w = cubic_weights(source, side)
        return np.einsum("yi,ijc,xj->yxc", w, image, w, optimize=True).astype(np.float32)
    if mode == "area":
        planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(planes, size=(side, side), mode="area")[0].permute(1, 2, 0).numpy()
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


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
    line = cv2.getGaussianKernel(51, 0)
    kernel = line @ line.T
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
