"""Saves a few groups of rollouts for inspection (`artifacts.rollouts`): images, texts and rewards.

A step that is repeated after a resume overwrites its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from realsr_hpc import runfolder
from realsr_hpc.artifacts import rollouts
from realsr_hpc.records import ScoredGroup, StepReport
from realsr_hpc.train.training_run import TrainingRun
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

StepImages = Sequence[np.ndarray | None]
"""The images of one rollout in the order of `IMAGE_NAMES`; uint8 [H, W, 3]."""


def keep_rollouts(run: TrainingRun, kind: Literal["train", "heldout"], report: StepReport) -> None:
    """Save the first groups of a report if the recipe asks for it at this step."""
    tracking, step, tokens = run.config.tracking, report.step, run.parts.tokens
    every = tracking.rollouts_every_steps
    if not (run.parts.groups.is_main and every and (step % every == 0 or step in (1, run.num_steps))):
        return
    groups = report.groups[: tracking.rollouts_groups]
    traces = [trace for group in groups for trace in group.traces]
    # the final images were decoded for the rewards; the rough and middle ones have not been needed so far
    rough, middle = (tokens.decode([trace.images[number] for trace in traces]) for number in range(2))
    final = [image for group in groups for image in group.images]
    images = iter(zip(rough, middle, final, strict=True))
    write_rollouts(run.run_dir, step, kind, groups, [[next(images) for _ in group.traces] for group in groups])


def write_rollouts(
    run_dir: Path,
    step: int,
    kind: Literal["train", "heldout"],
    groups: Sequence[ScoredGroup],
    images: Sequence[Sequence[StepImages]],
) -> Path:
    """Save `groups` with the images of their rollouts, [groups, G]; returns the folder."""
    folder = runfolder.rollouts(run_dir, step, kind)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(zip(groups, images, strict=True))
    kept = tuple(_group(folder, number, group, members) for number, (group, members) in numbered)
    rollouts.write(folder, rollouts.KeptRollouts(run_dir.name, step, kind, kept))
    return folder


def _group(folder: Path, number: int, group: ScoredGroup, images: Sequence[StepImages]) -> rollouts.KeptGroup:
    source = group.source
    label, scene = source.label, source.scene
    truth = {} if source.gt is None else {"truth": _save(source.gt, folder, f"{number}-truth")}
    members = range(len(group.traces))
    return rollouts.KeptGroup(
        key=source.key,
        degradation=None if label is None else label.phrase,
        captions=None if scene is None else scene.captions,
        weights=group.rewards.weights,
        files={"input": _save(source.lq, folder, f"{number}-input"), **truth},
        rollouts=tuple(_rollout(folder, f"{number}-{i}", group, i, images[i]) for i in members),
    )


def _rollout(folder: Path, name: str, group: ScoredGroup, member: int, images: StepImages) -> rollouts.KeptRollout:
    trace, advantages = group.traces[member], group.advantages
    named = zip(IMAGE_NAMES, images, strict=True)
    return rollouts.KeptRollout(
        degradation=trace.degradation,
        texts=trace.texts,
        faults=trace.faults,
        reward=float(group.rewards.total[member]),
        rewards={term: float(values[member]) for term, values in group.rewards.breakdown.items()},
        advantage=None if advantages is None else float(advantages[member]),
        files={size: _save(image, folder, f"{name}-{size}") for size, image in named if image is not None},
    )


def _save(image: np.ndarray, folder: Path, name: str) -> str:
    """Save an image, uint8 [H, W, 3], as PNG; returns the file's name."""
    Image.fromarray(image).save(folder / f"{name}.png")
    return f"{name}.png"
