"""Restore and score a set with every method, spread over the ranks; rank 0 writes the report.

Images go to the folder as they are made, so nothing of a large set is held: `images/METHOD/KEY.png`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realsr_hpc.evaluate.cases import Case
from realsr_hpc.evaluate.methods import BICUBIC, NO_TRACE, FinishedImages, Method
from realsr_hpc.evaluate.metrics import FID, Metrics
from realsr_hpc.evaluate.report import EvaluationReport
from realsr_hpc.evaluate.sets import FolderSet
from realsr_hpc.files import write_atomically
from realsr_hpc.locks import sole_writer
from realsr_hpc.records import RestoredImage

INPUT, TRUTH = "input", "truth"
STAGES = ("rough", "middle")
RECORDS_FILE = "images.json"


@dataclass(frozen=True)
class World:
    """This rank's place, and how objects of all ranks come together (on every rank, in rank order)."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


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
) -> EvaluationReport | None:
    """Score `methods` on `cases` and write `folder`; the report on rank 0, None on the others.

    Bicubic has to be among the methods. A case that cannot be read is left out and named. Raises ValueError when a
    method returns another number of images than it was given, an image has not its truth's size, or another process
    writes there.
    """
    if BICUBIC not in methods:
        raise ValueError(f"methods {', '.join(methods)}: {BICUBIC} is missing; it always stands beside the others")
    for method in methods.values():
        if isinstance(method, FinishedImages):
            method.expect(cases.keys() if isinstance(cases, FolderSet) else [case.key for case in cases])
    with sole_writer(folder) if world.rank == 0 else nullcontext():
        return _evaluated(methods, cases, folder, metrics, set_name, remarks, world, batch_size)


def _evaluated(
    methods: Mapping[str, Method],
    cases: Sequence[Case],
    folder: Path,
    metrics: Metrics,
    set_name: str,
    remarks: Sequence[str],
    world: World,
    batch_size: int,
) -> EvaluationReport | None:
    if world.rank == 0 and (folder / RECORDS_FILE).exists():
        shutil.rmtree(folder / "images", ignore_errors=True)  # an earlier evaluation's: FID reads whole folders
    world.gather(None)
    batch_size = min(batch_size, -(-len(cases) // world.size))  # no rank idle for a small set
    records: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for start in range(world.rank * batch_size, len(cases), world.size * batch_size):
        part = _read(cases, range(start, min(start + batch_size, len(cases))), skipped)
        if part:
            records += _judge(methods, part, folder, metrics)
    gathered = world.gather((records, skipped))
    if world.rank:
        return None
    records = sorted((item for part, _ in gathered for item in part), key=lambda item: item["index"])
    skipped = {key: reason for _, part in gathered for key, reason in part.items()}
    if not records:
        raise ValueError(
            f"set={set_name}: none of its {len(cases)} images can be used: {dict(list(skipped.items())[:3])}"
        )
    write_atomically(folder / RECORDS_FILE, json.dumps(_without_nan(records), indent=1))
    report = EvaluationReport(folder, set_name, tuple(methods), records, metrics, tuple(remarks), skipped)
    report.add_set_scores(_set_scores(methods, folder, metrics))
    report.write()
    return report


def _read(cases: Sequence[Case], places: range, skipped: dict[str, str]) -> list[Case]:
    part = []
    for place in places:
        try:
            part.append(cases[place])
        except ValueError as error:
            key = cases.keys()[place] if isinstance(cases, FolderSet) else str(place)
            skipped[key] = str(error)
    return part


def _judge(methods: Mapping[str, Method], part: list[Case], folder: Path, metrics: Metrics) -> list[dict[str, Any]]:
    """Records of a few cases: what is known of each, and what every method made of it."""
    weights = metrics.rewards.weights if metrics.rewards else {}
    records = [{**_record(case, folder), "weights": weights} for case in part]
    for name, method in methods.items():
        images = method(part)
        if len(images) != len(part):
            raise ValueError(f"method {name!r} returned {len(images)} images for {len(part)}; it must return one each")
        for record, case, item, row in zip(records, part, images, metrics.score(part, images), strict=True):
            files = _save(item, name, case.key, folder)
            record["methods"][name] = {"metrics": row.values, **_said(item), "files": files}
            if row.not_computed:
                record["methods"][name]["not_computed"] = row.not_computed
    return records


def _record(case: Case, folder: Path) -> dict[str, Any]:
    files = {INPUT: save_png(case.lq, folder, INPUT, case.key)}
    if case.gt is not None:
        files[TRUTH] = save_png(case.gt, folder, TRUTH, case.key)
    return {
        "key": case.key,
        "index": case.index,
        "degradation": None if case.label is None else case.label.phrase,
        "captions": None if case.scene is None else list(case.scene.captions),
        "word": None if case.scene is None or not case.scene.word else case.scene.word,
        "files": files,
        "methods": {},
    }


def _said(item: RestoredImage) -> dict[str, Any]:
    if item.trace is NO_TRACE:
        return {}
    trace = item.trace
    return {"degradation": trace.degradation, "texts": list(trace.texts), "faults": list(trace.faults)}


def _save(item: RestoredImage, method: str, key: str, folder: Path) -> dict[str, str]:
    files = {}
    if item.image is not None:
        files["final"] = save_png(item.image, folder, method, key)
    for name, stage in zip(STAGES, item.stages, strict=False):
        if stage is not None and item.trace is not NO_TRACE:
            files[name] = save_png(stage, folder, f"{method}-{name}", key)
    return files


def save_png(pixels: np.ndarray, folder: Path, method: str, key: str) -> str:
    """Write `images/METHOD/KEY.png`; its path from the folder."""
    path = folder / "images" / method / f"{key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.relative_to(folder).as_posix()


def _without_nan(value: Any) -> Any:
    """NaN as None: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _set_scores(methods: Mapping[str, Method], folder: Path, metrics: Metrics) -> dict[str, dict[str, float]]:
    """FID of each method's images against the truths, where it can be computed."""
    truths = folder / "images" / TRUTH
    if FID not in metrics.pyiqa or not truths.is_dir():
        return {}
    score = metrics.pyiqa[FID]
    return {FID: {name: score.of_folders(folder / "images" / name, truths) for name in methods}}
