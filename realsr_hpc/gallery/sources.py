"""What training, evaluating and restoring left on disk, as entries of one kind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realsr_hpc.data.naming import files_below
from realsr_hpc.files import printable

log = logging.getLogger(__name__)
_DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""What reading a file of another content than we wrote raises."""
STAGES = ("rough", "middle", "final")


@dataclass(frozen=True)
class Result:
    """One rollout of a group, one method of an evaluation, or the restored image."""

    name: str
    images: Mapping[str, Path]
    """By stage: rough, middle, final; `steps` is a picture of all of them."""
    degradation: str | None = None
    texts: tuple[str | None, ...] = ()
    faults: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    total: float | None = None
    """Reward, where there is one."""
    advantage: float | None = None


@dataclass(frozen=True)
class Entry:
    """One input with everything made of it."""

    source: str
    """The run, evaluation or folder it is of."""
    kind: str
    """rollouts, held-out, evaluation or restored."""
    step: int
    key: str
    images: Mapping[str, Path]
    """`input`, and `truth` where it is known."""
    results: tuple[Result, ...]
    degradation: str | None = None
    """The true phrase."""
    captions: tuple[str, ...] = ()


def read_run(run_dir: Path) -> list[Entry]:
    """Groups that training kept (tracking.rollouts_every_steps), and the run's evaluations.

    ValueError when there are neither.
    """
    kept = sorted(run_dir.glob("rollouts/*/rollouts.json"))
    entries = [entry for path in kept for entry in _whole(_rollouts, path)]
    for path in sorted(run_dir.glob("evaluation/**/images.json")):
        entries += read_evaluation(path.parent, f"{run_dir.name} {path.parent.relative_to(run_dir / 'evaluation')}")
    if not entries:
        raise ValueError(
            f"run={run_dir}: neither rollouts/ nor evaluation/ there; train with tracking.rollouts_every_steps "
            "above 0, or run tools/evaluate.py"
        )
    return entries


def read_evaluation(folder: Path, name: str = "") -> list[Entry]:
    """Images of a report that tools/evaluate.py wrote. ValueError when it is none."""
    path = folder / "images.json"
    if not path.is_file():
        raise ValueError(f"evaluation={folder} has no images.json; name a folder that tools/evaluate.py wrote")
    step = folder.name.rpartition("-")[2]

    def read(path: Path) -> list[Entry]:
        number = int(step) if step.isdecimal() else 0
        return [_evaluated(folder, name or folder.name, number, item) for item in _read(path)]

    return _whole(read, path)


def read_restored(folder: Path) -> list[Entry]:
    """Images of a folder that tools/restore.py wrote. ValueError when it is none."""
    if not (folder / "restore.json").is_file():
        raise ValueError(f"restored={folder} has no restore.json; name a folder that tools/restore.py wrote")
    files, _ = files_below(folder)
    found = [path for path in files if path.suffix == ".json" and path != folder / "restore.json"]
    entries = [_restored(folder, path) for path in found if path.with_suffix(".png").is_file()]
    return [entry for entry in entries if entry is not None]


def _rollouts(path: Path) -> list[Entry]:
    content = _read(path)
    kind = "held-out" if content["kind"] == "heldout" else "rollouts"
    return [
        Entry(
            content["run"],
            kind,
            content["step"],
            group["key"],
            _paths(path.parent, group["files"]),
            tuple(_rollout(path.parent, number, item) for number, item in enumerate(group["rollouts"], 1)),
            group["degradation"],
            tuple(group["captions"] or ()),
        )
        for group in content["groups"]
    ]


def _rollout(folder: Path, number: int, item: dict[str, Any]) -> Result:
    return Result(
        f"rollout {number}",
        _paths(folder, item["files"]),
        item["degradation"],
        tuple(item["texts"]),
        tuple(item["faults"]),
        item["rewards"],
        item["reward"],
        item["advantage"],
    )


def _evaluated(folder: Path, name: str, step: int, item: dict[str, Any]) -> Entry:
    results = []
    for method, made in item["methods"].items():
        numbers = {key: value for key, value in made["metrics"].items() if value is not None and key != "restored"}
        said = (made.get("degradation"), tuple(made.get("texts", ())), tuple(made.get("faults", ())))
        # As training weighs them; of a malformed trace it counts other values than those measured here.
        terms = {f"reward_{term}": weight for term, weight in item.get("weights", {}).items()}
        known = bool(terms) and said[1] and not said[2] and terms.keys() <= numbers.keys()
        total = sum(weight * numbers[key] for key, weight in terms.items()) if known else None
        results.append(Result(method, _paths(folder, made["files"]), *said, numbers, total))
    images, captions = _paths(folder, item["files"]), tuple(item["captions"] or ())
    return Entry(name, "evaluation", step, item["key"], images, tuple(results), item["degradation"], captions)


def _restored(folder: Path, path: Path) -> Entry | None:
    """None for a file that is none of tools/restore.py's, or damaged, which is told."""
    try:
        content = _read(path)
        if not isinstance(content, dict) or "tiles" not in content:
            return None
        tile = content["tiles"][0]
        said = (tile["degradation"], tuple(tile["texts"]), tuple(tile["faults"]))
        # Beside the result where it is relative; whoever asks may be in another folder.
        source = path.parent / content.get("input", "")
        inputs = {"input": source} if source.is_file() else {}
    except _DAMAGED as error:
        _tell(path, error)
        return None
    steps, count = path.with_suffix(".steps.jpg"), len(content["tiles"])
    images = {"final": path.with_suffix(".png")} | ({"steps": steps} if steps.is_file() else {})
    name = "restored" if count == 1 else f"restored in {count} tiles (words of the first)"
    return Entry(folder.name, "restored", 0, printable(path.stem), inputs, (Result(name, images, *said),))


def _whole(read: Callable[[Path], list[Entry]], path: Path) -> list[Entry]:
    """What a file tells; nothing where it is damaged, which is told."""
    try:
        return read(path)
    except _DAMAGED as error:
        _tell(path, error)
        return []


def _tell(path: Path, error: Exception) -> None:
    log.warning("%s is damaged and left out (%s: %s)", printable(path), type(error).__name__, error)


def _paths(folder: Path, files: Mapping[str, str]) -> dict[str, Path]:
    return {name: folder / file for name, file in files.items() if (folder / file).is_file()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
