"""A run in MLflow: created once by the launcher, found again by every later attempt.

mlflow is imported inside the functions: it costs a second or two that planning a run should not pay. Its own
asynchronous logging is left out because it lost events with several writers (delivery.py sends batches itself).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realsr_hpc.config.identity import flatten, signature
from realsr_hpc.config.load import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient

BOOKMARK_NAME = "mlflow.json"
"""In the run folder: which MLflow run it is."""
LAUNCH_TAGS_NAME = "tags.json"
PARAMS_A_BATCH = 100
MAX_PARAM_CHARACTERS = 6000
"""MLflow's limit; what is longer is logged in parts, `key.1`, `key.2`, ..."""
RUN_TAG = "realsr_hpc.run"
SWEEP_TAG = "realsr_hpc.sweep"
PARENT_TAG = "mlflow.parentRunId"


def tracking_uri(config: RunConfig) -> str:
    """The recipe's server, or sqlite in the output root."""
    return config.tracking.uri or f"sqlite:///{output_root(config) / 'mlflow.db'}"


def client(uri: str) -> MlflowClient:
    """A client that fails fast, says nothing and reports to nobody."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def write_launch_tags(run_dir: Path, tags: dict[str, str]) -> None:
    """Tags that the launcher knows and the job will create the MLflow run with."""
    write_atomically(run_dir / LAUNCH_TAGS_NAME, json.dumps(tags))


def prepare_run(config: RunConfig, run_dir: Path) -> str:
    """MLflow run id of `run_dir`, created with its parameters and the launcher's tags when there is none.

    Safe to call again: the bookmark in the folder, then the run's tag, are looked up first. Any error of MLflow or of
    the server passes through.
    """
    known = read_bookmark(run_dir)
    if known:
        return known["run_id"]
    uri = tracking_uri(config)
    mlflow = client(uri)
    experiment = _experiment(mlflow, config)
    run_id = _find(mlflow, experiment, RUN_TAG, str(run_dir))
    run_id = run_id or _create(mlflow, experiment, run_dir.name, _tags(config, run_dir))
    _log_params(mlflow, run_id, config)
    write_atomically(run_dir / BOOKMARK_NAME, json.dumps({"uri": uri, "run_id": run_id}))
    return run_id


def prepare_store(config: RunConfig) -> None:
    """Create database and experiment before any job does: jobs that do it at the same moment kill each other."""
    _experiment(client(tracking_uri(config)), config)


def prepare_sweep(config: RunConfig, sweep: str) -> str:
    """MLflow run id of a sweep's parent, created when there is none."""
    mlflow = client(tracking_uri(config))
    experiment = _experiment(mlflow, config)
    found = _find(mlflow, experiment, SWEEP_TAG, sweep, extra="tags.`realsr_hpc.kind` = 'sweep'")
    note = config.tracking.description or f"Compare its runs: `python tools/compare.py sweep={sweep}`"
    tags = {SWEEP_TAG: sweep, "realsr_hpc.kind": "sweep", "mlflow.note.content": note}
    return found or _create(mlflow, experiment, sweep, tags)


def read_bookmark(run_dir: Path) -> dict[str, str] | None:
    """`uri` and `run_id` of a run folder; None before it has an MLflow run."""
    path = run_dir / BOOKMARK_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def set_status(run_dir: Path, status: str) -> None:
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED, as the job's end or the scheduler says."""
    bookmark = read_bookmark(run_dir)
    if bookmark is None:
        return
    mlflow = client(bookmark["uri"])
    if status in ("RUNNING", "SCHEDULED"):
        mlflow.update_run(bookmark["run_id"], status=status)
    else:
        mlflow.set_terminated(bookmark["run_id"], status=status)


def _experiment(mlflow: MlflowClient, config: RunConfig) -> str:
    found = mlflow.get_experiment_by_name(config.tracking.experiment)
    if found is not None:
        return found.experiment_id
    local = config.tracking.uri is None
    location = (output_root(config) / "mlartifacts").as_uri() if local else None
    return mlflow.create_experiment(config.tracking.experiment, artifact_location=location)


def _find(mlflow: MlflowClient, experiment: str, tag: str, value: str, extra: str = "") -> str | None:
    condition = f"tags.`{tag}` = '{value}'" + (f" and {extra}" if extra else "")
    runs = mlflow.search_runs([experiment], filter_string=condition, max_results=1)
    return runs[0].info.run_id if runs else None


def _create(mlflow: MlflowClient, experiment: str, name: str, tags: dict[str, str]) -> str:
    return mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id


def _tags(config: RunConfig, run_dir: Path) -> dict[str, str]:
    launch_tags = run_dir / LAUNCH_TAGS_NAME
    return {
        RUN_TAG: str(run_dir),
        "realsr_hpc.recipe": config.name,
        "realsr_hpc.task": config.task,
        "realsr_hpc.signature": signature(config),
        "mlflow.note.content": config.tracking.description or _describe(config, run_dir),
        **config.tracking.tags,
        **(json.loads(launch_tags.read_text(encoding="utf-8")) if launch_tags.exists() else {}),
    }


def _describe(config: RunConfig, run_dir: Path) -> str:
    """What a person who meets the run in MLflow wants to know first (Markdown)."""
    profile = f", profile {config.tracking.tags['profile']}" if "profile" in config.tracking.tags else ""
    return (
        f"Recipe `{config.name}` ({config.task}){profile}, seed {config.seed}; folder `{run_dir}`\n\n"
        f"- images, words and rewards: `python tools/gallery.py run={run_dir}`\n"
        f"- metrics: `python tools/evaluate.py run={run_dir}`"
    )


def _log_params(mlflow: MlflowClient, run_id: str, config: RunConfig) -> None:
    """In batches below MLflow's limits."""
    from mlflow.entities import Param

    params = [Param(key, text) for name, value in flatten(config).items() for key, text in _in_parts(name, value)]
    for start in range(0, len(params), PARAMS_A_BATCH):
        mlflow.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])


def _in_parts(name: str, value: Any) -> list[tuple[str, str]]:
    text = value if isinstance(value, str) else json.dumps(value)
    parts = [text[start : start + MAX_PARAM_CHARACTERS] for start in range(0, len(text), MAX_PARAM_CHARACTERS)]
    return [(name, text)] if len(parts) <= 1 else [(f"{name}.{number}", part) for number, part in enumerate(parts, 1)]
