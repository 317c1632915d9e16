"""What true codes keep of an image: the image tokenizer beside bicubic down and up by its stride, by size.

    python tools/bench.py tokenizer [images=48] [folder=DIR] [section.field=value ...]

Held-out photographs and signs of the recipe's data, central squares; with folder=DIR the images of a folder. PSNR in dB
over RGB, means over the images, and the codes that occur among them; then milliseconds an image at the largest size.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from realsr_hpc.train.tokenizer_measures import bicubic, psnr_db
from tools.benchmarks._measure import show

Pictures = list[Image.Image]


def main(arguments: list[str]) -> int:
    """Exit code 2 for a wrong recipe or a folder without images."""
    given, overrides = read_with_overrides(arguments, {"images": "48", "folder": ""}, __doc__)
    count = read_count(given, "images", 1)
    torch.set_num_threads(1)
    try:
        config = compose_one(["recipe=grpo_tiny", *overrides])
        sets = of_folder(Path(given["folder"])) if given["folder"] else of_recipe(config)
        tokenizer = load_image_tokenizer(config.image_tokenizer, "cpu")
    except (RecipeError, ValueError) as error:
        print(error)
        return 2
    sizes = sorted(config.vlcot.image_sizes_px, reverse=True)
    rows = [row(name, pictures[:count], tokenizer, sizes) for name, pictures in sets.items()]
    columns = ("images", *(f"{size} px: tokenizer / bicubic" for size in sizes), "codes met", "encode ms", "decode ms")
    show(f"{tokenizer.config.codebook_size} codes, one a {tokenizer.config.downsample} px square", columns, rows)
    return 0


def of_recipe(config: RunConfig) -> dict[str, Pictures]:
    """Held-out photographs, and signs where there are any."""
    manifest = read_manifest(resolve(config.data.manifest)).split(config.data.heldout_split)
    found: dict[str, Pictures] = {}
    for entry in manifest.entries:
        kind = "held-out signs" if entry.word else "held-out photographs"
        found.setdefault(kind, []).append(Image.fromarray(decode_image(manifest.path(entry))))
    return found


def of_folder(folder: Path) -> dict[str, Pictures]:
    """The images of a folder; ValueError when there is none."""
    pictures = []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        try:
            pictures.append(Image.fromarray(decode_image(path)))
        except (BrokenImage, OSError):
            continue
    if not pictures:
        raise ValueError(f"folder={folder}: no images found")
    return {folder.name: pictures}


def row(name: str, pictures: Pictures, tokenizer: ImageTokenizer, sizes: list[int]) -> list[str]:
    """PSNR at each size, codes met and times at the first."""
    cells, met, times = [], 0, (0.0, 0.0)
    for size in sizes:
        images = squares(pictures, size)
        start = time.perf_counter()
        codes = tokenizer.encode(images)
        middle = time.perf_counter()
        decoded = tokenizer.decode(codes)
        if size == sizes[0]:
            times = (middle - start, time.perf_counter() - middle)
            met = len(codes.unique())
        by_bicubic = bicubic(images, tokenizer.config.downsample)
        cells.append(f"{psnr_db(decoded, images):.2f} / {psnr_db(by_bicubic, images):.2f}")
    each = [f"{1000 * seconds / len(pictures):.1f}" for seconds in times]
    return [f"{len(pictures)} {name}", *cells, str(met), *each]


def squares(pictures: Pictures, size: int) -> Float[Tensor, "B 3 size size"]:
    """Central squares at `size` px in [-1, 1]."""
    pixels = []
    for picture in pictures:
        side, (width, height) = min(picture.size), picture.size
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        pixels.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box)))
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1).float() / 127.5 - 1.0
