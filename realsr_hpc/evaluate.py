"""Restored images against their truths: metrics an image, means with 95 % intervals, table, CSV and picture grid.

Bicubic upscaling always stands beside the models. Every metric says its colour space and crop. A method that gave no
image for some inputs is averaged over those it gave, with their number beside; nothing is filled in.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from realsr_hpc.config.paths import resolve
from realsr_hpc.records import LQBatch, ParsedTrace, RestoredImage
from realsr_hpc.rewards.base import Candidate
from realsr_hpc.rewards.degradation import slot_matches
from realsr_hpc.rewards.generation import NIQE_PATH
from realsr_hpc.rewards.metrics import psnr_y, ssim_y
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rewards.niqe import NIQEModel, niqe
from realsr_hpc.tracking.pictures import image_grid

Restorer = Callable[[LQBatch], list[RestoredImage]]
BICUBIC = "bicubic"
LOWER_IS_BETTER = frozenset({"niqe"})
_NUM_RESAMPLES = 2000
_NO_TRACE = ParsedTrace(None, (None, None, None), (None, None, None), ("no trace: not a model's output",))


@dataclass(frozen=True)
class Interval:
    """Mean over images with its 95 % bootstrap interval (percentile, resampled over images)."""

    mean: float
    low: float
    high: float
    num_images: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.num_images else "–"


@dataclass(frozen=True)
class EvaluationReport:
    """Per-image rows (`key`, `method`, a value a metric; NaN where there is none) and what follows from them."""

    rows: list[dict[str, str | float]]
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    notes: dict[str, str]
    """What exactly each metric is."""
    pictures: list[list[np.ndarray | None]] = field(default_factory=list)
    """A row an image: LQ, each method, truth."""
    headers: tuple[str, ...] = ()

    def values(self, method: str, metric: str) -> np.ndarray:
        """Values of all images, NaN where there is none."""
        return np.array([row[metric] for row in self.rows if row["method"] == method], dtype=np.float64)

    def interval(self, method: str, metric: str) -> Interval:
        """Mean and interval of one method."""
        return bootstrap(self.values(method, metric))

    def gain(self, method: str, over: str, metric: str) -> Interval:
        """Mean and interval of the paired difference `method` - `over` over images that both have."""
        return bootstrap(self.values(method, metric) - self.values(over, metric))

    def summary(self) -> dict[str, float]:
        """`evaluate/METHOD/METRIC` -> mean, for trackers; means without images are left out."""
        found = {f"evaluate/{a}/{b}": self.interval(a, b) for a in self.methods for b in self.metrics}
        return {name: interval.mean for name, interval in found.items() if interval.num_images}

    def markdown(self) -> str:
        """Table of means, gains over bicubic, and the definitions."""
        lines = ["| metric | " + " | ".join(self.methods) + " |", "|---" * (len(self.methods) + 1) + "|"]
        for metric in self.metrics:
            arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
            cells = [str(self.interval(method, metric)) for method in self.methods]
            lines.append(f"| {metric} {arrow} | " + " | ".join(cells) + " |")
        counts = ", ".join(f"{method} {self.num_restored(method)}" for method in self.methods)
        notes = [f"- `{metric}`: {self.notes[metric]}" for metric in self.metrics]
        head = f"{len(self.rows) // len(self.methods)} images; images given: {counts}. Mean [95 % bootstrap interval]."
        return "\n".join([head, "", *lines, "", *self._gains(), "", *notes, ""])

    def num_restored(self, method: str) -> int:
        """Images the method gave."""
        return int(self.values(method, "restored").sum())

    def write(self, folder: Path) -> None:
        """`metrics.csv`, `metrics.md` and `grid.png` into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["key", "method", *self.metrics])
            writer.writeheader()
            writer.writerows(self.rows)
        (folder / "metrics.md").write_text(self.markdown())
        image_grid(self.pictures, self.headers).save(folder / "grid.png")

    def _gains(self) -> list[str]:
        lines = []
        for method in self.methods:
            for metric in ("psnr_y", "ssim_y", "niqe"):
                if method != BICUBIC and metric in self.metrics:
                    lines.append(f"- {method} less {BICUBIC}, {metric}: {self.gain(method, BICUBIC, metric)}")
        return lines


def evaluate(
    restorers: Restorer | Mapping[str, Restorer],
    batch: LQBatch,
    *,
    rewards: RewardMixture | None = None,
    crop_px: int = 0,
) -> EvaluationReport:
    """Score restorers (by name, or one, then called `ours`) and bicubic on a batch.

    crop_px: border left out of PSNR and SSIM (the field often takes the upscale). Raises ValueError when a restorer
    returns another number of images than the batch has.
    """
    named = dict(restorers) if isinstance(restorers, Mapping) else {"ours": restorers}
    if BICUBIC in named:
        raise ValueError(f"a restorer is called {BICUBIC!r}, which is the baseline's name; give it another")
    results = {name: _restore(name, restorer, batch) for name, restorer in named.items()}
    size = _output_size(batch, results)
    results = {BICUBIC: [RestoredImage(x, _NO_TRACE, (None, None, x)) for x in bicubic(batch, size)], **results}
    lq, gt = to_hwc(batch.lq), None if batch.gt is None else to_hwc(batch.gt)
    columns = {name: _columns(images, batch, lq, gt, rewards, crop_px) for name, images in results.items()}
    metrics = tuple(dict.fromkeys(metric for values in columns.values() for metric in values))
    rows = [
        {"key": key, "method": name} | {metric: float(_at(values, metric, i)) for metric in metrics}
        for i, key in enumerate(batch.keys)
        for name, values in columns.items()
    ]
    pictures = [
        [lq[i], *(images[i].image for images in results.values()), *(() if gt is None else (gt[i],))]
        for i in range(len(batch))
    ]
    headers = ("input", *results, *(() if gt is None else ("truth",)))
    return EvaluationReport(rows, tuple(results), metrics, _notes(metrics, crop_px), pictures, headers)


def bicubic(batch: LQBatch, size: tuple[int, int]) -> list[np.ndarray]:
    """The LQ images at `size` (height, width) by Pillow's bicubic."""
    return [
        np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        for image in to_hwc(batch.lq)
    ]


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of the finite values with its 95 % percentile interval."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed).integers(0, len(values), (_NUM_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), len(values))


def to_hwc(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, 3, H, W] -> [B, H, W, 3]."""
    return np.ascontiguousarray(images.cpu().permute(0, 2, 3, 1).numpy())


def _restore(name: str, restorer: Restorer, batch: LQBatch) -> list[RestoredImage]:
    images = restorer(batch)
    if len(images) != len(batch):
        raise ValueError(f"restorer {name!r} returned {len(images)} images for {len(batch)}; it must return one each")
    return images


def _output_size(batch: LQBatch, results: Mapping[str, Sequence[RestoredImage]]) -> tuple[int, int]:
    """Of the truth, else of what the models gave."""
    if batch.gt is not None:
        return (batch.gt.shape[2], batch.gt.shape[3])
    shapes = [item.image.shape for images in results.values() for item in images if item.image is not None]
    return shapes[0][:2] if shapes else (batch.lq.shape[2], batch.lq.shape[3])


def _columns(
    images: Sequence[RestoredImage],
    batch: LQBatch,
    lq: np.ndarray,
    gt: np.ndarray | None,
    rewards: RewardMixture | None,
    crop_px: int,
) -> dict[str, np.ndarray]:
    """Values [images] by metric, NaN where an image or what it is measured against is missing."""
    given = np.array([item.image is not None for item in images])
    columns = {"restored": given.astype(np.float64)}
    pixels = [item.image for item in images if item.image is not None]
    if pixels and gt is not None:
        columns["psnr_y"] = _spread(psnr_y(np.stack(pixels), gt[given], crop_px), given)
        columns["ssim_y"] = _spread(ssim_y(np.stack(pixels), gt[given], crop_px), given)
    if pixels:
        columns["niqe"] = _spread(niqe(pixels, NIQEModel.load(resolve(NIQE_PATH))), given)
    has_trace = any(item.trace is not _NO_TRACE for item in images)
    if has_trace:
        columns["well_formed"] = np.array([float(item.trace.well_formed) for item in images])
        columns["slot_accuracy"] = np.array(
            [_slots(item, label) for item, label in zip(images, batch.labels, strict=True)]
        )
    if rewards is not None:
        columns |= _rewards(images, batch, lq, gt, rewards, has_trace)
    return columns


def _slots(item: RestoredImage, label) -> float:
    return np.nan if label is None else float(slot_matches(item.trace.degradation, label).mean())


def _rewards(
    images, batch: LQBatch, lq: np.ndarray, gt, rewards: RewardMixture, has_trace: bool
) -> dict[str, np.ndarray]:
    """Reward terms; of a method without traces only those that look at the image."""
    candidates = [
        Candidate(item.trace, item.image, lq[i], None if gt is None else gt[i], batch.labels[i], batch.scenes[i])
        for i, item in enumerate(images)
    ]
    return {
        f"reward_{name}": reward.score(candidates)
        for name, reward in rewards.rewards.items()
        if has_trace or reward.needs_image
    }


def _spread(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    spread = np.full(len(given), np.nan)
    spread[given] = values
    return spread


def _at(values: Mapping[str, np.ndarray], metric: str, i: int) -> float:
    return values[metric][i] if metric in values else np.nan


def _notes(metrics: Sequence[str], crop_px: int) -> dict[str, str]:
    border = f"{crop_px} px of border left out" if crop_px else "no border left out"
    known = {
        "restored": "1 where the method gave a final image, else 0",
        "psnr_y": f"PSNR in dB on luma (BT.601, 16..235, data range 255), {border}",
        "ssim_y": f"SSIM on the same luma, 11 px Gaussian of sigma 1.5, valid region, {border}",
        "niqe": "NIQE of this project, pristine model recipes/assets/tiny/niqe_pristine.npz (32 px patches): "
        "not comparable with published NIQE",
        "well_formed": "share of traces wholly well formed",
        "slot_accuracy": "share of the five degradation slots named rightly",
    }
    return {metric: known.get(metric, "reward term of the recipe, ungated, in its range") for metric in metrics}
