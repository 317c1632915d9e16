"""Writes the reasoning beside a restored image: NAME.json to be parsed, NAME.steps.jpg to be looked at."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from realsr_hpc.artifacts import restoration
from realsr_hpc.artifacts.restoration import Restoration
from realsr_hpc.files import sha256_of
from realsr_hpc.restore.image_files import resized
from realsr_hpc.restore.tiles import STEPS, Blended
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

MAX_SIDE_PX = 512
"""Longer side of one image in NAME.steps.jpg."""
_LINE_PX = 14
_CHARACTER_PX = 6


def write_reasoning(source: Path, target: Path, lq: np.ndarray, result: Blended, made_by: str, steps: bool) -> None:
    """Write the record of `source`, restored as `target`; `steps`: also NAME.steps.jpg. lq: uint8 [h, w, 3].

    The record has the input's absolute path and a digest of its content, so that a later reader can tell whether the
    file has been replaced.
    """
    restored = Restoration(result.tiles, os.path.abspath(source), sha256_of(source), target.name, made_by)
    restoration.write(target, restored)
    if steps:
        steps_picture(lq, result).save(restoration.steps_file(target), quality=90)


def steps_picture(lq: np.ndarray, result: Blended) -> Image.Image:
    """Input, rough, middle and final image side by side, with the texts of the first tile below."""
    height, width = result.image.shape[:2]
    shrink = min(1.0, MAX_SIDE_PX / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    columns = {"input": lq, **{name: result.steps[name] for name in STEPS if name in result.steps}}
    columns["final"] = result.image
    lines = [line for text in _words(result) for line in textwrap.wrap(text, _columns(len(columns) * size[1]))]
    canvas = Image.new("RGB", (len(columns) * (size[1] + 4) + 4, size[0] + 24 + _LINE_PX * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (name, pixels) in enumerate(columns.items()):
        left = 4 + number * (size[1] + 4)
        draw.text((left, 2), name, fill="black")
        canvas.paste(Image.fromarray(resized(pixels, *size)), (left, 18))
    for number, line in enumerate(lines):
        draw.text((4, size[0] + 22 + _LINE_PX * number), line, fill="black")
    return canvas


def _words(result: Blended) -> list[str]:
    first = result.tiles[0]
    texts = [first.degradation, *first.texts]
    names = ("degradation", *IMAGE_NAMES)
    of = f" (tile 1 of {len(result.tiles)})" if len(result.tiles) > 1 else ""
    return [f"{name}{of}: {text or 'not well-formed'}" for name, text in zip(names, texts, strict=True)]


def _columns(width_px: int) -> int:
    return max(40, width_px // _CHARACTER_PX)
