"""Reads the outputs of training, evaluation and restoring from disk as entries of one type."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.artifacts import evaluation, restoration, rollouts
from realsr_hpc.data.naming import files_below
from realsr_hpc.files import printable, sha256_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One rollout of a group, one method of an evaluation, or the restored image."""

    name: str
    images: Mapping[str, Path]
    """By name: rough, middle, final, and `steps`, an image of all three."""
    degradation: str | None = None
    texts: tuple[str | None, ...] = ()
    faults: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    total: float | None = None
    """The weighted reward, if there is one."""
    advantage: float | None = None


@dataclass(frozen=True)
class Entry:
    """One input with all its results."""

    source: str
    """Name of the run, evaluation or folder that it comes from."""
    kind: str
    """rollouts, held-out, evaluation or restored."""
    step: int
    key: str
    images: Mapping[str, Path]
    """`input`, and `truth` if known."""
    results: tuple[Result, ...]
    degradation: str | None = None
    """The true degradation phrase."""
    captions: tuple[str, ...] = ()


def read_run(run_dir: Path) -> list[Entry]:
    """Groups that training stored (tracking.rollouts_every_steps), and the run's evaluations.

    ValueError if there are neither.
    """
    entries = [entry for folder in runfolder.all_rollouts(run_dir) for entry in _told(_rollouts, folder)]
    evaluations = runfolder.evaluations(run_dir)
    for path in sorted(evaluations.glob(f"**/{evaluation.FILE}")):
        name = f"{run_dir.name} {path.parent.relative_to(evaluations)}"
        entries += _told(partial(read_evaluation, name=name), path.parent)
    if not entries:
        raise ValueError(
            f"run={run_dir}: neither rollouts/ nor evaluation/ there; train with tracking.rollouts_every_steps "
            "above 0, or run realsr-hpc evaluate"
        )
    return entries


def read_evaluation(folder: Path, name: str = "") -> list[Entry]:
    """Images of a folder that `realsr-hpc evaluate` wrote. ValueError if it is another folder."""
    if not (folder / evaluation.FILE).is_file():
        raise ValueError(f"evaluation={folder} has no {evaluation.FILE}; name a folder that realsr-hpc evaluate wrote")
    step = runfolder.step_of(folder) if runfolder.is_step(folder) else 0

    def read(folder: Path) -> list[Entry]:
        return [_evaluated(folder, name or folder.name, step, item) for item in evaluation.read(folder).images]

    return _told(read, folder)


def read_restored(folder: Path) -> list[Entry]:
    """Images of a folder that `realsr-hpc restore` wrote. ValueError if it is another folder."""
    settings = folder / restoration.SETTINGS_FILE
    if not settings.is_file():
        raise ValueError(f"restored={folder} has no {settings.name}; name a folder that realsr-hpc restore wrote")
    files, _ = files_below(folder)
    found = [path.with_suffix(".png") for path in files if path.suffix == ".json" and path != settings]
    return [entry for path in found if path.is_file() for entry in _told(partial(_restored, folder), path)]


def _rollouts(folder: Path) -> list[Entry]:
    kept = rollouts.read(folder)
    kind = "held-out" if kept.kind == "heldout" else "rollouts"
    return [
        Entry(
            kept.run,
            kind,
            kept.step,
            group.key,
            _paths(folder, group.files),
            tuple(_rollout(folder, number, item) for number, item in enumerate(group.rollouts, 1)),
            group.degradation,
            group.captions or (),
        )
        for group in kept.groups
    ]


def _rollout(folder: Path, number: int, item: rollouts.KeptRollout) -> Result:
    return Result(
        f"rollout {number}",
        _paths(folder, item.files),
        item.degradation,
        item.texts,
        item.faults,
        _numbers(item.rewards),
        _finite(item.reward),
        _finite(item.advantage),
    )


def _evaluated(folder: Path, name: str, step: int, item: evaluation.EvaluatedImage) -> Entry:
    results: list[Result] = []
    for method, made in item.methods.items():
        numbers = {key: value for key, value in _numbers(made.metrics).items() if key != "restored"}
        said = (made.degradation, made.texts, made.faults)
        results.append(Result(method, _paths(folder, made.files), *said, numbers, _finite(item.total(made))))
    images, captions = _paths(folder, item.files), item.captions or ()
    return Entry(name, "evaluation", step, item.key, images, tuple(results), item.degradation, captions)


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isfinite(value)}


def _finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: NaN would disturb the search for the best."""
    return value if value is not None and isfinite(value) else None


def _restored(folder: Path, image: Path) -> list[Entry]:
    found = restoration.read(image)
    tile, count = found.tiles[0], len(found.tiles)
    # A relative path starts from the result's folder, not from the current one.
    source, steps = image.parent / found.input, restoration.steps_file(image)
    images = _paths(
        folder, {name: str(path.relative_to(folder)) for name, path in (("final", image), ("steps", steps))}
    )
    if "final" not in images:
        raise ValueError(f"{image}: a link out of its folder")
    name = "restored" if count == 1 else f"restored in {count} tiles (words of the first)"
    inputs = {"input": source} if _is_the_input(source, found.input_sha256, folder) else {}
    result = Result(name, images, tile.degradation, tile.texts, tile.faults)
    return [Entry(folder.name, "restored", 0, printable(image.stem), inputs, (result,))]


def _is_the_input(source: Path, sha256: str, folder: Path) -> bool:
    """Whether the input is readable and is the file that was restored, not a later file of the same name.

    A record without a digest may only name files in its own folder: it may come from a stranger.
    """
    try:
        known = sha256 == sha256_of(source) if sha256 else source.resolve().is_relative_to(folder.resolve())
        return source.is_file() and known
    except OSError:  # missing, or in a folder without read permission
        return False


def _told(read: Callable[[Path], list[Entry]], path: Path) -> list[Entry]:
    """The entries of a folder or file; none if it is damaged, which is logged."""
    try:
        return read(path)
    except (OSError, ValueError) as error:  # Damaged, or a path in it that no file system takes
        log.warning("left out: %s", error)
        return []


def _paths(folder: Path, files: Mapping[str, str]) -> dict[str, Path]:
    """Paths of existing files inside the folder; links that point outside are left out."""
    inside = folder.resolve()
    found = {name: folder / file for name, file in files.items()}
    return {name: path for name, path in found.items() if path.is_file() and path.resolve().is_relative_to(inside)}
