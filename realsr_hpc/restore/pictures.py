"""Files to pixels and back: any common format, with transparency, grey, 16 bits, rotation and colour profile."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Picture:
    """A file's pixels as the model wants them, and what is needed to write them back alike."""

    rgb: np.ndarray
    """uint8 [h, w, 3]."""
    alpha: np.ndarray | None
    """uint8 [h, w]."""
    is_grey: bool
    icc_profile: bytes | None


def find_images(source: Path, output: Path) -> list[Path]:
    """Images under a folder in name order, those under `output` left out; or the one file."""
    if source.is_file():
        return [source]
    inside = (path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix.lower() in SUFFIXES)
    return [path for path in inside if not path.resolve().is_relative_to(output.resolve())]


def read_picture(path: Path) -> Picture:
    """Decode a file wholly; 16 bits become 8, the first frame of an animation counts."""
    with Image.open(path) as file:
        icc_profile = file.info.get("icc_profile")
        picture = ImageOps.exif_transpose(file)
        if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
            picture = _to_8_bit(picture)
        has_alpha = "A" in picture.getbands() or "transparency" in picture.info
        is_grey = picture.mode in ("1", "L", "LA")
        rgba = picture.convert("RGBA" if has_alpha else "RGB")
    pixels = np.array(rgba)
    # A profile speaks of the stored colour space, which the conversion to RGB has left.
    keeps_profile = picture.mode in ("RGB", "RGBA", "L", "LA")
    return Picture(
        pixels[..., :3], pixels[..., 3] if has_alpha else None, is_grey, icc_profile if keeps_profile else None
    )


def write_picture(pixels: np.ndarray, picture: Picture, target: Path) -> None:
    """uint8 [H, W, 3] as PNG in the kind of `picture`, renamed into place last: a file that exists is whole."""
    image = Image.fromarray(pixels)
    if picture.is_grey:
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha).resize(image.size, Image.Resampling.BICUBIC))
    aside = target.with_suffix(".partial")
    image.save(aside, "PNG", icc_profile=picture.icc_profile)
    os.replace(aside, target)


def targets(files: Sequence[Path], root: Path, output: Path) -> Mapping[Path, Path]:
    """Output file of each input; names that differ in their ending only keep it."""
    places = [file.relative_to(root) for file in files]
    uses = Counter(place.with_suffix("") for place in places)
    return {
        file: output / place.with_name(f"{place.name if uses[place.with_suffix('')] > 1 else place.stem}.png")
        for file, place in zip(files, places, strict=True)
    }


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] at another size by Pillow's bicubic (antialiased when it shrinks)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _to_8_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    # Pillow gives 16-bit grey as I;16 or, from some formats, as I; F holds 0..1 or 0..255.
    top = 65535.0 if picture.mode != "F" else (1.0 if values.max() <= 1.0 else 255.0)
    return Image.fromarray(np.clip(np.round(values / top * 255.0), 0, 255).astype(np.uint8))
