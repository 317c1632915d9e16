"""Training text of the recipe's text tokenizer: the trace's own words, captions, and some plain English.

Words on signs are excluded: they are in capitals, which therefore remain single-letter tokens, so that a policy spells
unseen words the same way as known ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.data.shapes import COLOURS
from realsr_hpc.data.signs import sign_texts
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.text import TextTokenizer, train_text_tokenizer
from realsr_hpc.vlcot.grammar import degradation_phrases
from realsr_hpc.vlcot.sequence import FIELDS

REPEATS = 8
"""Captions and the instruction weigh more than the plain sample, so that their words become few tokens."""

PLAIN_ENGLISH = """
a photograph of a person, a man, a woman and a child in the street with houses, windows, doors and a bright blue sky.
the dog runs over green grass and the bird sits on the branch of a tree near the river, the lake or the sea.
mountains, snow, clouds, trees, leaves, flowers, stones, sand and water under the light of the morning sun.
a table with a cup, a plate, a bottle, a book, fruit, bread and vegetables in front of a wooden wall.
a car, a bus, a train, a boat, a bicycle and an aeroplane move along the road, the bridge, the harbour and the station.
red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, silver, golden, dark, bright and pale.
small, large, long, short, old, new, round, square, soft, hard, smooth, rough, shiny, wet and dry things.
a close view from above, below, behind, beside, between, in front of, on the left, on the right and in the middle.
a horse, a cow, a sheep, a lion, an elephant, a fish, an insect, a butterfly and a cat with eyes, ears and fur.
the building has a tower, a roof, columns, bricks, stairs, a clock, a sign with letters and a flag.
she wears a hat, a coat, a shirt, a dress, glasses and shoes; he holds a camera and smiles at the crowd.
blurred, noisy and compressed images are restored to sharp, clean and natural ones with fine texture and detail.
"""


def train_recipe_text_tokenizer(config: RunConfig, path: Path) -> TextTokenizer:
    """The tokenizer of a recipe; held-out captions are not read."""
    tags = [tag for field in FIELDS for tag in (f"<{field}>", f"</{field}>")]
    return train_text_tokenizer(_texts(config), config.tokenizer_training.text_vocab_size, path, tags)


def _texts(config: RunConfig) -> Iterator[str]:
    yield from [config.vlcot.instruction] * REPEATS
    yield from degradation_phrases()
    yield from PLAIN_ENGLISH.strip().splitlines()
    for letters, plate in zip(COLOURS, reversed(COLOURS), strict=True):
        yield from sign_texts("", letters, plate, "plain").captions
        yield f"overlapping {letters}, {plate} shapes: most of it is {letters}, some is {plate}."
    manifest = read_manifest(resolve(config.data.manifest)).split(config.data.train_split)
    for scene in [entry.scene for entry in manifest.entries] * REPEATS:
        if scene is not None:
            yield from scene.captions
            yield ", ".join(scene.tags)
