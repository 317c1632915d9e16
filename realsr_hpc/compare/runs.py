"""Finds runs in MLflow by sweep or name, and reads what distinguishes them."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc import runfolder
from realsr_hpc.config.identity import decides
from realsr_hpc.config.metrics import TASK_METRIC, is_measured, lower_is_better
from realsr_hpc.config.places import text_without_root
from realsr_hpc.tracking.database import SQLITE, client
from realsr_hpc.tracking.delivery import brief
from realsr_hpc.tracking.store import PARENT_TAG, RUN_TAG, SWEEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PROFILE_TAG = "profile"
"""Tag of recipes with a profile of recipes/profile/: the name of a set of overrides."""
PAGE_RUNS = 1000
PREFERRED = ("heldout/", "rewards/")
"""Prefixes of the metrics that runs are compared by, the preferred one first."""
SHOWN = (*PREFERRED, "evaluate/")


@dataclass(frozen=True)
class ComparedRun:
    """One run with its parameters and metrics from MLflow."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    """Last values."""
    tags: dict[str, str] = field(default_factory=dict)
    histories: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By metric: (step, value) in step order, for the metrics that `compare` reads."""

    @property
    def run_dir(self) -> Path | None:
        """The run's folder; None if it is not on this machine."""
        path = Path(self.tags.get(RUN_TAG, ""))
        return path if self.tags.get(RUN_TAG) and path.is_dir() else None

    @property
    def num_processes(self) -> int:
        """Number of processes, one per GPU on a GPU machine."""
        return int(self.params.get("cluster.nodes", 1)) * int(self.params.get("cluster.tasks_per_node", 1))


@dataclass(frozen=True)
class Comparison:
    """Several runs, the recipe keys in which they differ, and the metric by which they are compared."""

    runs: tuple[ComparedRun, ...]
    differing: tuple[str, ...]
    """Recipe keys whose values differ."""
    metric: str

    @property
    def best(self) -> ComparedRun | None:
        """The run with the best last value in the metric's direction; None if no run has a finite one."""
        rated = [run for run in self.runs if is_measured(run.metrics.get(self.metric))]
        best = min if lower_is_better(self.metric) else max
        return best(rated, key=lambda run: run.metrics[self.metric]) if rated else None

    @property
    def deciding(self) -> tuple[str, ...]:
        """Differing keys that decide the result of one of the runs' tasks, the seed aside."""
        tasks = {run.params.get("task") for run in self.runs}
        return tuple(key for key in self.differing if key != "seed" and any(decides(key, task) for task in tasks))

    def columns(self) -> list[str]:
        """Metrics to show: those of rewards, held-out images and evaluations that any run has."""
        keys = {key for run in self.runs for key in run.metrics if key.startswith(SHOWN)}
        order = {beginning: place for place, beginning in enumerate(SHOWN)}
        return sorted(keys, key=lambda key: (key != self.metric, order[f"{key.split('/')[0]}/"], key))

    def write_csv(self, path: Path) -> None:
        """Write one line per run: status, differing recipe keys, metrics."""
        columns = self.columns()
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "status", *self.differing, *columns])
            for run in self.runs:
                values = [run.metrics.get(key, "") for key in columns]
                writer.writerow([run.name, run.status, *(run.params.get(key, "") for key in self.differing), *values])


def connect(uri: str) -> MlflowClient:
    """An MLflow client for reading. ValueError if there is no database at `uri` (none is created) or it is damaged."""
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ValueError(f"uri={uri}: no such file; name the store that the runs were launched with")
    with readable(uri):
        return client(uri)


@contextmanager
def readable(uri: str) -> Iterator[None]:
    """Turn exceptions of MLflow and its database inside the block into a one-line ValueError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise ValueError(
            f"uri={uri}: MLflow does not answer ({brief(error)}); start its server, or name another store"
        ) from None


def refuse_unknown_metric(comparison: Comparison) -> None:
    """Raise ValueError, with similar names, if the runs have metrics but none has the one to compare by."""
    keys = sorted({key for run in comparison.runs for key in run.metrics})
    if keys and comparison.metric not in keys:
        close = difflib.get_close_matches(comparison.metric, keys, n=3, cutoff=0.3) or comparison.columns()[:3]
        raise ValueError(f"metric={comparison.metric}: no run has it; the nearest are: {', '.join(close or keys[:3])}")


def find_sweep(mlflow: MlflowClient, experiment: str, sweep: str) -> list[Run]:
    """The runs of a sweep, by its parent run. ValueError lists the available sweeps."""
    ids = _experiments(mlflow, experiment)
    parents = _search(mlflow, ids, "tags.`realsr_hpc.kind` = 'sweep'")
    by_name = {run.data.tags.get(SWEEP_TAG, ""): run.info.run_id for run in parents}
    if sweep not in by_name:
        raise ValueError(f"sweep {sweep!r}: unknown; available: {', '.join(sorted(by_name)) or 'none'}")
    return _search(mlflow, ids, f"tags.`{PARENT_TAG}` = '{by_name[sweep]}'")


def find_runs(mlflow: MlflowClient, experiment: str, names: list[str]) -> list[Run]:
    """Runs by name, unique prefix of a name, or run id. ValueError lists the candidates."""
    known = _search(mlflow, _experiments(mlflow, experiment), f"tags.`{RUN_TAG}` != ''")
    found = [_one(known, name) for name in names]
    ids = [run.info.run_id for run in found]
    if twice := [name for name, run_id in zip(names, ids, strict=True) if ids.count(run_id) > 1]:
        raise ValueError(f"run {twice[0]!r}: is named twice, also as {twice[-1]!r}; name each run once")
    return found


def _search(mlflow: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    """All runs that match the condition, over all pages of results."""
    found: list[Run] = []
    token: str | None = ""
    while token is not None:
        page = mlflow.search_runs(experiments, condition, max_results=PAGE_RUNS, page_token=token or None)
        found, token = [*found, *page], page.token or None
    return found


def compare(
    runs: list[Run], metric: str = "", mlflow: MlflowClient | None = None, root: Path | None = None
) -> Comparison:
    """The comparison of these runs.

    Args:
        metric: metric to compare by; empty chooses a metric that the runs have, by task.
        mlflow: if given, also read histories: of the metric, of held-out metrics, and of times and rates (cost).
        root: present output root, for runs that were moved.
    """
    chosen = metric or _metric_of(runs)
    compared = tuple(
        ComparedRun(
            run.info.run_id,
            run.info.run_name or run.info.run_id,
            run.info.status,
            _params(run),
            dict(run.data.metrics),
            _tags(run, root),
            _histories(mlflow, run, chosen) if mlflow else {},
        )
        for run in sorted(runs, key=lambda run: run.info.run_name or "")
    )
    keys = {key for run in compared for key in run.params} - {"output_root"}
    differing = tuple(sorted(key for key in keys if len({run.params.get(key) for run in compared}) > 1))
    return Comparison(compared, differing, chosen)


def _params(run: Run) -> dict[str, str]:
    """Recipe keys with their values; paths below the run's output root are relative to it."""
    params = dict(run.data.params)
    for root in (Path(params.get("output_root", "")), Path(run.data.tags.get(RUN_TAG, "")).parent):
        params = {key: text_without_root(text, root) for key, text in params.items()} if root.is_absolute() else params
    return params


def _tags(run: Run, root: Path | None) -> dict[str, str]:
    """The run's tags, with its present folder if it was moved to `root` and MLflow does not know yet."""
    folder = Path(run.data.tags.get(RUN_TAG, ""))
    moved = root is not None and not folder.is_dir() and (root / folder.name).is_dir()
    return {**run.data.tags, RUN_TAG: str(root / folder.name)} if root and moved else dict(run.data.tags)


def _histories(mlflow: MlflowClient, run: Run, metric: str) -> dict[str, list[tuple[int, float]]]:
    held_out = [key for key in run.data.metrics if key.startswith("heldout/")]
    cost = [key for key in run.data.metrics if key.startswith("time/") or key == "rollout/tokens_per_s/mean"]
    wanted = dict.fromkeys([metric, "rewards/total/mean", *held_out, *cost])
    found = {key: mlflow.get_metric_history(run.info.run_id, key) for key in wanted if key in run.data.metrics}
    return {key: sorted((point.step, point.value) for point in points) for key, points in found.items()}


def _metric_of(runs: list[Run]) -> str:
    """Total reward, held out before trained, where there is one; else what the runs' task is best by."""
    keys = sorted({key for run in runs for key in run.data.metrics})
    for beginning in PREFERRED:
        found = [key for key in keys if key.startswith(beginning)]
        totals = [key for key in found if "total" in key and "mean" in key] or [key for key in found if "reward" in key]
        if totals:
            return totals[0]
    return next((key for key in TASK_METRIC.values() if key in keys), TASK_METRIC["grpo"])


def _experiments(mlflow: MlflowClient, name: str) -> list[str]:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        raise ValueError(f"experiment={name}: MLflow has none of that name; launch a run first, or name another")
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment={name}: it was deleted in MLflow; realsr-hpc sync-tracking brings it back, with its runs"
        )
    return [found.experiment_id]


def _one(known: list[Run], name: str) -> Run:
    found = runfolder.named(known, name, lambda run: (run.info.run_name or "", run.info.run_id))
    if len(found) != 1:
        names = ", ".join(sorted(run.info.run_name or "" for run in found or known)) or "none"
        raise ValueError(f"run {name!r}: {'several names begin with it' if found else 'unknown'}; available: {names}")
    return found[0]
