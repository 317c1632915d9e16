"""Ladders of degradations: versions of one photograph from clean to heavily degraded, to train and measure experts.

Simpler than the Real-ESRGAN pipeline in `data` and independent of it, because the order of severity must be certain.
Besides blur, resizing, noise and JPEG there are artifacts of generators (shifted blocks, posterised blocks, grid lines,
halos of sharpening), because a policy that maximises an expert's score tends to produce them. Images are RGB uint8
[H, W, 3]; a severity is a number in 0..1, and 0 changes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

Operator = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
BLOCK_PX = 8


def blur(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur, sigma up to 3 px."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(3.0 * severity)))


def resize(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Bicubic downscaling by a factor up to 6, and upscaling back."""
    height, width = image.shape[:2]
    factor = 1.0 + 5.0 * severity
    small = (max(4, round(width / factor)), max(4, round(height / factor)))
    picture = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def noise(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, sigma up to 40 of 255, grey or coloured."""
    channels = 3 if rng.random() < 0.6 else 1
    return _to_uint8(image + 40.0 * severity * rng.standard_normal((*image.shape[:2], channels)))


def jpeg(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 95 down to 8."""
    held = io.BytesIO()
    Image.fromarray(image).save(held, "JPEG", quality=round(95 - 87 * severity))
    return np.asarray(Image.open(held))


def shift_blocks(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Replace up to half of the 8 px blocks by content shifted up to 6 px, like wrong codes of an image tokenizer."""
    out = image.copy()
    height, width = (size // BLOCK_PX * BLOCK_PX for size in image.shape[:2])
    for top in range(0, height, BLOCK_PX):
        for left in range(0, width, BLOCK_PX):
            moved = rng.random() < 0.5 * severity
            dy, dx = rng.integers(-6, 7, 2)
            y, x = np.clip(top + dy, 0, height - BLOCK_PX), np.clip(left + dx, 0, width - BLOCK_PX)
            if moved:
                out[top : top + BLOCK_PX, left : left + BLOCK_PX] = image[y : y + BLOCK_PX, x : x + BLOCK_PX]
    return out


def posterise_blocks(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Move each 8 px block towards its own mean and a random tint."""
    height, width = (size // BLOCK_PX for size in image.shape[:2])
    inside = image[: height * BLOCK_PX, : width * BLOCK_PX].astype(np.float64)
    blocks = inside.reshape(height, BLOCK_PX, width, BLOCK_PX, 3)
    flat = blocks.mean(axis=(1, 3), keepdims=True) + 12.0 * rng.standard_normal((height, 1, width, 1, 3))
    out = image.astype(np.float64)
    out[: inside.shape[0], : inside.shape[1]] = (blocks + 0.8 * severity * (flat - blocks)).reshape(inside.shape)
    return _to_uint8(out)


def grid(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Add a regular pattern with a period of 2, 4 or 8 px and an amplitude up to 24 of 255, as reward hacking does."""
    period = int(rng.choice([2, 4, 8]))
    lines = np.sign(rng.standard_normal((period, period, 1)))
    height, width = image.shape[:2]
    pattern = np.tile(lines, (-(-height // period), -(-width // period), 1))[:height, :width]
    return _to_uint8(image + 24.0 * severity * pattern)


def sharpen(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Unsharp mask of radius 1.5 px with a gain up to 5, which causes halos."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float64)
    return _to_uint8(image + 5.0 * severity * (image - soft))


OPERATORS: dict[str, Operator] = {
    "blur": blur,
    "resize": resize,
    "noise": noise,
    "jpeg": jpeg,
    "shift_blocks": shift_blocks,
    "posterise_blocks": posterise_blocks,
    "grid": grid,
    "sharpen": sharpen,
}


def ladder(image: np.ndarray, names: Sequence[str], severities: Sequence[float], seed: int) -> list[np.ndarray]:
    """One version of the image for each severity: the operators `names` in order, with the same random draws."""
    rungs = []
    for severity in severities:
        rng = np.random.default_rng(seed)
        rung = image
        for name in names:
            rung = OPERATORS[name](rung, severity, rng) if severity > 0 else rung
        rungs.append(rung)
    return rungs


def random_crop(photograph: Image.Image, size_px: int, rng: np.random.Generator, min_share: float = 0.5) -> np.ndarray:
    """A square crop scaled to `size_px` and mirrored half of the time, RGB uint8 [size_px, size_px, 3].

    Its side is `min_share` to 1 of the shorter side, and at least `size_px` if the photograph is that large.
    """
    short = min(photograph.size)
    side = int(rng.integers(min(short, max(size_px, round(min_share * short))), short + 1))
    left, top = (int(rng.integers(0, size - side + 1)) for size in photograph.size)
    square = photograph.convert("RGB").crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize((size_px, size_px), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
