"""A few groups of rollouts as people look at them: images, words and rewards, `RUN_DIR/rollouts/step-N-KIND/`.

`rollouts.json` names the images beside it; a step done again after a resume replaces its folder's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realsr_hpc.files import write_atomically
from realsr_hpc.records import LQBatch, ScoredGroup

ROLLOUTS_FOLDER = "rollouts"
RECORD_NAME = "rollouts.json"
STAGE_NAMES = ("rough", "middle", "final")
Stages = Sequence[Sequence[np.ndarray | None]]


def write_rollouts(
    run_dir: Path,
    step: int,
    kind: str,
    batch: LQBatch,
    groups: Sequence[ScoredGroup],
    advantages: Sequence[Sequence[float]],
    stages: Stages,
) -> Path:
    """Save `groups`, those of the first images of `batch`; returns the folder.

    advantages: [groups, G]. stages: rough, middle and final images, each [groups * G] in order.
    """
    folder = run_dir / ROLLOUTS_FOLDER / f"step-{step:06d}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    records, first = [], 0
    for number, (group, gains) in enumerate(zip(groups, advantages, strict=True)):
        members = range(first, first + len(group.traces))
        images = [[row[member] for row in stages] for member in members]
        records.append(_group(folder, number, batch, group, gains, images))
        first += len(group.traces)
    content = {"run": run_dir.name, "step": step, "kind": kind, "groups": records}
    write_atomically(folder / RECORD_NAME, json.dumps(content, indent=1, ensure_ascii=False))
    return folder


def _group(
    folder: Path,
    number: int,
    batch: LQBatch,
    group: ScoredGroup,
    advantages: Sequence[float],
    images: Sequence[Sequence[np.ndarray | None]],
) -> dict[str, Any]:
    label, scene = batch.labels[number], batch.scenes[number]
    truth = {} if batch.gt is None else {"truth": _save(batch.gt[number], folder, f"{number}-truth")}
    return {
        "key": batch.keys[number],
        "degradation": None if label is None else label.phrase,
        "captions": None if scene is None else list(scene.captions),
        "weights": group.weights,
        "files": {"input": _save(batch.lq[number], folder, f"{number}-input"), **truth},
        "rollouts": [
            {
                "degradation": trace.degradation,
                "texts": list(trace.texts),
                "faults": list(trace.faults),
                "reward": float(group.rewards[member]),
                "rewards": {name: float(values[member]) for name, values in group.reward_breakdown.items()},
                "advantage": float(advantages[member]),
                "files": {
                    name: _save(image, folder, f"{number}-{member}-{name}")
                    for name, image in zip(STAGE_NAMES, images[member], strict=True)
                    if image is not None
                },
            }
            for member, trace in enumerate(group.traces)
        ],
    }


def _save(image: Any, folder: Path, name: str) -> str:
    """uint8 [H, W, 3], or a tensor [3, H, W]; the file's name."""
    pixels = image if isinstance(image, np.ndarray) else np.ascontiguousarray(image.movedim(0, -1).numpy())
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return f"{name}.png"
