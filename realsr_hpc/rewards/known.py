"""The operators that made an LQ image, applied once more to a restored one.

After the data room's description, written a second time with other libraries (OpenCV, PyTorch, Pillow), so that each
checks the other. Pixels are float32 on 0..255.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image

from realsr_hpc.records import JPEG, Blur, Operators, ResizeTo

_KEYS_A = -0.5
"""Keys' parameter of the bicubic kernel, the data room's."""


def degraded(image: UInt8[np.ndarray, "H H 3"], operators: Operators) -> Float32[np.ndarray, "h h 3"]:
    """The image after all operators, clamped to 0..255, without noise."""
    x = image.astype(np.float32)
    for operator in operators:
        match operator:
            case Blur():
                x = cv2.filter2D(x, -1, operator.kernel, borderType=cv2.BORDER_REFLECT_101)
            case ResizeTo():
                x = resized(x, operator)
            case JPEG():
                x = jpeg(x, operator.quality)
    return np.clip(x, 0.0, 255.0)


def resized(x: Float32[np.ndarray, "H H 3"], to: ResizeTo) -> Float32[np.ndarray, "h h 3"]:
    """Without antialiasing; to the same side nothing changes."""
    side, source = to.side_px, len(x)
    if side == source:
        return x
    if to.mode == "area":
        planes = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)
        return torch.nn.functional.adaptive_avg_pool2d(planes, side).permute(1, 2, 0).numpy()
    if to.mode == "bilinear":
        return cv2.resize(x, (side, side), interpolation=cv2.INTER_LINEAR)
    index, weights = cubic_taps(source, side)
    rows = np.sum([x[taps] * weight[:, None, None] for taps, weight in zip(index, weights, strict=True)], axis=0)
    return np.sum([rows[:, taps] * weight[:, None] for taps, weight in zip(index, weights, strict=True)], axis=0)


def cubic_taps(source: int, target: int) -> tuple[np.ndarray, Float32[np.ndarray, "4 target"]]:
    """The four source rows of each target row, edges repeated, and their weights (Keys 1981)."""
    position = (np.arange(target) + 0.5) * source / target - 0.5
    taps = np.floor(position).astype(int) + np.arange(-1, 3)[:, None]
    x, a = np.abs(position - taps), _KEYS_A
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return taps.clip(0, source - 1), np.where(x <= 1, near, far).astype(np.float32)


def jpeg(x: Float32[np.ndarray, "h h 3"], quality: int) -> Float32[np.ndarray, "h h 3"]:
    """Through a JPEG file in memory."""
    held = io.BytesIO()
    Image.fromarray(np.rint(np.clip(x, 0, 255)).astype(np.uint8)).save(held, "JPEG", quality=quality)
    return np.asarray(Image.open(held)).astype(np.float32)
