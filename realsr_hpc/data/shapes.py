"""Generates images of overlapping shapes, with the statistics of photographs, and true texts about them.

A model can memorise a few photographs but not an unlimited number of shapes; so a model that also trains on shapes must
use its input. The texts name the colours by measured area, so they are exactly true, as degradation labels are. Dead
leaves: Lee, Mumford, Huang, "Occlusion models for natural images", 2001.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from realsr_hpc.records import SceneText

COLOURS = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "red": (190, 40, 40),
    "orange": (230, 140, 50),
    "yellow": (225, 215, 90),
    "green": (70, 150, 70),
    "blue": (60, 90, 190),
    "purple": (140, 70, 160),
    "pink": (225, 150, 175),
    "brown": (110, 75, 45),
}
MIN_SHARE = 0.08
"""Colours that cover less of the image are not named."""


def describe(image: Image.Image) -> SceneText:
    """Texts that name the most common colours, at most three, the most common first."""
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX)).reshape(-1, 1, 3).astype(np.float64)
    # [1024, 1, 3] - [colours, 3] -> squared distances [1024, colours] -> nearest colour [1024]
    nearest = np.square(pixels - np.array(list(COLOURS.values()))).sum(-1).argmin(-1)
    shares = np.bincount(nearest, minlength=len(COLOURS)) / len(nearest)
    order = [int(index) for index in np.argsort(-shares, kind="stable")[:3] if shares[index] >= MIN_SHARE]
    names = [list(COLOURS)[index] for index in order]
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    most = f"most of it is {names[0]}" + (f", some is {names[1]}" if len(names) > 1 else "")
    return SceneText(
        rough=f"{', '.join(names)} shapes",
        middle=f"overlapping {listed} shapes.",
        final=f"overlapping {listed} shapes: {most}.",
        tags=(*names, "shapes"),
    )


def dead_leaves(rng: np.random.Generator, side: int) -> Image.Image:
    """Overlapping opaque shapes with power-law sizes, each shaded and textured: edges as in photographs."""
    big = 2 * side
    image = Image.new("RGB", (big, big), _colour(rng))
    radii = 0.05 * rng.random(int(rng.integers(15, 60))) ** -0.6
    for radius in np.minimum(radii, 0.6) * big:
        mask = _leaf_mask(rng, float(radius))
        left, top = rng.integers(-mask.width // 2, big - mask.width // 2, 2).tolist()
        image.paste(_leaf_paint(rng, mask.width), (left, top), mask)
    return image.resize((side, side), Image.Resampling.BOX)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A random colour, more often greyish than saturated."""
    grey, tint = rng.uniform(0, 255), rng.normal(size=3) * rng.choice((5.0, 25.0, 70.0))
    red, green, blue = np.clip(grey + tint, 0, 255).astype(int).tolist()
    return red, green, blue


def _leaf_mask(rng: np.random.Generator, radius: float) -> Image.Image:
    """Mask of an ellipse or a polygon, L, square, sometimes out of focus."""
    centre = 1.6 * radius + 4
    mask = Image.new("L", (int(2 * centre), int(2 * centre)))
    draw = ImageDraw.Draw(mask)
    if rng.random() < 0.5:
        wide, high = radius * rng.uniform(0.4, 1.6, 2)
        draw.ellipse((centre - wide, centre - high, centre + wide, centre + high), fill=255)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        corners = centre + 1.4 * radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 3)))) if rng.random() < 0.2 else mask


def _leaf_paint(rng: np.random.Generator, side: int) -> Image.Image:
    """A square of paint: flat, shaded between two colours, or with noise of a random coarseness."""
    kind, first = rng.random(), _colour(rng)
    if kind < 0.3:
        return Image.new("RGB", (side, side), first)
    cells = 2 if kind < 0.7 else int(rng.integers(4, max(5, side // 3)))
    spread = 40.0 if kind < 0.7 else rng.uniform(5, 50)
    field = np.clip(np.array(first) + rng.normal(size=(cells, cells, 1)) * spread, 0, 255).astype(np.uint8)
    return Image.fromarray(field).resize((side, side), Image.Resampling.BILINEAR)
