"""Restores and scores a set with every method, distributed over the ranks; rank 0 writes the report.

Each image is written to `images/METHOD/KEY.png` as soon as it is restored, so that a large set needs little memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from realsr_hpc.artifacts import evaluation
from realsr_hpc.artifacts.evaluation import FINAL, INPUT, TRUTH, EvaluatedImage, Evaluation, MethodResult
from realsr_hpc.evaluate.draws import redrawn
from realsr_hpc.evaluate.methods import BICUBIC, DETERMINISTIC, NO_TRACE, FinishedImages, Method
from realsr_hpc.evaluate.metrics import FID, Metrics
from realsr_hpc.evaluate.report import EvaluationReport
from realsr_hpc.evaluate.sets import FolderSet
from realsr_hpc.locks import sole_writer
from realsr_hpc.records import Case, RestoredImage
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

T = TypeVar("T")


class Gather(Protocol):
    """Collective: returns on every rank the objects that the ranks pass, in rank order."""

    def __call__(self, value: T) -> list[T]:
        """value: this rank's."""
        ...


def _alone(value: T) -> list[T]:
    return [value]


@dataclass(frozen=True)
class World:
    """The ranks that share an evaluation."""

    rank: int = 0
    size: int = 1
    gather: Gather = _alone


ALONE = World()


def evaluate(
    methods: Mapping[str, Method],
    cases: Sequence[Case],
    folder: Path,
    *,
    metrics: Metrics,
    set_name: str = "heldout",
    remarks: Sequence[str] = (),
    world: World = ALONE,
    batch_size: int = 32,
    draws: int = 1,
) -> EvaluationReport | None:
    """Evaluate `methods` on `cases` and write the report to `folder`. Returns it on rank 0, None on the others.

    A case that cannot be read is left out and reported.

    Args:
        methods: by name; `bicubic` must be among them.
        remarks: sentences for the report.
        world: the ranks; each restores every `world.size`-th batch.
        batch_size: cases per call of a method, fewer if there are not enough for all ranks.
        draws: how often methods that sample restore each case; images and texts are kept of the first draw.

    Raises:
        ValueError: if bicubic is missing, a method returns another number of images than it was given, an image does
            not have its truth's size, no case can be used, or another process writes to `folder`.
    """
    if BICUBIC not in methods:
        raise ValueError(
            f"methods {', '.join(methods)}: {BICUBIC} is missing; it is always evaluated beside the others; add it"
        )
    for method in methods.values():
        if isinstance(method, FinishedImages):
            method.expect(cases.keys() if isinstance(cases, FolderSet) else [case.key for case in cases])
    with sole_writer(folder) if world.rank == 0 else nullcontext():
        return _over_ranks(methods, cases, folder, metrics, set_name, remarks, world, batch_size, draws)


def _over_ranks(
    methods: Mapping[str, Method],
    cases: Sequence[Case],
    folder: Path,
    metrics: Metrics,
    set_name: str,
    remarks: Sequence[str],
    world: World,
    batch_size: int,
    draws: int,
) -> EvaluationReport | None:
    if world.rank == 0 and (folder / evaluation.FILE).exists():
        shutil.rmtree(folder / "images", ignore_errors=True)  # of an earlier evaluation; FID reads whole folders
    world.gather(None)  # a barrier: no rank writes before they are removed
    batch_size = min(batch_size, -(-len(cases) // world.size))  # so that a small set leaves no rank idle
    images: list[EvaluatedImage] = []
    skipped: dict[str, str] = {}
    for start in range(world.rank * batch_size, len(cases), world.size * batch_size):
        part = _read(cases, range(start, min(start + batch_size, len(cases))), skipped)
        if part:
            images += _judge(methods, part, folder, metrics, draws)
    gathered = world.gather((images, skipped))
    if world.rank:
        return None
    images = sorted((item for part, _ in gathered for item in part), key=lambda item: item.index)
    skipped = {key: reason for _, part in gathered for key, reason in part.items()}
    if isinstance(cases, FolderSet):
        skipped |= cases.unread
    if not images:
        raise ValueError(
            f"set={set_name}: none of its {len(cases)} images can be used: {dict(list(skipped.items())[:3])}"
        )
    absent = _absent(methods, images)
    evaluation.write(folder, Evaluation(set_name, tuple(images)))
    of_set = _set_scores(methods, folder, metrics)
    report = EvaluationReport(
        folder, set_name, tuple(methods), images, metrics, tuple(remarks), skipped, absent, of_set
    )
    report.write()
    return report


def _absent(methods: Mapping[str, Method], images: Sequence[EvaluatedImage]) -> dict[str, list[str]]:
    """Cases by method of finished images that lacks them. ValueError: it has none that can be read."""
    found: dict[str, list[str]] = {}
    for name, method in methods.items():
        if isinstance(method, FinishedImages):
            keys = [image.key for image in images if FINAL not in image.methods[name].files]
            if len(keys) == len(images):
                raise ValueError(f"{method.folder}: none of its images can be read; give them again, or leave it out")
            found |= {name: keys} if keys else {}
    return found


def _read(cases: Sequence[Case], places: range, skipped: dict[str, str]) -> list[Case]:
    part = []
    for place in places:
        try:
            part.append(cases[place])
        except ValueError as error:
            key = cases.keys()[place] if isinstance(cases, FolderSet) else str(place)
            skipped[key] = str(error)
    return part


def _judge(
    methods: Mapping[str, Method], part: list[Case], folder: Path, metrics: Metrics, draws: int
) -> list[EvaluatedImage]:
    """Restore and score one batch of cases with every method."""
    made: list[dict[str, MethodResult]] = [{} for _ in part]
    for name, method in methods.items():
        images = _restored(name, method, part)
        others = range(1, 1 if isinstance(method, DETERMINISTIC) else draws)
        further = [metrics.score(part, _restored(name, method, redrawn(part, draw))) for draw in others]
        rows = zip(metrics.score(part, images), *further, strict=True)
        for results, case, item, (row, *more) in zip(made, part, images, rows, strict=True):
            files = _save(item, name, case.key, folder)
            drawn = tuple(other.values for other in more)
            result = MethodResult(row.values, files, not_computed=row.not_computed, further_draws=drawn)
            if (said := item.trace) is not NO_TRACE:
                result = replace(result, degradation=said.degradation, texts=said.texts, faults=said.faults)
            results[name] = result
    weights = metrics.rewards.weights if metrics.rewards else {}
    return [_evaluated(case, folder, results, weights) for case, results in zip(part, made, strict=True)]


def _restored(name: str, method: Method, part: list[Case]) -> list[RestoredImage]:
    images = method(part)
    if len(images) != len(part):
        raise ValueError(f"method {name!r} returned {len(images)} images for {len(part)}; it must return one each")
    return images


def _evaluated(
    case: Case, folder: Path, methods: dict[str, MethodResult], weights: Mapping[str, float]
) -> EvaluatedImage:
    files = {INPUT: save_png(case.lq, folder, INPUT, case.key)}
    if case.gt is not None:
        files[TRUTH] = save_png(case.gt, folder, TRUTH, case.key)
    return EvaluatedImage(
        key=case.key,
        files=files,
        methods=methods,
        degradation=None if case.label is None else case.label.phrase,
        captions=None if case.scene is None else case.scene.captions,
        word=None if case.scene is None or not case.scene.word else case.scene.word,
        weights=dict(weights),
        index=case.index,
    )


def _save(item: RestoredImage, method: str, key: str, folder: Path) -> dict[str, str]:
    files = {}
    if item.image is not None:
        files[FINAL] = save_png(item.image, folder, method, key)
    for name, image in zip(IMAGE_NAMES[:-1], item.images, strict=False):
        if image is not None and item.trace is not NO_TRACE:
            files[name] = save_png(image, folder, f"{method}-{name}", key)
    return files


def save_png(pixels: np.ndarray, folder: Path, method: str, key: str) -> str:
    """Write `images/METHOD/KEY.png`; returns its path relative to the folder."""
    path = folder / "images" / method / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.relative_to(folder).as_posix()


def _set_scores(methods: Mapping[str, Method], folder: Path, metrics: Metrics) -> dict[str, dict[str, float]]:
    """By metric and method: FID of each method's images against the truths, if it can be computed."""
    truths = folder / "images" / TRUTH
    if FID not in metrics.pyiqa or not truths.is_dir():
        return {}
    score = metrics.pyiqa[FID]
    return {FID: {name: score.of_folders(folder / "images" / name, truths) for name in methods}}
