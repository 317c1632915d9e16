"""Decodes files: every photograph becomes 8-bit RGB, as a viewer shows it, or is refused with a reason.

| file | what happens |
|---|---|
| grey | the channel is repeated |
| palette, CMYK, YCbCr, Lab | converted to RGB |
| alpha | composited over white |
| 16-bit grey | scaled to 8 bits |
| rotated by EXIF | turned upright |
| a phone's picture with a second view (MPO) | the first view |
| animation, several pages | refused: `frames` |
| 32-bit integer or float | refused: `depth` (its range is unknown) |
| truncated, unreadable | refused: `broken` |
| more than 179 million pixels | refused: `huge` (a decompression bomb) |

All users' files are opened through `opened`. It turns every exception of a decoder into `BrokenImage` and suppresses
what decoders print (libtiff on standard error, Pillow as warnings).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from realsr_hpc.data.storage import open_bytes

SUFFIXES = frozenset(
    ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Endings of files that are read as images, by every command; the content decides the format."""
UNREAD_SUFFIXES = frozenset(
    ".arw .cr2 .cr3 .dng .exr .hdr .heic .heif .jxl .nef .orf .psd .raf .raw .rw2 .svg .tga".split()
)
"""Endings of images that are not read: such files are reported, not silently skipped."""


class BrokenImage(ValueError):
    """Raised for a file that is no usable photograph; the message starts with the kind of fault."""


def decode_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Decode one file, or member of a tar, by the table above: uint8 [h, w, 3], RGB.

    Raises:
        BrokenImage: with `missing`, `frames`, `depth`, `huge` or `broken` first.
    """
    with opened(path) as image:
        return np.asarray(_upright_rgb(image))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file's image, to be decoded inside the `with` block.

    Raises:
        BrokenImage: also in place of any exception raised inside the `with` block.
    """
    _keep_decoders_quiet()
    try:
        with open_bytes(path) as stream, Image.open(stream) as image:
            yield image
    except BrokenImage:
        raise
    except FileNotFoundError as error:
        raise BrokenImage("missing: no such file") from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"huge: {error}") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("broken: not an image format that Pillow can read") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenImage(f"broken: {error}") from error
    except Exception as error:  # Pillow's parsers also raise TypeError, KeyError, struct.error, ...
        raise BrokenImage(f"broken: {type(error).__name__}: {error}") from error


def upright_8_bit(image: Image.Image) -> Image.Image:
    """Rotate as EXIF says, and scale grey of 16 bits, 32 bits or floats to 8 bits; other modes are unchanged.

    The range of floats is the first of 0..1, 0..255 and 0..65535 that contains all finite values; NaN becomes black.

    Raises:
        BrokenImage: `depth`, if values are outside all of these ranges.
    """
    upright = ImageOps.exif_transpose(image)
    if not (upright.mode.startswith("I;16") or upright.mode in ("I", "F")):
        return upright
    values = np.asarray(upright, dtype=np.float64)
    highest = values[np.isfinite(values)].max(initial=0.0)
    tops = (1.0, 255.0, 65535.0) if upright.mode == "F" else (65535.0,)
    top = next((top for top in tops if highest <= top), None)
    if top is None:
        raise BrokenImage(
            f"depth: mode {upright.mode} with values up to {highest:g}; at most {tops[-1]:g} is supported"
        )
    scaled = np.nan_to_num(values / top * 255.0, nan=0.0, posinf=255.0, neginf=0.0)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def shown_rgb(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A file's first image, for display: also of floats and animations, without transparency.

    Raises:
        BrokenImage: as `decode_image`.
    """
    with opened(path) as image:
        return np.asarray(upright_8_bit(image).convert("RGB"))


def _upright_rgb(image: Image.Image) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BrokenImage(f"frames: {frames} in one file")
    if image.mode in ("I", "F"):
        raise BrokenImage(f"depth: mode {image.mode}")
    upright = upright_8_bit(image)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def _keep_decoders_quiet() -> None:
    """Suppress what Pillow and libtiff print about a file: a fault is raised and reported with the file's name."""
    # `catch_warnings` is not thread-safe; the filter is added again because a caller may have reset the filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    _silence_libtiff()


@functools.cache
def _silence_libtiff() -> None:
    """libtiff writes to the process's standard error, past Python; Pillow offers no way to stop it."""
    library = ctypes.CDLL(Image.core.__file__)  # libtiff's symbols are found through the extension that links it
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        handler = getattr(library, name, None)  # absent where Pillow was built without libtiff
        if handler is not None:
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
