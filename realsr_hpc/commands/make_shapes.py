"""Make the images of shapes that sft_tiny trains on beside the photographs: realsr-hpc make-shapes

Writes output=runs/shapes: images=1600 of them, and one manifest of them and of the bundled photographs (each training
photograph PHOTOGRAPH_SHARE times, so that two in five training images are one).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.paths import resolve

if TYPE_CHECKING:
    from realsr_hpc.data.manifest import ManifestEntry

DEFAULTS = {"output": "runs/shapes", "images": "1600"}
SEED, SIDE_PX, PHOTOGRAPH_SHARE = 0, 144, 5


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        num_images = read_count(given, "images", 1)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    make(resolve(given["output"]), num_images)
    return 0


def make(folder: Path, num_images: int) -> None:
    """Write the folder: the images, and the manifest of them and the bundled photographs."""
    from rich.progress import track

    from realsr_hpc.data.manifest import read_manifest, write_manifest

    photographs = resolve("recipes/assets/photographs")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_shapes(folder, number) for number in track(range(num_images), "shapes")]
    for entry in read_manifest(photographs / "manifest.parquet").entries:
        path = os.path.relpath(photographs / entry.path, folder)
        for copy in range(PHOTOGRAPH_SHARE if entry.split == "train" else 1):
            entries.append(replace(entry, key=f"{entry.key}-{copy}", path=path))
    write_manifest(folder / "manifest.parquet", entries)


def _shapes(folder: Path, number: int) -> ManifestEntry:
    import numpy as np

    from realsr_hpc.data.manifest import ManifestEntry, sha256_of
    from realsr_hpc.data.shapes import dead_leaves, describe

    image = dead_leaves(np.random.default_rng([SEED, number]), SIDE_PX)
    scene, name = describe(image), f"{number:04d}.jpg"
    image.save(folder / name, quality=88)
    return ManifestEntry(
        key=f"shapes-{number:04d}",
        path=name,
        split="train",
        width=SIDE_PX,
        height=SIDE_PX,
        sha256=sha256_of(folder / name),
        caption_rough=scene.rough,
        caption_middle=scene.middle,
        caption_final=scene.final,
        tags=scene.tags,
        source="made by realsr-hpc make-shapes",
    )
