"""Score a folder of images: python tools/score.py input=DIR [metric=niqe,ranker,psnr_y,ssim_y,PYIQA_NAME] [truth=DIR].

psnr_y and ssim_y need truth=DIR with files of the same names and sizes. pyiqa's metrics by name need the extra `iqa`
and weights_dir=DIR. Higher is better but for niqe (the distance itself). output=FILE.csv keeps the table.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from realsr_hpc.config.arguments import read_arguments  # noqa: E402

DEFAULTS = {"input": None, "metric": "niqe,ranker", "truth": None, "weights_dir": None, "output": None}


def main(arguments: list[str]) -> int:
    """Exit code: 0 scored, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS)
        if not given["input"]:
            raise ValueError("input=DIR is needed")
        files, columns = score(given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows = list(zip([file.name for file in files], *columns.values(), strict=True))
    means = ["mean", *(float(np.nanmean(column)) for column in columns.values())]
    for name, *values in [["image", *columns], *rows, means]:
        cells = [f"{value:>12.4f}" if isinstance(value, float) else f"{value:>12}" for value in values]
        print(f"{name:<32}", *cells)
    if given["output"]:
        with open(given["output"], "w", newline="") as file:
            csv.writer(file).writerows([["image", *columns], *rows])
    return 0


def score(given: dict[str, str | None]) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Files and their scores by metric, NaN where an image is too small."""
    from realsr_hpc.restore import find_images, read_picture

    source = Path(str(given["input"]))
    files = find_images(source, source / ".none")
    if not files:
        raise ValueError(f"input={source}: no images there")
    images = [read_picture(file).rgb for file in files]
    truths = _truths(files, images, given["truth"])
    names = str(given["metric"]).split(",")
    return files, {name: np.asarray(_scorer(name, given, truths)(images), dtype=np.float64) for name in names}


def _truths(files: list[Path], images: list[np.ndarray], folder: str | None) -> list[np.ndarray] | None:
    from realsr_hpc.restore import read_picture

    if folder is None:
        return None
    missing = [file.name for file in files if not (Path(folder) / file.name).is_file()]
    if missing:
        raise ValueError(f"truth={folder} has no {', '.join(missing[:3])}; the names must be those of input=")
    truths = [read_picture(Path(folder) / file.name).rgb for file in files]
    for file, image, truth in zip(files, images, truths, strict=True):
        if image.shape != truth.shape:
            raise ValueError(f"{file.name} is {image.shape[:2]}, its truth {truth.shape[:2]} px; they must agree")
    return truths


def _scorer(name: str, given: dict[str, str | None], truths: list[np.ndarray] | None) -> Callable:
    from realsr_hpc.config.paths import resolve
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH
    from realsr_hpc.rewards.metrics import psnr_y, ssim_y
    from realsr_hpc.rewards.niqe import NIQEModel, niqe
    from realsr_hpc.rewards.ranker import Ranker

    if name in ("psnr_y", "ssim_y"):
        if truths is None:
            raise ValueError(f"metric={name} needs truth=DIR")
        metric = {"psnr_y": psnr_y, "ssim_y": ssim_y}[name]
        return lambda images: [metric(a[None], b[None])[0] for a, b in zip(images, truths, strict=True)]
    if name == "niqe":
        model = NIQEModel.load(resolve(NIQE_PATH))
        return lambda images: niqe(images, model)
    if name == "ranker":
        return Ranker.load(resolve(RANKER_PATH)).score
    from realsr_hpc.rewards.pyiqa_adapter import PyiqaMetrics

    return PyiqaMetrics([name], given["weights_dir"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
