"""Files to pixels: every photograph comes out as 8-bit RGB as a viewer shows it, or is refused with a reason.

| file | what happens |
|---|---|
| grey | the channel is repeated |
| palette, CMYK, YCbCr, Lab | converted to RGB |
| alpha | laid over white |
| 16-bit grey | scaled to 8 bits |
| rotated by EXIF | turned upright |
| a phone's picture with a second view (MPO) | the first view |
| animation, several pages | refused: `frames` |
| 32-bit integer or float | refused: `depth` (its range is unknown) |
| truncated, unreadable | refused: `broken` |
| more than 179 million pixels | refused: `huge` (a decompression bomb) |
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from realsr_hpc.data.storage import open_bytes


class BrokenImage(ValueError):
    """A file that gives no usable photograph; the message starts with the kind of fault."""


def decode_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Decode one file, or member of a tar, by the table above.

    Raises:
        BrokenImage: with `missing`, `frames`, `depth`, `huge` or `broken` first.
    """
    try:
        with open_bytes(path) as stream, warnings.catch_warnings():
            # Above half of the size that Pillow refuses it warns: a scan or panorama, and usable.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                return np.asarray(_upright_rgb(image))
    except FileNotFoundError as error:
        raise BrokenImage("missing: no such file") from error
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"huge: {error}") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("broken: of no image format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenImage(f"broken: {error}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BrokenImage(f"frames: {frames} in one file")
    if image.mode in ("I", "F"):
        raise BrokenImage(f"depth: mode {image.mode}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) / 257.0).round().astype(np.uint8))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")
