"""Fit and measure the generation experts: realsr-hpc fit-experts [only=niqe|ranker|measure] [steps=800].

Fits NIQE's pristine model and trains the ranker on the bundled training photographs, then prints how often each expert
ranks two versions of a held-out photograph in the right order of degradation. Files are written to output=DIR, by
default recipes/assets/tiny.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.files import json_object
from realsr_hpc.locks import sole_writer
from realsr_hpc.paths import resolve

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOGRAPHS = "recipes/assets/photographs"
DEFAULTS = {"only": None, "steps": "800", "seed": "0", "output": "recipes/assets/tiny", "photographs": PHOTOGRAPHS}


def main(arguments: list[str]) -> int:
    """Exit code: 0 made and measured, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        steps, seed = read_count(given, "steps", 1), read_count(given, "seed")
        if given["only"] not in (None, "niqe", "ranker", "measure"):
            raise ValueError(f"only={given['only']}: give niqe, ranker or measure, or leave it out for all three")
        with sole_writer(resolve(str(given["output"]))):
            _fit(given, steps, seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _fit(given: dict[str, str | None], steps: int, seed: int) -> None:
    from realsr_hpc.quality.fit import fit_niqe, train_ranker
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder, output = resolve(str(given["photographs"])), resolve(str(given["output"]))
    train = photographs(folder, "train")
    if given["only"] in (None, "niqe"):
        fit_niqe(train).save(output / Path(NIQE_PATH).name)
    if given["only"] in (None, "ranker"):
        train_ranker(train, num_steps=steps, seed=seed).save(output / Path(RANKER_PATH).name)
    if given["only"] in (None, "measure"):
        print_measures(output, photographs(folder, "heldout"))


def photographs(folder: Path, split: str) -> list[Image]:
    """The photographs of one split that photographs.jsonl lists in the folder itself, without sub-folders.

    The shipped experts were fitted on the 20 training photographs there; the command reproduces them. So a line or
    photograph that cannot be read raises ValueError instead of being skipped.
    """
    from PIL import Image

    from realsr_hpc.data.decoding import decode_image

    listing = folder / "photographs.jsonl"
    pictures = []
    for number, line in enumerate(listing.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        row = json_object(line) or {}
        path, its_split = row.get("path"), row.get("split")
        if not isinstance(path, str) or not isinstance(its_split, str):
            raise ValueError(f"{listing}:{number}: not a JSON object with path and split; correct the line")
        if its_split != split or "/" in path:
            continue
        try:
            pictures.append(Image.fromarray(decode_image(folder / path)))
        except ValueError as error:  # BrokenImage, and no name that a file can have
            raise ValueError(f"{folder / path} cannot be read ({error}); bring a whole one") from None
    if not pictures:
        raise ValueError(f"{listing}: lists no photograph of split {split!r} in the folder itself")
    return pictures


def print_measures(output: Path, heldout: list) -> None:
    """Print a Markdown table with one row per operator."""
    from realsr_hpc.quality.fit import measure
    from realsr_hpc.quality.niqe import NIQEModel, niqe
    from realsr_hpc.quality.ranker import Ranker
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH

    model, ranker = NIQEModel.load(output / Path(NIQE_PATH).name), Ranker.load(output / Path(RANKER_PATH).name)
    shares = {"niqe": measure(lambda images: -niqe(images, model), heldout), "ranker": measure(ranker.score, heldout)}
    print("| operator | niqe | ranker |\n|---|---|---|")
    for name in shares["niqe"]:
        print(f"| {name} | {shares['niqe'][name]:.3f} | {shares['ranker'][name]:.3f} |")
    means = [sum(column.values()) / len(column) for column in shares.values()]
    print(f"| mean | {means[0]:.3f} | {means[1]:.3f} |")
