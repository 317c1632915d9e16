# pyright: strict, reportUnknownMemberType=false
"""Adds metrics and files of evaluations to the MLflow run of a trained run.

They are first appended to `results.jsonl` in the run's folder, one JSON object per line, because the spool has a single
writer, which may still be training. A store that was unreachable, or another one that the run is moved to, gets them
from there. Sending again stores nothing twice, because MLflow ignores a metric with the same key, step, time and value,
and times come from the file.
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
"""MLflow's error code for a value that it will never accept."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """Results of one evaluation: a line of results.jsonl."""

    step: int
    time_ms: int
    """Unix time in milliseconds."""
    metrics: dict[str, float]
    files: tuple[str, ...]
    """Absolute paths at the time of the evaluation."""
    folder: str
    """Folder of the artifacts in MLflow."""


@dataclass(frozen=True)
class _Sent:
    """How many bytes of results.jsonl an MLflow run has received."""

    run_id: str
    size: int


def log_results(run_dir: Path, step: int, metrics: Mapping[str, float], files: Sequence[Path], folder: str) -> str:
    """Store metrics and files in the run's folder and add them to its MLflow run.

    Returns an empty string, or the reason why they were not delivered. They are then delivered by the run's next
    attempt or by `realsr-hpc sync-tracking`.

    folder: folder of the artifacts in MLflow.
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
    except Exception as error:  # tracking never stops an evaluation
        lines = str(error).strip().splitlines()
        return f"MLflow is not reachable ({type(error).__name__}: {lines[0][:160] if lines else ''})"
    return ""


def read_results(run_dir: Path) -> list[Results]:
    """All results of a run's evaluations, oldest first; incomplete and damaged lines are skipped."""
    path = runfolder.results(run_dir)
    return _read(path.read_bytes()) if path.exists() else []


def send_results(mlflow: MlflowClient, run_id: str, run_dir: Path) -> int:
    """Send the results that the MLflow run does not have yet; returns the number of values and files sent.

    MLflow's errors propagate.
    """
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
    """Send one file; returns 1, or 0 if it is gone or cannot be sent, which does not stop the others."""
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
    """Send at most METRICS_A_BATCH values. Values that MLflow refuses (from a damaged line) are left out and logged."""
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
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a process was killed while writing
    with path.open("ab") as file:
        file.write(b"\n" * torn + json.dumps(asdict(found)).encode() + b"\n")


def _read(content: bytes) -> list[Results]:
    """The results in complete, valid lines; incomplete and damaged lines are skipped."""
    found: list[Results] = []
    for line in content.splitlines():
        try:
            found.append(parse_json(line, Results))
        except ValueError:
            continue
    return found
