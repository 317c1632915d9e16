"""Numbers and files that come after a run: an evaluation's, into the run's own MLflow entry.

They are kept in `results.jsonl` of the run's folder first, a JSON object a line: the spool has one writer, which may
still be training. So a store that was away, or another one that the run moves to, gets them from there. MLflow ignores
a metric with the same key, step, time and value, and times come from the file: nothing is doubled by sending again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from realsr_hpc import runfolder
from realsr_hpc.files import first_line, parse_json, read_json, write_atomically
from realsr_hpc.locks import hold
from realsr_hpc.tracking.database import MAKING_WAIT_S, client
from realsr_hpc.tracking.place import moved_to, recipe_of
from realsr_hpc.tracking.store import prepare_run, read_bookmark, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

METRICS_A_BATCH = 500
REFUSED = "INVALID_PARAMETER_VALUE"
"""MLflow's word for what it will not take however often it is sent."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """Results of one evaluation: a line of the file."""

    step: int
    time_ms: int
    metrics: dict[str, float]
    files: tuple[str, ...]
    """Absolute, as they were then."""
    folder: str
    """Of the artifacts in MLflow."""


@dataclass(frozen=True)
class _Sent:
    """How many bytes of the file an MLflow run has."""

    run_id: str
    size: int


def log_results(run_dir: Path, step: int, metrics: Mapping[str, float], files: Sequence[Path], folder: str) -> str:
    """Store metrics and files in the run's folder and add them to its MLflow run. Returns why MLflow did not take them,
    else "".

    What MLflow did not take now, it gets with the run's next attempt or from `realsr-hpc sync-tracking`.
    """
    paths = tuple(str(file.resolve()) for file in files)
    found = Results(step, int(time.time() * 1000), {key: float(value) for key, value in metrics.items()}, paths, folder)
    try:
        with hold(runfolder.results_lock(run_dir), "keeping results", MAKING_WAIT_S):
            _append(runfolder.results(run_dir), found)
        if read_bookmark(run_dir) is None:
            return f"{run_dir} has no MLflow run"
        config = recipe_of(run_dir)
        run_id = prepare_run(config, run_dir)
        send_results(client(tracking_uri(config)), run_id, run_dir)
    except Exception as error:  # tracking never stops what is tracked
        lines = str(error).strip().splitlines()
        return f"MLflow is not reachable ({type(error).__name__}: {lines[0][:160] if lines else ''})"
    return ""


def send_results(mlflow: MlflowClient, run_id: str, run_dir: Path) -> int:
    """Send what the MLflow run `run_id` has not got yet; numbers and files sent. Errors of MLflow pass through."""
    path, note = runfolder.results(run_dir), runfolder.results_sent(run_dir)
    if not path.exists():
        return 0
    with hold(runfolder.results_lock(run_dir), "sending results", MAKING_WAIT_S):
        sent, content = read_json(note, _Sent), path.read_bytes()
        done = sent.size if sent is not None and sent.run_id == run_id and sent.size <= len(content) else 0
        count = sum(_send(mlflow, run_id, run_dir, item) for item in _read(content[done:]))
        if done != len(content):
            write_atomically(note, json.dumps(asdict(_Sent(run_id, len(content)))))
    return count


def _send(mlflow: MlflowClient, run_id: str, run_dir: Path, found: Results) -> int:
    from mlflow.entities import Metric

    values = [Metric(key, value, found.time_ms, found.step) for key, value in found.metrics.items()]
    for start in range(0, len(values), METRICS_A_BATCH):
        send_metrics(mlflow, run_id, values[start : start + METRICS_A_BATCH])
    return len(values) + sum(send_file(mlflow, run_id, Path(name), found.folder, run_dir) for name in found.files)


def send_file(mlflow: MlflowClient, run_id: str, path: Path, folder: str, run_dir: Path) -> int:
    """Send one file; how many were sent. One that is gone, or that nobody can send, keeps no other from being sent."""
    here, place = moved_to(path, run_dir), PurePosixPath(folder)
    try:
        if place.is_absolute() or ".." in place.parts or not folder.isprintable():
            raise ValueError(f"{folder!r} is no folder of artifacts")
        with here.open("rb"):
            pass
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        logger.warning("tracking: %s is not sent: %s", here, error)
        return 0
    mlflow.log_artifact(run_id, str(here), folder or None)
    return 1


def send_metrics(mlflow: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    """Send at most METRICS_A_BATCH values; those that MLflow refuses, as a damaged line may name them, are left out."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.log_batch(run_id, metrics=metrics)
    except MlflowException as error:
        if error.error_code != REFUSED:
            raise
        if len(metrics) == 1:
            logger.warning("tracking: metric %r is left out: %s", metrics[0].key, first_line(error))
            return
        half = len(metrics) // 2
        for part in (metrics[:half], metrics[half:]):
            send_metrics(mlflow, run_id, part)


def _append(path: Path, found: Results) -> None:
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # by a kill
    with path.open("ab") as file:
        file.write(b"\n" * torn + json.dumps(asdict(found)).encode() + b"\n")


def _read(content: bytes) -> list[Results]:
    """Whole lines; one that is none, as a kill leaves it, is passed over."""
    found = []
    for line in content.splitlines():
        try:
            found.append(parse_json(line, Results))
        except ValueError:
            continue
    return found
