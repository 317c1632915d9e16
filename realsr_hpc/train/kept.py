"""A few groups of rollouts as people look at them: images, words and rewards, `RUN_DIR/rollouts/step-N-KIND/`.

`rollouts.json` names the images beside it; a step done again after a resume replaces its folder's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from realsr_hpc.files import write_atomically
from realsr_hpc.records import ScoredGroup, StepReport
from realsr_hpc.train.run import TrainingRun

ROLLOUTS_FOLDER = "rollouts"
RECORD_NAME = "rollouts.json"
IMAGE_NAMES = ("rough", "middle", "final")
Pictures = Sequence[np.ndarray | None]
"""Of one rollout, in the order of `IMAGE_NAMES`; uint8 [H, W, 3]."""


def keep_rollouts(run: TrainingRun, kind: Literal["train", "heldout"], report: StepReport) -> None:
    """Save the first groups of a report for people to look at, where the recipe wants it at this step."""
    tracking, step, tokens = run.config.tracking, report.step, run.parts.tokens
    every = tracking.rollouts_every_steps
    if not (run.parts.groups.is_main and every and (step % every == 0 or step in (1, run.num_steps))):
        return
    groups = report.groups[: tracking.rollouts_groups]
    traces = [trace for group in groups for trace in group.traces]
    # the final images were decoded for the rewards; the earlier ones nobody has needed yet
    rough, middle = (tokens.decode([trace.images[number] for trace in traces]) for number in range(2))
    final = [image for group in groups for image in group.images]
    pictures = iter(zip(rough, middle, final, strict=True))
    write_rollouts(run.run_dir, step, kind, groups, [[next(pictures) for _ in group.traces] for group in groups])


def write_rollouts(
    run_dir: Path, step: int, kind: str, groups: Sequence[ScoredGroup], pictures: Sequence[Sequence[Pictures]]
) -> Path:
    """Save `groups` with the pictures of their rollouts, [groups, G]; returns the folder."""
    folder = run_dir / ROLLOUTS_FOLDER / f"step-{step:06d}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(zip(groups, pictures, strict=True))
    records = [_group(folder, number, group, members) for number, (group, members) in numbered]
    content = {"run": run_dir.name, "step": step, "kind": kind, "groups": records}
    write_atomically(folder / RECORD_NAME, json.dumps(content, indent=1, ensure_ascii=False))
    return folder


def _group(folder: Path, number: int, group: ScoredGroup, pictures: Sequence[Pictures]) -> dict[str, Any]:
    source = group.source
    label, scene = source.labels[0], source.scenes[0]
    truth = {} if source.gt is None else {"truth": _save(source.gt[0], folder, f"{number}-truth")}
    return {
        "key": source.keys[0],
        "degradation": None if label is None else label.phrase,
        "captions": None if scene is None else list(scene.captions),
        "weights": group.rewards.weights,
        "files": {"input": _save(source.lq[0], folder, f"{number}-input"), **truth},
        "rollouts": [
            {
                "degradation": trace.degradation,
                "texts": list(trace.texts),
                "faults": list(trace.faults),
                "reward": float(group.rewards.total[member]),
                "rewards": {name: float(values[member]) for name, values in group.rewards.breakdown.items()},
                "advantage": None if group.advantages is None else float(group.advantages[member]),
                "files": {
                    name: _save(image, folder, f"{number}-{member}-{name}")
                    for name, image in zip(IMAGE_NAMES, pictures[member], strict=True)
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
