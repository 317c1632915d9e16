"""Plots the compared metric over a sweep's axes: points for one, a heat map for two, parallel coordinates for more.

Recipes that differ in more than MAX_AXES keys (profiles) are shown as points, one position per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from realsr_hpc.compare.repetitions import Estimate, Group

MAX_AXES = 6

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_axes(groups: Sequence[Group], keys: Sequence[str], metric: str, path: Path) -> bool:
    """Write a PNG of the groups' last values of `metric` over the recipe keys that differ.

    Values of a key are placed at equal distances in increasing order, because a sweep's grid is seldom linear. Returns
    False, without a file, if fewer than two groups have a value or no key differs.
    """
    from matplotlib.figure import Figure

    rated = [(group, value) for group in groups if (value := group.final(metric)).num_runs]
    if not keys or len(rated) < 2:
        return False
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    order = {key: _ordered({_value(group, key) for group, _ in rated}) for key in keys}
    rated.sort(key=lambda item: [order[key].index(_value(item[0], key)) for key in keys])
    if len(keys) == 1 or len(keys) > MAX_AXES:
        _points(axes, rated, metric)
    elif len(keys) == 2:
        _heat_map(figure, axes, rated, order, metric)
    else:
        _parallel(figure, axes, rated, order, metric)
    figure.savefig(path, dpi=110)
    return True


Rated = Sequence[tuple[Group, Estimate]]
Order = dict[str, list[str]]
"""By key: its values in the order of the axis."""


def _points(axes: Axes, rated: Rated, metric: str) -> None:
    for place, (group, estimate) in enumerate(rated):
        finals = [run.metrics[metric] for run in group.runs if metric in run.metrics]
        axes.plot([place] * len(finals), finals, "o", color="C0", alpha=0.5)
        axes.plot([place - 0.2, place + 0.2], [estimate.mean] * 2, color="C3")
    axes.set_xticks(range(len(rated)), [group.label for group, _ in rated], rotation=20)
    axes.set(ylabel=metric, title="runs, and the mean of each group")


def _heat_map(figure: Figure, axes: Axes, rated: Rated, order: Order, metric: str) -> None:
    (x, xs), (y, ys) = order.items()
    means = np.full((len(ys), len(xs)), np.nan)
    for group, estimate in rated:
        means[ys.index(_value(group, y)), xs.index(_value(group, x))] = estimate.mean
    image = axes.imshow(means, aspect="auto", cmap="viridis", origin="lower")
    for row, column in np.argwhere(np.isfinite(means)):
        axes.text(column, row, f"{means[row, column]:.4g}", ha="center", va="center", backgroundcolor="white")
    axes.set_xticks(range(len(xs)), xs)
    axes.set_yticks(range(len(ys)), ys)
    axes.set(xlabel=x, ylabel=y)
    figure.colorbar(image, label=metric)


def _parallel(figure: Figure, axes: Axes, rated: Rated, order: Order, metric: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    means = [estimate.mean for _, estimate in rated]
    shade = ScalarMappable(Normalize(min(means), max(means)), "viridis")
    for group, estimate in rated:
        heights = [_height(values, _value(group, key)) for key, values in order.items()]
        axes.plot(range(len(order)), heights, color=shade.to_rgba(np.array(estimate.mean)), linewidth=2, alpha=0.8)
    for place, values in enumerate(order.values()):
        axes.axvline(place, color="grey", linewidth=0.8)
        for value in values:
            axes.annotate(value, (place, _height(values, value)), xytext=(4, 0), textcoords="offset points")
    axes.set_xticks(range(len(order)), list(order))
    axes.set_yticks([])
    figure.colorbar(shade, ax=axes, label=metric)


def _height(values: Sequence[str], value: str) -> float:
    return values.index(value) / max(1, len(values) - 1)


def _value(group: Group, key: str) -> str:
    return group.runs[0].params.get(key, "–")


def _ordered(values: set[str]) -> list[str]:
    """Numbers in increasing order, then words in alphabetical order."""

    def rank(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), ""
        except ValueError:
            return True, 0.0, value

    return sorted(values, key=rank)
