"""Numbers and files that come after a run: an evaluation's, into the run's own MLflow entry."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from realsr_hpc.tracking.database import client
from realsr_hpc.tracking.delivery import METRICS_A_BATCH, brief
from realsr_hpc.tracking.place import recipe_of
from realsr_hpc.tracking.store import prepare_run, read_bookmark, tracking_uri


def log_results(run_dir: Path, step: int, metrics: Mapping[str, float], files: Sequence[Path], folder: str) -> str:
    """Add metrics and files to the MLflow run of `run_dir`; why it could not be, else nothing.

    Not through the spool: that has one writer, which may still be training.
    """
    if read_bookmark(run_dir) is None:
        return f"{run_dir} has no MLflow run"
    try:
        from mlflow.entities import Metric

        config = recipe_of(run_dir)
        run_id = prepare_run(config, run_dir)
        mlflow, now = client(tracking_uri(config)), int(time.time() * 1000)
        values = [Metric(key, value, now, step) for key, value in metrics.items()]
        for start in range(0, len(values), METRICS_A_BATCH):
            mlflow.log_batch(run_id, metrics=values[start : start + METRICS_A_BATCH])
        for file in files:
            mlflow.log_artifact(run_id, str(file), folder)
    except Exception as error:  # tracking never stops what is tracked
        return f"MLflow is not reachable ({brief(error)})"
    return ""
