# pyright: strict, reportUnknownMemberType=false
"""Draws grids of images and curves of metrics."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

logger = logging.getLogger(__name__)
CELL_PX = 128
_MARGIN_PX = 4
_HEADER_PX = 16
_LINE_PX, _LETTER_PX = 12, 6
"""Approximate height of a line of a caption, and width of a letter."""


def image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    headers: Sequence[str],
    cell_px: int = CELL_PX,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A grid of images, RGB uint8 [H, W, 3], each scaled to `cell_px`; None is drawn as a crossed box.

    captions: a text under each image, in the same rows; the longest one determines the height of all rows.
    """
    step = cell_px + _MARGIN_PX
    wrapped = [[textwrap.wrap(text, cell_px // _LETTER_PX) for text in row] for row in captions or ()]
    text_px = _LINE_PX * max((len(lines) for row in wrapped for lines in row), default=0)
    row_px = step + text_px
    size = (len(headers) * step + _MARGIN_PX, len(rows) * row_px + _HEADER_PX + _MARGIN_PX)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, header in enumerate(headers):
        draw.text((_MARGIN_PX + column * step, 2), header, fill="black")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            left, top = _MARGIN_PX + column * step, _HEADER_PX + _MARGIN_PX + row * row_px
            canvas.paste(_cell(image, cell_px), (left, top))
            lines = wrapped[row][column] if wrapped else []
            for number, line in enumerate(lines):
                draw.text((left, top + cell_px + number * _LINE_PX), line, fill="black")
    return canvas


def read_pixels(path: Path | None) -> np.ndarray | None:
    """An image file as RGB uint8 [H, W, 3], for `image_grid`; None if it is missing or damaged."""
    if path is None or not path.is_file():
        return None
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged files; the grid shows the other images
        logger.warning("%s is not shown: %s", path, error)
        return None


def _cell(image: np.ndarray | None, cell_px: int) -> Image.Image:
    if image is None:
        cell = Image.new("RGB", (cell_px, cell_px), "lightgrey")
        ImageDraw.Draw(cell).line([(0, 0), (cell_px, cell_px), (0, cell_px), (cell_px, 0)], fill="grey")
        return cell
    # Small inputs keep their pixels visible; large ones are averaged.
    mode = Image.Resampling.NEAREST if image.shape[0] < cell_px else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((cell_px, cell_px), mode)


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, ylabel: str) -> None:
    """Write a PNG with one line per name; series: name -> (steps, values)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in series.items():
        axes.plot(steps, values, marker=".", label=name)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)
