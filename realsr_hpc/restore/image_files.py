"""Reads and writes images in all common formats; handles transparency, grey, 16 bits, rotation and colour profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc.data.decoding import SUFFIXES, UNREAD_SUFFIXES, opened, upright_8_bit
from realsr_hpc.data.naming import distinct, files_below
from realsr_hpc.files import replacing

RESERVED = ("restore",)
"""Names that no result may have: restore.json holds the folder's settings."""


@dataclass(frozen=True)
class Picture:
    """The pixels of a file, and its alpha, grey mode and colour profile, which the result is written with."""

    rgb: np.ndarray
    """uint8 [h, w, 3]."""
    alpha: np.ndarray | None
    """uint8 [h, w]."""
    is_grey: bool
    icc_profile: bytes | None


def find_images(source: Path, output: Path) -> tuple[list[Path], dict[str, str]]:
    """Images below a folder, sorted by name, or the single file; and by path the reason why other images are not read.

    Files below `output` are excluded.
    """
    if source.is_file():
        return [source], {}
    files, faults = files_below(source)
    if output.resolve().is_relative_to(source.resolve()):
        files = [path for path in files if not path.resolve().is_relative_to(output.resolve())]
    for path in files:
        if path.suffix.lower() in UNREAD_SUFFIXES:
            faults[str(path)] = f"format: {path.suffix} is not read; convert it to PNG or JPEG"
    return [path for path in files if path.suffix.lower() in SUFFIXES], faults


def read_picture(path: Path) -> Picture:
    """Decode a file. More than 8 bits are scaled to 8; an animation gives its first frame.

    Raises:
        BrokenImage: if it cannot be decoded.
    """
    with opened(path) as file:
        icc_profile = file.info.get("icc_profile")
        picture = upright_8_bit(file)
        has_alpha = picture.has_transparency_data
        is_grey = picture.mode in ("1", "L", "LA")
        rgba = picture.convert("RGBA" if has_alpha else "RGB")
        # A profile describes the stored colours. It stays valid for RGB, grey and palettes (whose colours are RGB), but
        # not for CMYK or Lab, which were converted.
        keeps_profile = picture.mode in ("RGB", "RGBA", "L", "LA", "P", "PA")
    pixels = np.array(rgba)
    return Picture(
        pixels[..., :3], pixels[..., 3] if has_alpha else None, is_grey, icc_profile if keeps_profile else None
    )


def write_picture(pixels: np.ndarray, picture: Picture, target: Path) -> None:
    """Write uint8 [H, W, 3] as PNG with `picture`'s alpha, grey mode and profile.

    The file is renamed into place, so it is complete if it exists.
    """
    image = Image.fromarray(pixels)
    if picture.is_grey:
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha).resize(image.size, Image.Resampling.BICUBIC))
    with replacing(target) as aside:
        image.save(aside, "PNG", icc_profile=picture.icc_profile)


def targets(files: Sequence[Path], root: Path, output: Path) -> Mapping[Path, Path]:
    """A distinct output file for each input: its path without suffix, or with it if two inputs would collide."""
    places = [file.relative_to(root) for file in files]
    options = [(str(place.with_suffix("")), str(place)) for place in places]
    return {file: output / f"{name}.png" for file, name in zip(files, distinct(options, RESERVED), strict=True)}


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] resized with Pillow's bicubic filter (antialiased when shrinking)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
