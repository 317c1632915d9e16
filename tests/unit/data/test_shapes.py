"""Images of shapes: their texts name the colours that they contain."""

import numpy as np
from PIL import Image

from realsr_hpc.data.shapes import COLOURS, dead_leaves, describe


def test_texts_name_the_colours_commonest_first():
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :40], pixels[:, 40:] = COLOURS["red"], COLOURS["blue"]
    scene = describe(Image.fromarray(pixels))
    assert scene.tags == ("red", "blue", "shapes")
    assert scene.final == "overlapping red and blue shapes: most of it is red, some is blue."


def test_of_four_colours_the_three_commonest_are_named():
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    for name, columns in zip(("red", "blue", "green", "yellow"), ((0, 10), (10, 24), (24, 44), (44, 64)), strict=True):
        pixels[:, slice(*columns)] = COLOURS[name]
    pixels[:8, 40:44] = COLOURS["yellow"]
    assert describe(Image.fromarray(pixels)).tags == ("yellow", "green", "blue", "shapes")


def test_a_colour_of_a_few_pixels_is_not_named():
    pixels = np.full((64, 64, 3), COLOURS["green"], dtype=np.uint8)
    pixels[:8, :8] = COLOURS["white"]
    assert describe(Image.fromarray(pixels)).tags == ("green", "shapes")


def test_every_tag_stands_in_the_texts():
    scene = describe(dead_leaves(np.random.default_rng(3), 96))
    assert all(tag in scene.rough and tag in scene.final for tag in scene.tags)
