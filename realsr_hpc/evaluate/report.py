"""Writes the report of an evaluation.

metrics.md       tables with intervals, paired differences, texts, published results, metrics not computed
metrics.csv      one line per image and method; written last, so where it is the report is complete
grid.png         the first images: input, every method, truth
worst.png        the same for the images that are worst for the last method
slots.png        confusion tables of the degradation words
images.json      all records, and images/ with all images
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc.artifacts.evaluation import FINAL, INPUT, TRUTH, EvaluatedImage
from realsr_hpc.evaluate.draws import over_draws
from realsr_hpc.evaluate.intervals import Interval, bootstrap
from realsr_hpc.evaluate.methods import BICUBIC
from realsr_hpc.evaluate.metrics import Metrics
from realsr_hpc.evaluate.published import published_table
from realsr_hpc.evaluate.words import Confusion, confusions
from realsr_hpc.files import printable, write_atomically
from realsr_hpc.tracking.drawing import image_grid, read_pixels

GRID_ROWS = 12


@dataclass(frozen=True)
class EvaluationReport:
    """All images with every method's results, and the statistics computed from them."""

    folder: Path
    set_name: str
    methods: tuple[str, ...]
    images: list[EvaluatedImage]
    metrics: Metrics
    remarks: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    """By case: why it could not be used."""
    absent: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By method of finished images: the cases for which it has no readable image."""
    set_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By metric and method: values of metrics that are defined on a whole set (FID)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the per-image metrics, in order of first occurrence."""
        rows = (result.metrics for image in self.images for result in image.methods.values())
        return tuple(dict.fromkeys(name for row in rows for name in row))

    def values(self, method: str, metric: str) -> np.ndarray:
        """Values [images] of one method, NaN where there is none."""
        rows = (image.methods[method].metrics for image in self.images)
        return np.array([row.get(metric, np.nan) for row in rows], dtype=np.float64)

    def interval(self, method: str, metric: str) -> Interval:
        """Mean and interval of one method."""
        return bootstrap(self.values(method, metric))

    def gain(self, method: str, over: str, metric: str) -> Interval:
        """Mean and interval of the paired difference `method` - `over`, over images that both have values for."""
        return bootstrap(self.values(method, metric) - self.values(over, metric))

    def confusions(self, method: str) -> list[Confusion]:
        """Confusion table of each degradation slot: true words against predicted ones."""
        predicted = [image.methods[method].degradation for image in self.images]
        return confusions(predicted, [image.degradation for image in self.images])

    def summary(self) -> dict[str, float]:
        """Means by `evaluate/SET/METHOD/METRIC`, for MLflow; metrics without any value are left out."""
        found = {f"{a}/{b}": self.interval(a, b) for a in self.methods for b in self.names}
        means = {name: interval.mean for name, interval in found.items() if interval.num_images}
        means |= {f"{a}/{metric}": value for metric, row in self.set_scores.items() for a, value in row.items()}
        return {f"evaluate/{self.set_name}/{name}": value for name, value in means.items()}

    def speakers(self) -> list[str]:
        """Methods that name degradations, if the set has true labels."""
        return [method for method in self.methods if np.isfinite(self.values(method, "slot_accuracy")).any()]

    def worst(self, count: int = GRID_ROWS) -> list[EvaluatedImage]:
        """The images that are worst for the last method: missing ones, then by lowest PSNR, or highest NIQE if there
        are no truths."""
        values = self.values(self.methods[-1], "psnr_y" if "psnr_y" in self.names else "niqe")
        order = np.argsort(np.nan_to_num(values if "psnr_y" in self.names else -values, nan=-np.inf), kind="stable")
        return [self.images[place] for place in order[:count]]

    def markdown(self) -> str:
        """The whole report as Markdown, without images."""
        counts = ", ".join(f"{method} {int(self.values(method, 'restored').sum())}" for method in self.methods)
        head = [
            f"{self.set_name}: {len(self.images)} images; images given: {counts}. Mean [95 % bootstrap interval].",
            *(f"- {remark}" for remark in self.remarks),
            *(f"- left out: {key}: {reason}" for key, reason in self.skipped.items()),
            *(
                f"- {method} has no readable image for {len(keys)} of {len(self.images)}: {', '.join(keys[:5])}"
                for method, keys in self.absent.items()
            ),
        ]
        sections = [
            head,
            self._table(),
            self._draws(),
            self._lacking(),
            self._gains(),
            self._words(),
            published_table(self.set_name),
            self._notes(),
        ]
        return printable("\n".join("\n".join([*section, ""]) for section in sections if section))

    def write(self) -> None:
        """Write all files of the report into its folder, metrics.csv last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.csv").unlink(missing_ok=True)  # of an earlier report, which is replaced from here on
        (self.folder / "metrics.md").write_text(self.markdown(), encoding="utf-8")
        self._grid(self.images[:GRID_ROWS]).save(self.folder / "grid.png")
        self._grid(self.worst()).save(self.folder / "worst.png")
        if self.speakers():
            plot_confusions({name: self.confusions(name) for name in self.speakers()}, self.folder / "slots.png")
        write_atomically(self.folder / "metrics.csv", self._csv())

    def _csv(self) -> str:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, ["key", "method", *self.names], restval="nan")
        writer.writeheader()
        for image in self.images:
            for method, result in image.methods.items():
                writer.writerow({"key": image.key, "method": method, **result.metrics})
        return file.getvalue()

    def _table(self) -> list[str]:
        lines = ["| metric | " + " | ".join(self.methods) + " |", "|---" * (len(self.methods) + 1) + "|"]
        for metric in self.names:
            cells = [str(self.interval(method, metric)) for method in self.methods]
            lines.append(f"| {metric} {self._arrow(metric)} | " + " | ".join(cells) + " |")
        for metric, row in self.set_scores.items():
            cells = [f"{row[method]:.3f}" for method in self.methods]
            lines.append(f"| {metric} {self._arrow(metric)} | " + " | ".join(cells) + " |")
        return lines

    def values_of_draws(self, method: str, metric: str) -> np.ndarray:
        """Values [images, draws] of one method, NaN where there is none."""
        results = [image.methods[method] for image in self.images]
        rows = [(result.metrics, *result.further_draws) for result in results]
        return np.array([[row.get(metric, np.nan) for row in draws] for draws in rows], dtype=np.float64)

    def _draws(self) -> list[str]:
        """Tables of best, mean and worst draw, for methods with several draws per image."""
        lines: list[str] = []
        for method in self.methods:
            count = 1 + len(self.images[0].methods[method].further_draws)
            if count == 1:
                continue
            lines += [f"{method}, {count} draws per image: means over images of an image's best, mean and worst draw;"]
            lines += ["the worst tenth: of the images, by their own mean.", ""]
            lines += [f"| metric | best of {count} | mean | worst of {count} | worst tenth |", "|---|---|---|---|---|"]
            for metric in self.names:
                lower = self.metrics.lower_is_better(metric)
                found = over_draws(self.values_of_draws(method, metric), lower_is_better=lower)
                cells = f"{found.best} | {found.mean} | {found.worst} | {found.worst_tenth:.3f}"
                lines.append(f"| {metric} {self._arrow(metric)} | {cells} |")
            lines.append("")
        return lines

    @property
    def lacking(self) -> dict[tuple[str, str], list[str]]:
        """By metric and method: images with a result for which the metric could not be computed, each with the
        reason."""
        found: dict[tuple[str, str], list[str]] = {}
        for image in self.images:
            for method in self.methods:
                for metric, why in image.methods[method].not_computed.items():
                    found.setdefault((metric, method), []).append(f"{image.key} ({why})")
        return found

    def _lacking(self) -> list[str]:
        return [
            f"- {metric} of {method} is without {len(images)} of {len(self.images)} images, first {images[0]}"
            for (metric, method), images in self.lacking.items()
        ]

    def _arrow(self, metric: str) -> str:
        return "↓" if self.metrics.lower_is_better(metric) else "↑"

    def _gains(self) -> list[str]:
        """Paired differences of each method from bicubic, and of the last method from the others."""
        last = self.methods[-1]
        pairs = [(method, BICUBIC) for method in self.methods if method != BICUBIC]
        pairs += [(last, method) for method in self.methods if method not in (BICUBIC, last)]
        return [
            f"- {method} less {over}, {metric}: {self.gain(method, over, metric)}"
            for method, over in pairs
            for metric in ("psnr_y", "ssim_y", "niqe", "slot_accuracy", "text_chrf")
            if self.gain(method, over, metric).num_images
        ]

    def _words(self) -> list[str]:
        lines: list[str] = []
        for method in self.speakers():
            tables = self.confusions(method)
            rates = ", ".join(
                f"{item.slot} {item.accuracy:.2f} (always one word: {item.chance:.2f})" for item in tables
            )
            lines += [f"Degradation as {method} names it, share right: {rates}", ""]
            if method == self.methods[-1]:
                lines += [line for item in tables for line in [*item.markdown(), ""]]
        return lines

    def _notes(self) -> list[str]:
        names = [*self.names, *self.set_scores]
        lines = [f"- `{name}`: {note}" for name, note in self.metrics.notes(names).items()]
        missing = [f"- not computed: `{name}`: {reason}" for name, reason in self.metrics.not_computed.items()]
        return lines + missing

    def _grid(self, images: Sequence[EvaluatedImage]) -> Image.Image:
        has_truth = any(TRUTH in image.files for image in images)
        files = [
            [
                image.files[INPUT],
                *(image.methods[method].files.get(FINAL) for method in self.methods),
                *([image.files.get(TRUTH)] if has_truth else []),
            ]
            for image in images
        ]
        rows = [[read_pixels(self.folder / file if file else None) for file in row] for row in files]
        return image_grid(rows, (INPUT, *self.methods, *((TRUTH,) if has_truth else ())))


def plot_confusions(tables: Mapping[str, Sequence[Confusion]], path: Path) -> None:
    """Plot one row per method and one table per slot; the colour is the share among cases with the same true word."""
    from matplotlib.figure import Figure

    from realsr_hpc.evaluate.words import NOTHING, slot_words

    figure = Figure(figsize=(15, 3.4 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), 5, squeeze=False)
    for row, (method, slots) in zip(axes, tables.items(), strict=True):
        for place, item in zip(row, slots, strict=True):
            words = slot_words(item.slot)
            shares = item.counts / np.maximum(item.counts.sum(1, keepdims=True), 1)
            place.imshow(shares, vmin=0, vmax=1, cmap="Blues")
            place.set(xticks=range(4), yticks=range(3), title=f"{method}: {item.slot} ({item.accuracy:.2f})")
            place.set_xticklabels([*words, NOTHING], rotation=30)
            place.set_yticklabels(words)
            for (row, column), count in np.ndenumerate(item.counts):
                place.text(
                    column, row, str(count), ha="center", color="white" if shares[row, column] > 0.6 else "black"
                )
    figure.supxlabel("predicted")
    figure.supylabel("true")
    figure.savefig(path, dpi=80)
