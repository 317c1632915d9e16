"""Score a folder of images, to inspect a reward before training with it: realsr-hpc score input=DIR [key=value ...]

metric=NAME,...    niqe, ranker, stripes, psnr_y, ssim_y or a no-reference metric of pyiqa (extra `iqa`); default:
                   niqe,ranker. Higher is better, except for niqe (a distance) and stripes (share of stripes)
rewards=GROUP      instead of metrics, the rewards of recipes/rewards/GROUP.yaml (or recipe=NAME: those of a recipe),
                   with overrides such as rewards.terms.generation.options.expert=niqe. Texts are scored if the
                   NAME.json of realsr-hpc restore is beside an image; terms without their inputs are left out, named
lq=DIR truth=DIR   low-quality images and truths with the same names
manifest=FILE      captions and tags by key, for the understanding reward
weights_dir=DIR    staged weights of pyiqa's metrics
output=FILE.csv    also write the table to a file
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from realsr_hpc.config.arguments import read_with_overrides
from realsr_hpc.files import printable, replacing, writable_folder

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


def main(arguments: list[str]) -> int:
    """Exit code: 0 all scored, 1 some file could not be read, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__, sections_only=True)
        if not given["input"]:
            raise ValueError("input=DIR is needed")
        refuse_what_would_be_lost(given, overrides)
        refuse_bad_output(given["output"])
        found, unread = find_files(Path(str(given["input"])), given)
        return max(score(found, given, overrides), int(bool(unread)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def refuse_what_would_be_lost(given: dict[str, str | None], overrides: list[str]) -> None:
    """ValueError for an option of rewards where metrics are asked for, or the other way round."""
    if given["rewards"] or given["recipe"]:
        if given["metric"] != DEFAULTS["metric"]:
            raise ValueError(f"metric={given['metric']}: not with rewards= or recipe=, which score instead")
    elif overrides or given["manifest"]:
        named = overrides[0] if overrides else f"manifest={given['manifest']}"
        raise ValueError(f"{named}: goes with rewards=GROUP or recipe=NAME; name one")


def refuse_bad_output(output: str | None) -> None:
    """Raise ValueError, before anything is computed, if the table cannot be written."""
    if output and Path(output).exists() and not Path(output).is_file():
        what = "a folder" if Path(output).is_dir() else "a device or pipe"
        raise ValueError(f"output={output}: {what}; name a file, such as scores.csv")
    if output:
        writable_folder(Path(output).absolute().parent, "output")


def find_files(source: Path, given: dict[str, str | None]) -> tuple[dict[Path, str], dict[str, str]]:
    """The images with their paths relative to the folder, and by path why others cannot be read.

    ValueError if there are none, or truth= or lq= lacks a file of the same name.
    """
    from realsr_hpc.data.decoding import SUFFIXES
    from realsr_hpc.restore.image_files import find_images

    found, unread = find_images(source, source / ".none")
    for name, why in unread.items():
        print(printable(f"left out: {name}: {why}"), file=sys.stderr)
    root = source if source.is_dir() else source.parent
    files = {file: str(file.relative_to(root)) for file in found if not file.name.endswith(".steps.jpg")}
    if not files:
        raise ValueError(f"input={source}: no images found; known endings: {', '.join(sorted(SUFFIXES))}")
    for field in ("truth", "lq"):
        folder = given[field]
        missing = [printable(name) for name in files.values() if folder and not (Path(folder) / name).is_file()]
        if missing:
            raise ValueError(f"{field}={folder} has no {', '.join(missing[:3])}; the names must be those of input=")
    return files, unread


def score(found: dict[Path, str], given: dict[str, str | None], overrides: list[str]) -> int:
    """Read the images, score them and print the table and what was left out; returns the exit code."""
    from realsr_hpc.evaluate.scores import metric_columns, read_images, reward_columns

    partners = (Path(folder) if folder else None for folder in (given["truth"], given["lq"]))
    to_score, left_out = read_images(found, *partners)
    if not to_score.files:
        raise ValueError(f"input={given['input']}: none of its {len(found)} images can be read: {left_out}")
    lacking = {}
    if given["rewards"] or given["recipe"]:
        from realsr_hpc.config.load import compose_one

        # To read a rewards group any recipe can be used, because the group replaces all of its rewards.
        chosen = [f"recipe={given['recipe'] or 'grpo_tiny'}"] + [f"rewards={given['rewards']}"] * bool(given["rewards"])
        terms = compose_one([*chosen, *overrides]).rewards.terms
        columns, lacking = reward_columns(to_score, terms, given["manifest"])
    else:
        columns = metric_columns(to_score, str(given["metric"]).split(","), given["weights_dir"])
    for name, why in [*left_out.items(), *((name, f"needs {what}") for name, what in lacking.items())]:
        print(f"left out: {name} {why}", file=sys.stderr)
    show([printable(name) for name in to_score.names], columns, given["output"])
    return 1 if left_out else 0


def show(names: list[str], columns: dict[str, np.ndarray], output: str | None) -> None:
    """Print the table, and write it to `output` if given."""
    rows = list(zip(names, *(column.tolist() for column in columns.values()), strict=True))
    known = [column[~np.isnan(column)] for column in columns.values()]
    means = ["mean", *(float(values.mean()) if values.size else float("nan") for values in known)]
    for name, *values in [["image", *columns], *rows, means]:
        cells = [f"{value:>14.4f}" if isinstance(value, float) else f"{value:>14}" for value in values]
        print(f"{name:<32}", *cells)
    if output:
        with replacing(Path(output)) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image", *columns], *rows])
