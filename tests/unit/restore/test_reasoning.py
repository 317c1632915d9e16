"""The picture of a restoration's steps: the position of each image and the text below."""

from __future__ import annotations

import numpy as np
from PIL import ImageDraw

from realsr_hpc.artifacts.restoration import RestoredTile
from realsr_hpc.restore.reasoning import MAX_SIDE_PX, steps_picture
from realsr_hpc.restore.tiles import Blended

RED, GREEN, BLUE, YELLOW = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)


def flat(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_the_steps_stand_in_their_order_with_the_first_tiles_texts(monkeypatch):
    said: list[str] = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, **how: said.append(text) or write(self, place, text, **how),
    )
    tiles = [
        RestoredTile(0, 0, True, False, phrase, texts, ())
        for phrase, texts in (("heavy blur", ("a", None, "c")), ("light blur", ("d", "e", "f")))
    ]
    steps = {"middle": flat(32, 48, BLUE), "rough": flat(16, 24, GREEN)}
    picture = steps_picture(flat(16, 24, RED), Blended(flat(64, 96, YELLOW), steps, tuple(tiles)))
    assert picture.width == 4 * (96 + 4) + 4
    centres = [picture.getpixel((4 + 100 * number + 48, 18 + 32)) for number in range(4)]
    assert centres == [RED, GREEN, BLUE, YELLOW]
    assert said[:4] == ["input", "rough", "middle", "final"]
    assert said[4:] == [
        "degradation (tile 1 of 2): heavy blur",
        "rough (tile 1 of 2): a",
        "middle (tile 1 of 2): not well-formed",
        "final (tile 1 of 2): c",
    ]


def test_a_large_image_is_shown_smaller_and_a_small_one_as_it_is():
    tile = (RestoredTile(0, 0, True, False, "x", ("a", "b", "c"), ()),)
    for size, shown in ((4 * MAX_SIDE_PX, MAX_SIDE_PX), (64, 64)):
        picture = steps_picture(flat(8, 8, RED), Blended(flat(size // 2, size, YELLOW), {}, tile))
        assert picture.width == 2 * (shown + 4) + 4
        assert picture.getpixel((4 + shown + 4 + shown // 2, 18 + shown // 4)) == YELLOW
