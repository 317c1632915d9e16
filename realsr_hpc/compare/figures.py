"""Draws curves with bands over seeds, and collects every group's images of the same inputs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from realsr_hpc import runfolder
from realsr_hpc.artifacts import evaluation, rollouts
from realsr_hpc.artifacts.stored import Damaged
from realsr_hpc.compare.repetitions import Group
from realsr_hpc.tracking.drawing import read_pixels

MAX_ROWS = 8
Shown = dict[str, Path | None]
"""Files by what they show (input, truth, final); None if there is no such file."""
logger = logging.getLogger(__name__)


def plot_curves(groups: Sequence[Group], metrics: Sequence[str], path: Path) -> int:
    """Write a PNG with one panel per metric: mean over each group's runs, with a band from lowest to highest value.

    Returns the number of lines drawn.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.5, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    drawn = 0
    for metric, panel in zip(metrics, panels, strict=False):  # metrics first, so that no panel is consumed without one
        for number, group in enumerate(groups):
            steps, mean, low, high = group.curve(metric)
            if len(steps):
                label = f"{group.label} ({len(group.runs)})"
                style = ("-", "--", "-.", ":")[number // 10 % 4]
                panel.plot(steps, mean, style, color=f"C{number % 10}", label=label, linewidth=1.6, marker=".")
                panel.fill_between(steps, low, high, color=f"C{number % 10}", alpha=0.15, linewidth=0)
                drawn += 1
        panel.set(title=metric, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
    return drawn


def image_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[np.ndarray | None]]]:
    """Column headers and rows of images for inputs that all groups share: input, one run of each group, truth.

    Images are RGB uint8 [H, W, 3]. All runs have the same seed, because the seed decides crops and degradations. Images
    come from the runs' evaluations if every group has one, else from the held-out rollouts that training stored last.
    Empty if the runs' folders are not on this machine, or have no input in common.
    """
    by_seed = [{run.params.get("seed"): run for run in group.runs} for group in groups]
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed)] if by_seed else []
    for read, seed in itertools.product((_evaluated, _kept), seeds):
        found = [read(runs[seed].run_dir) for runs in by_seed]
        common = [key for key in found[0] if all(key in images for images in found)]
        if common:
            headers = ["input", *(group.label for group in groups), "truth"]
            rows = [
                [
                    read_pixels(found[0][key]["input"]),
                    *(read_pixels(i[key]["final"]) for i in found),
                    read_pixels(found[0][key]["truth"]),
                ]
                for key in common[:MAX_ROWS]
            ]
            return headers, rows
    return [], []


def _evaluated(run_dir: Path | None) -> dict[str, Shown]:
    """By key: images of a run's newest evaluation on its held-out split."""
    folders = sorted(runfolder.evaluations(run_dir).glob(f"{runfolder.STEP}*")) if run_dir else []
    for folder in reversed([folder for folder in folders if (folder / evaluation.FILE).is_file()]):
        try:
            images = evaluation.read(folder).images
        except Damaged as error:
            logger.warning("not shown: %s", error)
            continue
        return {
            image.key: _shown(folder, image.files, image.methods["ours"].files)
            for image in images
            if "ours" in image.methods
        }
    return {}


def _kept(run_dir: Path | None) -> dict[str, Shown]:
    """By key: the first rollout of each held-out group that training stored last."""
    for folder in reversed(runfolder.all_rollouts(run_dir, "heldout") if run_dir else []):
        try:
            groups = rollouts.read(folder).groups
        except Damaged as error:
            logger.warning("not shown: %s", error)
            continue
        return {group.key: _shown(folder, group.files, group.rollouts[0].files) for group in groups if group.rollouts}
    return {}


def _shown(folder: Path, given: Mapping[str, str], made: Mapping[str, str]) -> Shown:
    names = {"input": given.get("input"), "truth": given.get("truth"), "final": made.get("final")}
    return {kind: folder / name if name else None for kind, name in names.items()}
