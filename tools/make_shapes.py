"""Make the images of shapes that sft_tiny trains on beside the photographs: python tools/make_shapes.py

Writes recipes/assets/shapes/: the images, and one manifest of them and of the bundled photographs (each of those
PHOTOGRAPH_SHARE times, so that the two kinds come about equally often).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from realsr_hpc.data.manifest import ManifestEntry, read_manifest, sha256_of, write_manifest  # noqa: E402
from realsr_hpc.data.shapes import dead_leaves, describe  # noqa: E402

SEED, NUM_IMAGES, SIDE_PX, PHOTOGRAPH_SHARE = 0, 240, 144, 6


def main() -> int:
    """Write the folder."""
    assets = ROOT / "recipes" / "assets"
    folder = assets / "shapes"
    folder.mkdir(exist_ok=True)
    entries = [_shapes(folder, number) for number in track(range(NUM_IMAGES), "shapes")]
    for entry in read_manifest(assets / "photographs" / "manifest.parquet").entries:
        path = f"../photographs/{entry.path}"
        for copy in range(PHOTOGRAPH_SHARE if entry.split == "train" else 1):
            entries.append(replace(entry, key=f"{entry.key}-{copy}", path=path))
    write_manifest(folder / "manifest.parquet", entries)
    return 0


def _shapes(folder: Path, number: int) -> ManifestEntry:
    image = dead_leaves(np.random.default_rng([SEED, number]), SIDE_PX)
    scene, name = describe(image), f"{number:03d}.jpg"
    image.save(folder / name, quality=88)
    return ManifestEntry(
        key=f"shapes-{number:03d}",
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
    sys.exit(main())
