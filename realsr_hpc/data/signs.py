"""Generates signs: a short word in one colour on a plain background or a photograph.

The word on a sign is known exactly, so reading and restoring can be measured exactly: the rough text must name the
word, the final image must show it. Fonts are those that matplotlib ships (DejaVu, STIX, Computer Modern). Held-out
signs use other fonts and other words (lexicon.py) than training signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from realsr_hpc.data.lexicon import HELDOUT_WORDS, TRAINING_WORDS
from realsr_hpc.data.shapes import COLOURS
from realsr_hpc.records import SceneText

TRAINING_FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono-Bold", "STIXGeneralBol", "cmb10", "DejaVuSerif")
HELDOUT_FONTS = ("DejaVuSerif-Bold", "STIXGeneralBolIta")
MIN_CONTRAST = 100
"""Smallest difference in luma (0..255) between letters and their background."""
MAX_BUSY = 40
"""Largest standard deviation of luma behind letters that are drawn directly on a photograph."""
_LUMA = np.array([0.299, 0.587, 0.114])
_FINE = 3
"""Factor by which letters are drawn larger before they are averaged down."""


@dataclass(frozen=True)
class Ground:
    """A photograph behind a sign, with a caption."""

    photograph: Image.Image
    words: str
    key: str = ""
    """Key of the photograph."""


@dataclass(frozen=True)
class Sign:
    """An image with a word, and true texts about it."""

    image: Image.Image
    scene: SceneText
    ground: str = ""
    """Key of the photograph behind it; empty on a plain ground."""


def make_sign(rng: np.random.Generator, side: int, grounds: Sequence[Ground], heldout: bool = False) -> Sign:
    """A square sign of `side` px, in a quarter of cases (always without `grounds`) plain, else on a photograph."""
    word = str(rng.choice(HELDOUT_WORDS if heldout else TRAINING_WORDS))
    font = str(rng.choice(HELDOUT_FONTS if heldout else TRAINING_FONTS))
    mask = _letters(rng, word.upper(), font, side)
    plain = not grounds or rng.random() < 0.25
    if plain:
        name, letters = _two_colours(rng)
        return Sign(_painted(rng, _flat(rng, name, side), mask, letters), sign_texts(word, letters, name, "plain"))
    ground = grounds[int(rng.integers(len(grounds)))]
    image = _window(rng, ground.photograph, side)
    letters = _readable_on(rng, image, mask)
    if letters is not None and rng.random() < 0.5:
        return Sign(_painted(rng, image, mask, letters), sign_texts(word, letters, "", ground.words), ground.key)
    name, letters = _two_colours(rng)
    image.paste(_flat(rng, name, side), (0, 0), _plate(mask))
    return Sign(_painted(rng, image, mask, letters), sign_texts(word, letters, name, ground.words), ground.key)


def sign_texts(word: str, letters: str, plate: str, ground: str) -> SceneText:
    """Texts about a sign; `plate` is empty if the letters are drawn on the photograph itself.

    `ground` says what the photograph shows, or is "plain".
    """
    shown = word.upper()
    on = f" on {'an' if plate[0] in 'aeiou' else 'a'} {plate} sign" if plate else ""
    behind = "" if ground == "plain" else f" over {ground}"
    names = [name for name in (letters, plate) if name]
    return SceneText(
        rough=f"sign {shown}, {', '.join(names)}",
        middle=f"the word {shown} in {letters} letters{on or ' on a photograph'}.",
        final=f"the word {shown} in {letters} letters{on}{behind}.",
        tags=("sign", word, *names),
        word=word,
    )


@cache
def _font_file(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(name)), size)


def _letters(rng: np.random.Generator, word: str, font: str, side: int) -> Image.Image:
    """The word as a mask, L: 70 to 95 % of the width, at most half the height, slightly rotated and slanted."""
    big = side * _FINE
    spacing = float(rng.uniform(0.02, 0.12))
    # measured at 100 px per em and scaled to the drawn size, because text grows in proportion
    measured = _font(font, 100)
    width = measured.getlength(word) + 100 * spacing * (len(word) - 1)
    _, top, _, bottom = measured.getbbox(word)
    size = 100 * min(big * float(rng.uniform(0.70, 0.95)) / width, 0.5 * big / (bottom - top))
    drawn, scale = _font(font, round(size)), size / 100
    mask = Image.new("L", (big, big))
    draw, x = ImageDraw.Draw(mask), (big - width * scale) / 2 + big * float(rng.uniform(-0.02, 0.02))
    y = (big - (top + bottom) * scale) / 2 + big * float(rng.uniform(-0.12, 0.12))
    for letter in word:
        draw.text((x, y), letter, fill=255, font=drawn)
        x += drawn.getlength(letter) + size * spacing
    # drawn at a multiple of the size, then averaged down: antialiased edges
    slant, turn = float(rng.uniform(-0.15, 0.15)), float(rng.uniform(-5, 5))
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, slant, -slant * big / 2, 0, 1, 0))
    return mask.rotate(turn, Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BOX)


def _plate(mask: Image.Image) -> Image.Image:
    """Mask of the rectangle around the letters, with a margin."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    margin = mask.width // 16
    plate = Image.new("L", mask.size)
    ImageDraw.Draw(plate).rectangle((left - margin, top - margin, right + margin, bottom + margin), fill=255)
    return plate


def _two_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a background colour and of a letter colour that contrasts with it."""
    names = list(COLOURS)
    ground = str(rng.choice(names))
    readable = [name for name in names if abs(_luma(COLOURS[name]) - _luma(COLOURS[ground])) >= MIN_CONTRAST]
    return ground, str(rng.choice(readable))


def _readable_on(rng: np.random.Generator, image: Image.Image, mask: Image.Image) -> str | None:
    """A colour that contrasts with the photograph behind the letters; None if the photograph is too busy there."""
    behind = (np.asarray(image) @ _LUMA)[np.asarray(_plate(mask)) > 0]
    if behind.std() > MAX_BUSY:
        return None
    far = MIN_CONTRAST + behind.std()
    readable = [name for name, colour in COLOURS.items() if abs(_luma(colour) - behind.mean()) >= far]
    return str(rng.choice(readable)) if readable else None


def _luma(colour: tuple[int, int, int]) -> float:
    return float(np.array(colour) @ _LUMA)


def _flat(rng: np.random.Generator, name: str, side: int) -> Image.Image:
    """An image of one colour that is slightly uneven from corner to corner."""
    corners = np.array(COLOURS[name]) + rng.normal(size=(2, 2, 1)) * 8 + rng.normal(size=3) * 6
    return Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


def _painted(rng: np.random.Generator, image: Image.Image, mask: Image.Image, letters: str) -> Image.Image:
    image.paste(_flat(rng, letters, image.width), (0, 0), mask)
    return image


def _window(rng: np.random.Generator, photograph: Image.Image, side: int) -> Image.Image:
    """A square of the photograph, at least half its shorter side, mirrored half the time."""
    source = round(min(photograph.size) * float(rng.uniform(0.5, 1.0)))
    left, top = (int(rng.integers(length - source + 1)) for length in photograph.size)
    window = photograph.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + source, top + source))
    return window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else window
