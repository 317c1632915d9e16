"""Degrade photographs as training does, for inspection or testing: realsr-hpc degrade recipe=NAME output=DIR

images=64          number of images; if there are fewer photographs, they recur with other crops and degradations
split=heldout      split of the recipe's manifest (data.manifest=FILE names another manifest)

All other arguments override the recipe. Writes lq/NAME.png and gt/NAME.png (for realsr-hpc evaluate set=paired
data=DIR), labels.csv with the true degradation words of each image, and grid.png. The same recipe and seed give the
same images.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.locks import sole_writer

DEFAULTS = {"output": None, "images": "64", "split": "heldout"}
SHOWN, SHOWN_A_ROW, BATCH = 32, 4, 16
NAME_CHARACTERS = 60
"""Length of the photograph's name in a file name, after the number; most file systems allow 255 bytes in all."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 1 written without some photographs, which are named, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__)
        if not given["output"]:
            raise ValueError("output=DIR is needed")
        output, count = Path(str(given["output"])), read_count(given, "images", 1)
        from realsr_hpc.config.load import compose_one

        config = compose_one(overrides)
        with sole_writer(output):
            if any(not path.name.startswith(".") for path in output.iterdir()):
                raise ValueError(f"output={output}: not empty; name a new folder")
            with _gone_unless_whole(output):
                skipped = degrade(config, output, count, str(given["split"]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{output}: {count} pairs, labels.csv, grid.png")
    return 1 if skipped else 0


@contextmanager
def _gone_unless_whole(output: Path) -> Iterator[None]:
    """Empty the folder again if the block raises, so that the command can be repeated."""
    try:
        yield
    except BaseException:
        for path in (path for path in output.iterdir() if not path.name.startswith(".")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def degrade(config: RunConfig, output: Path, count: int, split: str) -> dict[str, str]:
    """Write the folder; returns by key why photographs could not be used, which the loader has already logged."""
    from PIL import Image
    from rich.progress import track

    from realsr_hpc.data.loader import LQLoader
    from realsr_hpc.evaluate.cases import cases_of
    from realsr_hpc.evaluate.words import SLOTS
    from realsr_hpc.tracking.drawing import image_grid

    loader = LQLoader(config, split, min(BATCH, count), shuffle=False)
    cases = []
    for _ in track(range(-(-count // min(BATCH, count))), "degrading"):
        cases += cases_of(loader.next())
    loader.close()
    for folder in ("lq", "gt"):
        (output / folder).mkdir(parents=True)
    named = [(f"{case.index:05d}_{Path(case.key).stem[:NAME_CHARACTERS]}", case) for case in cases[:count]]
    with (output / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", *SLOTS])
        for name, case in named:
            Image.fromarray(case.lq).save(output / "lq" / f"{name}.png")
            if case.gt is not None:
                Image.fromarray(case.gt).save(output / "gt" / f"{name}.png")
            table.writerow([name, *([] if case.label is None else astuple(case.label))])
    shown = [image for _, case in named[:SHOWN] for image in (case.lq, case.gt)]
    rows = [shown[start : start + 2 * SHOWN_A_ROW] for start in range(0, len(shown), 2 * SHOWN_A_ROW)]
    image_grid(rows, ["low quality", "truth"] * min(SHOWN_A_ROW, len(named))).save(output / "grid.png")
    return loader.skipped
