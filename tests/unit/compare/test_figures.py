"""Which of a run's stored images a comparison shows: those of its newest evaluation or held-out step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc import runfolder
from realsr_hpc.artifacts import evaluation, rollouts
from realsr_hpc.artifacts.evaluation import EvaluatedImage, Evaluation, MethodResult
from realsr_hpc.artifacts.rollouts import KeptGroup, KeptRollout, KeptRollouts
from realsr_hpc.compare.figures import image_rows
from realsr_hpc.compare.repetitions import Group
from realsr_hpc.compare.runs import ComparedRun
from realsr_hpc.tracking.store import RUN_TAG

FILES = {"input": "input.png", "truth": "truth.png"}


def shaded(folder: Path, *shades: int) -> Path:
    """Input, truth and result of these grey levels."""
    folder.mkdir(parents=True)
    for name, shade in zip(("input", "truth", "final"), shades, strict=True):
        Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(folder / f"{name}.png")
    return folder


def kept(run_dir: Path, step: int, shade: int) -> None:
    """Two rollouts, of which the first is shown."""
    folder = shaded(runfolder.rollouts(run_dir, step, "heldout"), 1, 2, shade)
    members = (
        KeptRollout(None, (), (), 1.0, {}, None, {"final": "final.png"}),
        KeptRollout(None, (), (), 9.0, {}, None, {"final": "truth.png"}),
    )
    rollouts.write(folder, KeptRollouts("r", step, "heldout", (KeptGroup("cat", None, None, {}, FILES, members),)))


def evaluated(run_dir: Path, step: int, shade: int) -> None:
    folder = shaded(runfolder.evaluations(run_dir) / runfolder.step_name(step), 1, 2, shade)
    methods = {"bicubic": MethodResult({}, {"final": "truth.png"}), "ours": MethodResult({}, {"final": "final.png"})}
    evaluation.write(folder, Evaluation("heldout", (EvaluatedImage("cat", FILES, methods),)))


def shown(*run_dirs: Path) -> list[list[int]]:
    """Grey levels of the rows: input, one result of each run, truth."""
    groups = [
        Group(path.name, (ComparedRun("1", path.name, "FINISHED", {}, {}, {RUN_TAG: str(path)}),)) for path in run_dirs
    ]
    return [[int(image[0, 0, 0]) for image in row if image is not None] for row in image_rows(groups)[1]]


def test_the_newest_held_out_step_is_shown_and_the_newest_evaluation_before_it(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, shades in ((one, (10, 20)), (two, (30, 40))):
        for step, shade in zip((3, 10), shades, strict=True):
            kept(run_dir, step, shade)
    assert shown(one, two) == [[1, 20, 40, 2]]
    for step, shade in ((3, 50), (10, 60)):
        evaluated(one, step, shade)
    assert shown(one, two) == [[1, 20, 40, 2]]  # only one of them is evaluated
    evaluated(two, 5, 70)
    assert shown(one, two) == [[1, 60, 70, 2]]
