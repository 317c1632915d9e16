"""Scores finished images by metrics or rewards, without a run, to inspect a reward before training with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from realsr_hpc.artifacts import restoration
from realsr_hpc.artifacts.stored import Damaged
from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.evaluate.methods import NO_TRACE
from realsr_hpc.files import printable
from realsr_hpc.paths import resolve
from realsr_hpc.quality.niqe import NIQEModel, niqe
from realsr_hpc.quality.psnr_ssim import psnr_y, ssim_y
from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics
from realsr_hpc.quality.ranker import Ranker
from realsr_hpc.quality.stripes import stripe_share
from realsr_hpc.records import Candidate, ParsedTrace, SceneText
from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH
from realsr_hpc.rewards.mixture import build_reward, weight_at

Columns = dict[str, np.ndarray]
"""By metric or reward: scores [images], NaN where an image has none."""


@dataclass(frozen=True)
class ImagesToScore:
    """Images of a folder, RGB uint8 [H, W, 3], in the order of their files, with truths and low-quality images."""

    files: list[Path]
    names: list[str]
    """Paths relative to the folder."""
    images: list[np.ndarray]
    truths: list[np.ndarray] | None
    lqs: list[np.ndarray] | None


def read_images(found: Mapping[Path, str], truth: Path | None, lq: Path | None) -> tuple[ImagesToScore, dict[str, str]]:
    """Read the images in `found` (file -> path relative to its folder).

    Truths and low-quality images have the same relative paths in the folders `truth` and `lq`. Returns the images, and
    by name the reason for each that was left out because it or its counterparts cannot be read.
    """
    folders = {"truth": truth, "lq": lq}
    read: dict[str, list] = {"files": [], "names": [], "input": [], "truth": [], "lq": []}
    left_out = {}
    for file, place in found.items():
        paths = {"input": file} | {name: folder / place for name, folder in folders.items() if folder}
        try:
            pixels = {name: decode_image(path) for name, path in paths.items()}
        except BrokenImage as error:
            left_out[printable(place)] = f"cannot be read ({error})"
            continue
        for name, value in {"files": file, "names": place, **pixels}.items():
            read[name].append(value)
    return ImagesToScore(
        read["files"], read["names"], read["input"], read["truth"] if truth else None, read["lq"] if lq else None
    ), left_out


def metric_columns(to_score: ImagesToScore, names: Sequence[str], weights_dir: str | None) -> Columns:
    """Scores by metric: niqe, ranker, stripes, psnr_y, ssim_y or a no-reference metric of pyiqa.

    Raises:
        ValueError: for an unknown metric, or if a truth is missing or has another size.
    """
    for file, image, truth in zip(to_score.files, to_score.images, to_score.truths or to_score.images, strict=True):
        if image.shape != truth.shape:
            raise ValueError(f"{file.name} is {image.shape[:2]}, its truth {truth.shape[:2]} px; they must agree")
    return {
        name: np.asarray(_scorer(name, weights_dir, to_score.truths)(to_score.images), dtype=np.float64)
        for name in names
    }


def _scorer(name: str, weights_dir: str | None, truths: list[np.ndarray] | None) -> Callable:
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
    return stripe_share if name == "stripes" else PyiqaMetrics([name], weights_dir)


def reward_columns(
    to_score: ImagesToScore, terms: Mapping[str, RewardTerm], manifest: str | None
) -> tuple[Columns, dict[str, str]]:
    """Scores by reward term with their weighted `total`, and what each term that is left out would need.

    The model's texts are read from the files that `realsr-hpc restore` wrote beside the images, captions and tags from
    the manifest.
    """
    traces = [_read_trace(file) for file in to_score.files]
    scenes = _read_scenes(to_score.names, manifest)
    lacking = _lacking(terms, traces, scenes, to_score)
    nothing = [None] * len(to_score.files)
    candidates = [
        Candidate(key=name, lq=small, gt=truth, scene=scene, trace=trace or NO_TRACE, image=image)
        for name, trace, image, small, truth, scene in zip(
            to_score.names,
            traces,
            to_score.images,
            to_score.lqs or to_score.images,
            to_score.truths or nothing,
            scenes,
            strict=True,
        )
    ]
    scored = {name: term for name, term in terms.items() if name not in lacking}
    columns = {name: build_reward(name, term).score(candidates) for name, term in scored.items()}
    if columns:
        columns["total"] = np.sum([weight_at(scored[name], 1) * column for name, column in columns.items()], axis=0)
    return columns, lacking


def _lacking(
    terms: Mapping[str, RewardTerm],
    traces: Sequence[ParsedTrace | None],
    scenes: Sequence[SceneText | None],
    to_score: ImagesToScore,
) -> dict[str, str]:
    lacking = {}
    for name, term in terms.items():
        reference = term.options.get("reference", "lq")
        if term.kind in ("format", "degradation", "understanding") and not all(traces):
            lacking[name] = "NAME.json of realsr-hpc restore beside each image"
        elif term.kind == "degradation" or term.options.get("degradation") == "known":
            lacking[name] = "the degradation that was applied, which only training knows"
        elif term.kind == "understanding" and not all(scenes):
            lacking[name] = "manifest=FILE with captions under each image's name"
        elif term.kind == "fidelity" and (to_score.lqs if reference == "lq" else to_score.truths) is None:
            lacking[name] = f"{'lq' if reference == 'lq' else 'truth'}=DIR"
    return lacking


def _read_trace(file: Path) -> ParsedTrace | None:
    """The trace of the first tile as `realsr-hpc restore` wrote it; None if there is no such file."""
    try:
        tile = restoration.read(file).tiles[0]
    except Damaged:
        return None
    grid = np.zeros((1, 1), np.int64) if tile.well_formed else None
    rough, middle, final = (*tile.texts, None, None, None)[:3]
    return ParsedTrace(tile.degradation, (rough, middle, final), (grid, grid, grid), tile.faults)


def _read_scenes(names: Sequence[str], manifest: str | None) -> list[SceneText | None]:
    """Captions and tags of each image, whose key in the manifest is its name without ending; None if unknown."""
    scenes = {} if manifest is None else {entry.key: entry.scene for entry in read_manifest(manifest).entries}
    return [scenes.get(PurePosixPath(name).with_suffix("").as_posix()) for name in names]
