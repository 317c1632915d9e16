"""Blur, resize, noise, sharpening and JPEG on the pixels of an image, on a CPU: with OpenCV, SciPy, Pillow.

These are the operators of Real-ESRGAN's degradation, as PyTorch and BasicSR define them. The data room's graph calls
them on a CPU; the fidelity reward applies recorded ones again. Pixels are float32 on 0..255, and not clamped unless a
docstring says so.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from scipy.sparse import csr_array

from realsr_hpc.records import JPEG, Blur, Operators, ResizeMode, ResizeTo

LUMA = (0.2989, 0.587, 0.114)
"""Weights of R, G, B in a gray value (ITU-R 601), as PyTorch's and BasicSR's."""
USM_SIDE_PX, USM_SIGMA_PX = 51, 8.0
USM_AMOUNT, USM_THRESHOLD = 0.5, 10.0
"""BasicSR's USMSharp: radius 50 (made odd), the sigma that OpenCV derives from it, amount, threshold on 0..255."""
KEYS_A = -0.75
"""Keys' parameter of the bicubic kernel, PyTorch's and OpenCV's."""
_INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_BORDER = cv2.BORDER_REFLECT_101

# Images are processed in parallel threads: OpenCV's own threads within an image would only compete with them.
cv2.setNumThreads(1)

FloatImage = Float32[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Taps:
    """A resize along one dim: `count` source rows for each of `target` rows, and their weights, which sum to 1."""

    index: Int32[np.ndarray, "count target"]
    weights: Float32[np.ndarray, "count target"]


def filtered(image: FloatImage, kernel: Float32[np.ndarray, "rows columns"]) -> FloatImage:
    """Correlate with a kernel; borders are reflected without repeating the edge pixel (BORDER_REFLECT_101)."""
    return cv2.filter2D(image, -1, kernel, borderType=_BORDER)


def filtered_separably(
    image: FloatImage, row: Float32[np.ndarray, "1 n"], column: Float32[np.ndarray, "n 1"]
) -> FloatImage:
    """As `filtered` with the kernel `column @ row`."""
    return cv2.sepFilter2D(image, -1, row, column, borderType=_BORDER)


def resized(image: Float32[np.ndarray, "H H 3"], side_px: int, mode: ResizeMode) -> Float32[np.ndarray, "h h 3"]:
    """Resize a square image without antialiasing, as PyTorch's `interpolate`; the same side leaves it unchanged."""
    if side_px == len(image):
        return image
    if mode == "area":
        # OpenCV's area mode weights partly covered pixels by their covered area, PyTorch's weights them fully.
        return _area(image, resize_taps(len(image), side_px, mode))
    return cv2.resize(image, (side_px, side_px), interpolation=_INTERPOLATION[mode])


def _area(image: Float32[np.ndarray, "H H 3"], taps: Taps) -> Float32[np.ndarray, "h h 3"]:
    source, (count, target) = len(image), taps.index.shape
    starts = np.arange(0, count * target + 1, count)
    matrix = csr_array((taps.weights.T.ravel(), taps.index.T.ravel(), starts), shape=(target, source))
    # rows first: [target, H] @ [H, H 3] -> [target, H, 3]; transposed, the same for columns
    rows = (matrix @ image.reshape(source, -1)).reshape(target, source, 3)
    columns = (matrix @ cv2.transpose(rows).reshape(source, -1)).reshape(target, target, 3)
    return cv2.transpose(columns)


def resize_taps(source_px: int, target_px: int, mode: ResizeMode) -> Taps:
    """The source rows that PyTorch's `interpolate` reads for each target row, with repeated edges; unused: weight 0."""
    if mode == "area":
        return _area_taps(source_px, target_px)
    position = (np.arange(target_px) + 0.5) * source_px / target_px - 0.5
    reach = 1 if mode == "bilinear" else 2
    taps = np.floor(position).astype(np.int32) + np.arange(1 - reach, 1 + reach, dtype=np.int32)[:, None]
    x = np.abs(position - taps)
    weights = 1 - x if mode == "bilinear" else _keys(x)
    return Taps(taps.clip(0, source_px - 1), weights.astype(np.float32))


def _area_taps(source_px: int, target_px: int) -> Taps:
    """The mean of all source rows that a target row overlaps (`adaptive_avg_pool2d`), shrinking or enlarging."""
    rows = np.arange(target_px)
    first = rows * source_px // target_px
    lengths = -(-(rows + 1) * source_px // target_px) - first
    offsets = np.arange(lengths.max())[:, None]
    index = np.minimum(first + offsets, source_px - 1).astype(np.int32)
    return Taps(index, ((offsets < lengths) / lengths).astype(np.float32))


def _keys(x: np.ndarray) -> np.ndarray:
    """Cubic convolution at distances 0..2 (Keys 1981, equation 4)."""
    near = (KEYS_A + 2) * x**3 - (KEYS_A + 3) * x**2 + 1
    far = KEYS_A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def noised(image: FloatImage, field: FloatImage, level: float, *, poisson: bool, gray: bool) -> FloatImage:
    """Add noise. Gaussian: level * field. Poisson: level * sqrt(255 v / n) * field, v the (gray) value, n `photons`.

    `field` is standard normal noise. Poisson noise is its normal approximation, of the same mean and variance.
    """
    if not poisson:
        return cv2.scaleAdd(field, level, image)
    value = np.clip(image @ np.float32(LUMA) if gray else image, 0.0, 255.0)  # pyright: ignore[reportArgumentType]
    amplitude = np.sqrt(value * np.float32(255.0 / photons(float(value.min()), float(value.max()))))
    return cv2.scaleAdd((amplitude[..., None] if gray else amplitude) * field, level, image)


def photons(lowest: float, highest: float) -> float:
    """The smallest power of two that is at least the image's span of 8-bit levels."""
    return 2.0 ** math.ceil(math.log2(math.floor(highest + 0.5) - math.floor(lowest + 0.5) + 1))


def sharpened(image: FloatImage) -> FloatImage:
    """BasicSR's USMSharp, clamped: add half of what a wide blur removes, where this exceeds a threshold."""
    row = usm_line()[None, :]
    residual = image - filtered_separably(image, row, row.T)
    soft = filtered_separably((np.abs(residual) > USM_THRESHOLD).astype(np.float32), row, row.T)
    return image + soft * (np.clip(image + np.float32(USM_AMOUNT) * residual, 0.0, 255.0) - image)


def usm_line() -> Float32[np.ndarray, "51"]:
    """The one-dimensional Gaussian with which sharpening blurs."""
    return cv2.getGaussianKernel(USM_SIDE_PX, USM_SIGMA_PX, cv2.CV_32F)[:, 0]


def to_bytes(image: FloatImage) -> UInt8[np.ndarray, "h w 3"]:
    """Clamp and round to the nearest integer, halves to even."""
    # One pass that saturates, where NumPy needs three.
    return cv2.add(image, 0.0, dtype=cv2.CV_8U)  # pyright: ignore[reportArgumentType, reportCallIssue]


def degraded(image: UInt8[np.ndarray, "H H 3"], operators: Operators) -> Float32[np.ndarray, "h h 3"]:
    """The image after all operators, clamped to 0..255, without noise."""
    x = image.astype(np.float32)
    for operator in operators:
        match operator:
            case Blur():
                x = filtered(x, operator.kernel)
            case ResizeTo():
                x = resized(x, operator.side_px, operator.mode)
            case JPEG():
                x = _jpeg(x, operator.quality)
    return np.clip(x, 0.0, 255.0)


def _jpeg(image: FloatImage, quality: int) -> FloatImage:
    """Compress to JPEG in memory and decompress."""
    held = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(held, "JPEG", quality=quality)
    return np.asarray(Image.open(held)).astype(np.float32)
