"""Make the images of shapes that sft_tiny trains on beside the photographs: python tools/make_shapes.py

Writes runs/shapes/: the images, and one manifest of them and of the bundled photographs (each training photograph
PHOTOGRAPH_SHARE times, so that two in five training images are one).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from realsr_hpc.config.arguments import read_arguments  # noqa: E402
from realsr_hpc.data.manifest import ManifestEntry, read_manifest, sha256_of, write_manifest  # noqa: E402
from realsr_hpc.data.shapes import dead_leaves, describe  # noqa: E402

SEED, NUM_IMAGES, SIDE_PX, PHOTOGRAPH_SHARE = 0, 1600, 144, 5


def main(folder: Path = ROOT / "runs" / "shapes", num_images: int = NUM_IMAGES) -> int:
    """Write the folder."""
    photographs = ROOT / "recipes" / "assets" / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_shapes(folder, number) for number in track(range(num_images), "shapes")]
    for entry in read_manifest(photographs / "manifest.parquet").entries:
        path = os.path.relpath(photographs / entry.path, folder)
        for copy in range(PHOTOGRAPH_SHARE if entry.split == "train" else 1):
            entries.append(replace(entry, key=f"{entry.key}-{copy}", path=path))
    write_manifest(folder / "manifest.parquet", entries)
    return 0


def _shapes(folder: Path, number: int) -> ManifestEntry:
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
        source="made by tools/make_shapes.py",
    )


if __name__ == "__main__":
    try:
        read_arguments(sys.argv[1:], {}, __doc__)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
