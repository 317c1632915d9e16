"""Score a folder of images, to look at a reward before training on it: python tools/score.py input=DIR [key=value ...]

metric=NAME,...    niqe, ranker, stripes, psnr_y, ssim_y or any no-reference metric of pyiqa (extra `iqa`); the default
                   is niqe,ranker. Higher is better but for niqe (the distance itself) and stripes (share of stripes)
rewards=GROUP      instead: the rewards of recipes/rewards/GROUP.yaml (recipe=NAME: those that this recipe trains on),
                   and overrides such as rewards.terms.generation.options.expert=niqe. With tools/restore.py's NAME.json
                   beside an image its texts are scored, too; what needs something that is not given is left out, named
lq=DIR truth=DIR   low-quality images and truths of the same names
manifest=FILE      captions and tags by key, for the understanding reward
weights_dir=DIR    staged weights of pyiqa's metrics
output=FILE.csv    keeps the table
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from realsr_hpc.config.arguments import read_with_overrides  # noqa: E402

DEFAULTS = {
    "input": None,
    "metric": "niqe,ranker",
    "rewards": None,
    "recipe": None,
    "lq": None,
    "truth": None,
    "manifest": None,
    "weights_dir": None,
    "output": None,
}
Columns = dict[str, np.ndarray]


def main(arguments: list[str]) -> int:
    """Exit code: 0 all scored, 1 some file could not be read, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__, sections_only=True)
        if not given["input"]:
            raise ValueError("input=DIR is needed")
        found = find_files(Path(str(given["input"])), given)
        files, images, truths, lqs = read_readable(found, given)
        if given["rewards"] or given["recipe"]:
            columns = score_rewards(files, images, truths, lqs, given, overrides)
        else:
            columns = score_metrics(files, images, truths, given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    show([file.name for file in files], columns, given["output"])
    return 0 if len(files) == len(found) else 1


def show(names: list[str], columns: Columns, output: str | None) -> None:
    """Print the table, and keep it where `output` says."""
    rows = list(zip(names, *(column.tolist() for column in columns.values()), strict=True))
    known = [column[~np.isnan(column)] for column in columns.values()]
    means = ["mean", *(float(values.mean()) if values.size else float("nan") for values in known)]
    for name, *values in [["image", *columns], *rows, means]:
        cells = [f"{value:>14.4f}" if isinstance(value, float) else f"{value:>14}" for value in values]
        print(f"{name:<32}", *cells)
    if output:
        with open(output, "w", newline="") as file:
            csv.writer(file).writerows([["image", *columns], *rows])


def find_files(source: Path, given: dict[str, str | None]) -> list[Path]:
    """The images. Raises ValueError without any, and where truth= or lq= lacks one of their names."""
    from realsr_hpc.restore.pictures import find_images

    files = [file for file in find_images(source, source / ".none") if not file.name.endswith(".steps.jpg")]
    if not files:
        raise ValueError(f"input={source}: no images there")
    for field in ("truth", "lq"):
        folder = given[field]
        missing = [file.name for file in files if folder is not None and not (Path(folder) / file.name).is_file()]
        if missing:
            raise ValueError(f"{field}={folder} has no {', '.join(missing[:3])}; the names must be those of input=")
    return files


def read_readable(
    found: list[Path], given: dict[str, str | None]
) -> tuple[list[Path], list[np.ndarray], list[np.ndarray] | None, list[np.ndarray] | None]:
    """Files, their pixels, truths and low-quality images (None: not given); what cannot be read is named and left out.

    Raises ValueError when nothing is left.
    """
    from realsr_hpc.data.decoding import BrokenImage, decode_image

    folders = {name: None if given[name] is None else Path(str(given[name])) for name in ("truth", "lq")}
    files: list[Path] = []
    read: dict[str, list[np.ndarray]] = {"input": [], "truth": [], "lq": []}
    for file in found:
        paths = {"input": file} | {name: folder / file.name for name, folder in folders.items() if folder is not None}
        try:
            pixels = {name: decode_image(path) for name, path in paths.items()}
        except BrokenImage as error:
            print(f"left out: {file.name}: cannot be read ({error})", file=sys.stderr)
            continue
        files.append(file)
        for name, values in pixels.items():
            read[name].append(values)
    if not files:
        raise ValueError(f"input={given['input']}: none of its {len(found)} images can be read")
    return files, read["input"], *(None if folders[name] is None else read[name] for name in ("truth", "lq"))


def score_metrics(
    files: list[Path], images: list[np.ndarray], truths: list[np.ndarray] | None, given: dict[str, str | None]
) -> Columns:
    """Scores by metric, NaN where an image is too small."""
    for file, image, truth in zip(files, images, truths or images, strict=True):
        if image.shape != truth.shape:
            raise ValueError(f"{file.name} is {image.shape[:2]}, its truth {truth.shape[:2]} px; they must agree")
    names = str(given["metric"]).split(",")
    return {name: np.asarray(_scorer(name, given, truths)(images), dtype=np.float64) for name in names}


def _scorer(name: str, given: dict[str, str | None], truths: list[np.ndarray] | None) -> Callable:
    from realsr_hpc.config.paths import resolve
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH
    from realsr_hpc.rewards.metrics import psnr_y, ssim_y
    from realsr_hpc.rewards.niqe import NIQEModel, niqe
    from realsr_hpc.rewards.ranker import Ranker
    from realsr_hpc.rewards.stripes import stripe_share

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
    if name == "stripes":
        return stripe_share
    from realsr_hpc.rewards.pyiqa_adapter import PyiqaMetrics

    return PyiqaMetrics([name], given["weights_dir"])


def score_rewards(
    files: list[Path],
    images: list[np.ndarray],
    truths: list[np.ndarray] | None,
    lqs: list[np.ndarray] | None,
    given: dict[str, str | None],
    overrides: list[str],
) -> Columns:
    """Scores by the terms of the reward group, or of the recipe, and their weighted total."""
    from realsr_hpc.config.load import compose_one
    from realsr_hpc.rewards.base import Candidate
    from realsr_hpc.rewards.mixture import build_reward, weight_at

    # Any recipe will do to read a group with: a group replaces all of its rewards.
    chosen = [f"recipe={given['recipe'] or 'grpo_tiny'}"] + [f"rewards={given['rewards']}"] * bool(given["rewards"])
    terms = compose_one([*chosen, *overrides]).rewards.terms
    scenes, traces = read_scenes(files, given["manifest"]), [read_trace(file) for file in files]
    for name, lacking in lacking_of(terms, traces, lqs, truths, scenes).items():
        print(f"left out: {name} needs {lacking}", file=sys.stderr)
        terms = {other: term for other, term in terms.items() if other != name}
    candidates = [
        Candidate(trace or no_trace(), image, small, truth, None, scene)
        for trace, image, small, truth, scene in zip(
            traces, images, lqs or images, truths or [None] * len(files), scenes, strict=True
        )
    ]
    columns = {name: build_reward(name, term).score(candidates) for name, term in terms.items()}
    if columns:
        columns["total"] = np.sum([weight_at(terms[name], 1) * column for name, column in columns.items()], axis=0)
    return columns


def lacking_of(terms, traces, lq, truths, scenes) -> dict[str, str]:
    """What each term would need and is not given."""
    lacking = {}
    for name, term in terms.items():
        reference = term.options.get("reference", "lq")
        if term.kind in ("format", "degradation", "understanding") and not all(traces):
            lacking[name] = "NAME.json of tools/restore.py beside each image"
        elif term.kind == "degradation":
            lacking[name] = "the degradation that was applied, which only training knows"
        elif term.kind == "understanding" and not all(scenes):
            lacking[name] = "manifest=FILE with captions under each image's name"
        elif term.options.get("degradation") == "known":
            lacking[name] = "the degradation that was applied, which only training knows"
        elif term.kind == "fidelity" and (lq if reference == "lq" else truths) is None:
            lacking[name] = f"{'lq' if reference == 'lq' else 'truth'}=DIR"
    return lacking


def read_trace(file: Path):
    """The first tile's trace as `tools/restore.py` told it; None without."""
    from realsr_hpc.records import ParsedTrace

    beside = file.with_suffix(".json")
    tiles = json.loads(beside.read_text()).get("tiles") if beside.is_file() else None
    if not tiles:
        return None
    grids = (np.zeros((1, 1), np.int64),) * 3 if tiles[0]["well_formed"] else (None,) * 3
    return ParsedTrace(tiles[0]["degradation"], tuple(tiles[0]["texts"]), grids, tuple(tiles[0]["faults"]))


def no_trace():
    """Nothing said."""
    from realsr_hpc.records import ParsedTrace

    return ParsedTrace(None, (None,) * 3, (None,) * 3, ())


def read_scenes(files: list[Path], manifest: str | None) -> list:
    """Captions and tags of each image by its name without ending, None where unknown."""
    if manifest is None:
        return [None] * len(files)
    from realsr_hpc.data.manifest import read_manifest

    scenes = {entry.key: entry.scene for entry in read_manifest(manifest).entries}
    return [scenes.get(file.stem) for file in files]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
