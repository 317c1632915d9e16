"""Groups runs that differ only in layout, operation or seed (repetitions); computes means, intervals and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from realsr_hpc.compare.runs import PROFILE_TAG, ComparedRun, Comparison
from realsr_hpc.config.metrics import is_measured

MAX_LABEL_KEYS = 3


@dataclass(frozen=True)
class Estimate:
    """Mean over runs with its 95 % Student interval, which is NaN for a single run."""

    mean: float
    low: float
    high: float
    num_runs: int

    def __str__(self) -> str:
        if not self.num_runs:
            return "–"
        return f"{self.mean:.4g}" if self.num_runs == 1 else f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.num_runs > 1 and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Group:
    """Runs that are repetitions of one recipe."""

    label: str
    runs: tuple[ComparedRun, ...]

    def final(self, metric: str) -> Estimate:
        """Mean of the runs' last values."""
        return estimate([run.metrics[metric] for run in self.runs if metric in run.metrics])

    def diverged(self, metric: str) -> int:
        """Number of runs whose last value is not finite; means leave them out, and their group is never the best."""
        return sum(not is_measured(run.metrics[metric]) for run in self.runs if metric in run.metrics)

    def less(self, other: Group, metric: str) -> Estimate:
        """Mean difference from another group, paired by seed; runs without a counterpart are left out."""
        theirs = {run.params.get("seed"): run.metrics.get(metric) for run in other.runs}
        pairs = [(run.metrics.get(metric), theirs.get(run.params.get("seed"))) for run in self.runs]
        return estimate([ours - base for ours, base in pairs if ours is not None and base is not None])

    def change(self, metric: str) -> Estimate:
        """Mean of last minus first value of the runs' histories."""
        histories = [run.histories.get(metric, []) for run in self.runs]
        return estimate([points[-1][1] - points[0][1] for points in histories if len(points) > 1])

    def gain(self, metric: str, start: str) -> Estimate:
        """Mean difference of the runs' last values of two metrics, `metric` - `start`."""
        return estimate(
            [run.metrics[metric] - run.metrics[start] for run in self.runs if {metric, start} <= {*run.metrics}]
        )

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Steps that every run of the group has, with mean, lowest and highest value; all arrays [steps]."""
        histories = [dict(run.histories[metric]) for run in self.runs if run.histories.get(metric)]
        steps = sorted(set.intersection(*map(set, histories))) if histories else []
        if not steps:
            return np.array([]), np.array([]), np.array([]), np.array([])
        values = np.array([[history[step] for step in steps] for history in histories])
        return np.array(steps), values.mean(0), values.min(0), values.max(0)

    def process_hours(self) -> Estimate:
        """Process-hours (GPU-hours on GPUs): measured time of all steps times the number of processes."""
        return estimate([hours for run in self.runs if (hours := process_hours(run)) > 0])

    def rollout_tokens(self) -> Estimate:
        """Number of tokens sampled in training, over all data-parallel ranks."""
        return estimate([tokens for run in self.runs if (tokens := rollout_tokens(run)) > 0])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student interval of the finite values of independent runs."""
    kept = np.array([value for value in values if is_measured(value)])
    if len(kept) < 2:
        return Estimate(float(kept[0]) if len(kept) else float("nan"), float("nan"), float("nan"), len(kept))
    half = float(student.ppf(0.975, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Estimate(float(kept.mean()), float(kept.mean()) - half, float(kept.mean()) + half, len(kept))


def group_runs(comparison: Comparison) -> list[Group]:
    """Groups of runs that agree in all keys that decide results but the seed, sorted by label, `default` first."""
    found: dict[tuple[str | None, ...], list[ComparedRun]] = {}
    for run in comparison.runs:
        found.setdefault(tuple(run.params.get(key) for key in comparison.deciding), []).append(run)
    groups = [Group(_label(runs[0], comparison), tuple(runs)) for runs in found.values()]
    return sorted(groups, key=lambda group: (group.label != "default", group.label))


def process_hours(run: ComparedRun) -> float:
    """Process-hours of a run; 0 if it has no measured times."""
    seconds = sum(value for key, points in run.histories.items() if key.startswith("time/") for _, value in points)
    return seconds * run.num_processes / 3600


def rollout_tokens(run: ComparedRun) -> float:
    """Tokens that a run sampled: rate times duration of each step, over the data-parallel ranks; 0 if unmeasured."""
    seconds = dict(run.histories.get("time/rollout/s", []))
    rates = dict(run.histories.get("rollout/tokens_per_s/mean", []))
    model_parallel = int(run.params.get("parallel.tp", 1)) * int(run.params.get("parallel.pp", 1))
    return sum(rates[step] * seconds[step] for step in rates if step in seconds) * run.num_processes / model_parallel


def _label(run: ComparedRun, comparison: Comparison) -> str:
    """The profile's name if there is one, else the differing keys if they are few, else the run's name."""
    if run.tags.get(PROFILE_TAG):
        return run.tags[PROFILE_TAG]
    keys = comparison.deciding
    if 0 < len(keys) <= MAX_LABEL_KEYS:
        return ", ".join(f"{key.rpartition('.')[2]}={run.params.get(key, '')}" for key in keys)
    return run.name
