"""Verifies checkpoint folders by the sizes and hashes of their files. Imports neither torch nor Megatron.

A checkpoint `step-000010` is written as `.tmp-step-000010` and renamed once its manifest, the last file written, is on
disk. A folder without a manifest, or that does not match it, is not a checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from realsr_hpc.files import flush, parse_json, publish, replace_link, sha256_of
from realsr_hpc.runfolder import BEST, STEP, is_step, step_name, step_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_ASIDE = ".tmp-"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept: the newest `last`, and the `best` ones by the metric in their manifests."""

    last: int
    best: int = 0
    highest: bool = True
    """Whether a higher metric is better."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file in a manifest."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What a manifest says of its checkpoint as a whole."""

    step: int
    layout: dict[str, int] = field(default_factory=dict[str, int])
    """The sizes that determine which rank holds what."""
    metric: float | None = None
    """What the best checkpoints are chosen by; None: not measured."""
    base: str | None = None
    """The weights that the adapters in it were trained on; None: it holds no adapters."""


@dataclass(frozen=True)
class Manifest(Facts):
    """The content of a manifest."""

    files: dict[str, FileFacts] = field(default_factory=dict[str, FileFacts])
    """Every other file of the folder, by name."""


def folder_of(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return root / step_name(step)


def aside_of(root: Path, step: int) -> Path:
    """Temporary folder in which the checkpoint of a step is written first."""
    return root / f"{_ASIDE}{step_name(step)}"


def content(folder: Path) -> list[Path]:
    """The files that a manifest lists, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def describe(folder: Path, files: Iterable[Path]) -> dict[str, FileFacts]:
    """Size and SHA-256, by name, of these files of a folder, after flushing them to disk."""
    described: dict[str, FileFacts] = {}
    for path in files:
        flush(path)
        described[path.relative_to(folder).as_posix()] = FileFacts(path.stat().st_size, sha256_of(path))
    return described


def complete(aside: Path, final: Path, files: dict[str, FileFacts], facts: Facts) -> None:
    """Write the manifest and rename the folder, which completes the checkpoint; replaces one of the same step."""
    manifest = Manifest(**asdict(facts), files=files)
    (aside / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    publish(aside, final)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. ValueError if it is missing or damaged, or lists no files."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"checkpoint {folder} has no {MANIFEST}: it was never completed; name another one")
    try:
        manifest = parse_json(path.read_bytes(), Manifest)
        if not manifest.files:
            raise ValueError("it lists no files")
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder}: its {MANIFEST} is damaged ({error}); name another one") from None
    return manifest


def fault(folder: Path) -> str | None:
    """The first fault of a checkpoint, whose bytes are all read; None if it is complete and undamaged."""
    return next(faults_of_share(folder, 0, 1), None)


def faults_of_share(folder: Path, number: int, num_shares: int) -> Iterator[str]:
    """Faults of share `number` of a checkpoint's files, which are split into about equal shares; reads every byte."""
    try:
        listed = read(folder).files
    except ValueError as error:
        yield str(error)
        return
    largest_first = sorted(listed, key=lambda name: (-listed[name].size, name))
    for name in largest_first[number::num_shares]:
        if wrong := _file_fault(folder / name, name, listed[name]):
            yield wrong


def _file_fault(path: Path, name: str, facts: FileFacts) -> str:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts.size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {facts.size}"
        return "" if sha256_of(path) == facts.sha256 else f"{name} differs from the manifest's sha256"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def completed(root: Path) -> list[Path]:
    """Checkpoint folders with a manifest, oldest step first; their files are not read."""
    folders = (path for path in root.glob(f"{STEP}*") if is_step(path))
    return sorted((path for path in folders if (path / MANIFEST).is_file()), key=step_of)


def candidates(root: Path) -> list[Path]:
    """All checkpoint folders, newest step first, including those without a manifest."""
    folders = (path for path in root.glob(f"{STEP}*") if is_step(path))
    return sorted((path for path in folders if path.is_dir() and any(path.iterdir())), key=step_of, reverse=True)


def refuse_damaged(folder: Path) -> None:
    """ValueError unless a checkpoint is undamaged; reads every byte."""
    if wrong := fault(folder):
        raise ValueError(damaged(folder, wrong))


def damaged(folder: Path, wrong: str) -> str:
    """The error message for a damaged checkpoint that the user named."""
    return wrong if str(folder) in wrong else f"checkpoint {folder}: {wrong}; name another one, or copy it again"


def reject(folder: Path, wrong: str) -> None:
    """Log as an error that a checkpoint is skipped."""
    logger.error("checkpoint %s rejected: %s; trying the previous one", folder, wrong)


def latest(root: Path) -> Path | None:
    """The newest undamaged checkpoint; each newer one that is skipped is logged as an error.

    ValueError if there are checkpoints but all are damaged: starting over would lose the run.
    """
    found = candidates(root)
    for folder in found:
        wrong = fault(folder)
        if wrong is None:
            return folder
        reject(folder, wrong)
    if found:
        raise ValueError(all_damaged(root, found))
    return None


def all_damaged(root: Path, found: list[Path]) -> str:
    """The error message, with remedy, if all checkpoints are damaged."""
    return (
        f"{root}: all {len(found)} checkpoints are damaged (the log says how), the newest is {found[0].name}; bring "
        "one back from a copy, or move the folder away to start again from step 0"
    )


def best(root: Path, count: int, *, highest: bool) -> list[tuple[Path, float]]:
    """The `count` checkpoints with the best metric and its value, best first; of equal ones the newer comes first."""
    rated = [(folder, _metric(folder)) for folder in reversed(completed(root))] if count else []
    finite = [(folder, value) for folder, value in rated if value is not None and math.isfinite(value)]
    return sorted(finite, key=lambda item: item[1], reverse=highest)[:count]


def _metric(folder: Path) -> float | None:
    """A checkpoint's metric, or None. A damaged old manifest must not prevent saving a new checkpoint."""
    try:
        return read(folder).metric
    except ValueError as error:
        logger.warning("%s", error)
        return None


def prune(root: Path, keep: Keep) -> None:
    """Remove incomplete folders and every checkpoint that `keep` does not keep; link the best one."""
    ranked = [folder for folder, _ in best(root, keep.best, highest=keep.highest)]
    stay = {*completed(root)[-keep.last :], *ranked}
    for folder in [*(set(completed(root)) - stay), *root.glob(f"{_ASIDE}{STEP}*")]:
        shutil.rmtree(folder)
    if ranked:
        replace_link(root / BEST, ranked[0].name)
