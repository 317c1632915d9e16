"""Generate the scenes that sft_tiny trains on in addition to photographs: realsr-hpc make-scenes

shapes=1600          images of overlapping shapes; their texts name the colours
signs=6000           images with a known word, on plain backgrounds and on the bundled training photographs
heldout_signs=36     signs with other words and fonts, on the held-out photographs: split `heldout`
photographs=24       how often each bundled training photograph is listed; held-out ones are listed once
output=runs/scenes   folder of the generated images and of the manifest of all

Deterministic: an image depends only on its kind and number, so a larger set contains the smaller one.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.locks import sole_writer
from realsr_hpc.paths import resolve

if TYPE_CHECKING:
    from PIL.Image import Image

    from realsr_hpc.data.manifest import Manifest, ManifestEntry
    from realsr_hpc.records import SceneText

DEFAULTS = {
    "shapes": "1600",
    "signs": "6000",
    "heldout_signs": "36",
    "photographs": "24",
    "output": "runs/scenes",
}
SEED, SHAPES_PX, SIGNS_PX = 0, 144, 128
SIGNS, HELDOUT_SIGNS = 1, 2
"""Last part of the random seed of a sign, after SEED and its number."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        counts = {key: read_count(given, key, 0) for key in DEFAULTS if key != "output"}
        folder = resolve(given["output"])
        with sole_writer(folder):
            make(folder, counts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def make(folder: Path, counts: dict[str, int]) -> None:
    """Write the generated images and the manifest of all images into the folder."""
    from rich.progress import track

    from realsr_hpc.data.manifest import read_manifest, write_manifest

    photographs = read_manifest(resolve("recipes/assets/photographs/manifest.parquet"))
    shapes = [make_shapes(folder, number) for number in track(range(counts["shapes"]), "shapes")]
    signs = make_signs(folder, photographs.split("train"), counts["signs"], heldout=False)
    heldout_signs = make_signs(folder, photographs.split("heldout"), counts["heldout_signs"], heldout=True)
    listed = list_photographs(folder, photographs, counts["photographs"])
    heldout = [entry for entry in listed if entry.split == "heldout"]
    # held-out photographs and signs alternate, so that the first few images include both
    turns = [entry for pair in itertools.zip_longest(heldout, heldout_signs) for entry in pair if entry is not None]
    train = [entry for entry in listed if entry.split != "heldout"]
    write_manifest(folder / "manifest.parquet", [*shapes, *signs, *train, *turns])


def make_shapes(folder: Path, number: int) -> ManifestEntry:
    """Generate and write image `number` of shapes; returns its entry."""
    import numpy as np

    from realsr_hpc.data.shapes import dead_leaves, describe

    image = dead_leaves(np.random.default_rng([SEED, number]), SHAPES_PX)
    return _written(image, describe(image), folder, f"shapes-{number:05d}", "train")


def make_signs(folder: Path, photographs: Manifest, count: int, *, heldout: bool) -> list[ManifestEntry]:
    """Generate and write the first `count` signs on photographs of one split; returns their entries."""
    import numpy as np
    from PIL import Image
    from rich.progress import track

    from realsr_hpc.data.signs import Ground, make_sign

    described = [entry for entry in photographs.entries if entry.caption_rough]
    grounds = [Ground(Image.open(photographs.path(e)).convert("RGB"), e.caption_rough, e.key) for e in described]
    stream, split = (HELDOUT_SIGNS, "heldout") if heldout else (SIGNS, "train")
    entries = []
    for number in track(range(count), f"{split} signs"):
        sign = make_sign(np.random.default_rng([SEED, number, stream]), SIGNS_PX, grounds, heldout)
        entry = _written(sign.image, sign.scene, folder, f"{split}-sign-{number:05d}", split)
        behind = f"photograph {sign.ground}" if sign.ground else "a plain ground"
        entries.append(replace(entry, source=f"{entry.source} on {behind}"))
    return entries


def list_photographs(folder: Path, photographs: Manifest, times: int) -> list[ManifestEntry]:
    """Entries of the bundled photographs with paths relative to `folder`; training photographs occur `times` times."""
    entries = []
    for entry in photographs.entries:
        path = os.path.relpath(photographs.path(entry), folder)
        for copy in range(times if entry.split == "train" else 1):
            entries.append(replace(entry, key=f"{entry.key}-{copy}" if copy else entry.key, path=path))
    return entries


def _written(image: Image, scene: SceneText, folder: Path, key: str, split: str) -> ManifestEntry:
    from realsr_hpc.data.manifest import ManifestEntry
    from realsr_hpc.files import sha256_of

    path = folder / f"{key}.jpg"
    image.save(path, quality=92, subsampling=0)
    return ManifestEntry(
        key=key,
        path=path.name,
        split=split,
        width=image.width,
        height=image.height,
        sha256=sha256_of(path),
        caption_rough=scene.rough,
        caption_middle=scene.middle,
        caption_final=scene.final,
        tags=scene.tags,
        source="made by realsr-hpc make-scenes",
        word=scene.word,
    )
