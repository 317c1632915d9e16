"""A run in MLflow: created once by the launcher, found again by every later attempt, created again if it was removed.

The run's folder is authoritative: the store that the recipe names gets everything in its spool. The bookmark in the
folder only records where it was delivered last. mlflow is imported inside the functions, because the import takes a
second or two. Its asynchronous logging is not used, because it lost events with several writers; delivery.py sends
batches.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc import runfolder
from realsr_hpc.config.identity import flatten, signature
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import parse_json, printable, read_json, write_atomically
from realsr_hpc.locks import hold
from realsr_hpc.tracking.database import MAKING_WAIT_S, SQLITE, client, move_artifacts
from realsr_hpc.tracking.place import read_place

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAMS_A_BATCH = 100
MAX_PARAM_CHARACTERS = 6000
"""MLflow's limit. Longer values are logged in parts: `key.1`, `key.2`, ..."""
RUN_TAG = "realsr_hpc.run"
SWEEP_TAG = "realsr_hpc.sweep"
VARIED_TAG = "realsr_hpc.varied"
PARENT_TAG = "mlflow.parentRunId"


def tracking_uri(config: RunConfig) -> str:
    """The URI of the recipe's MLflow store; by default a sqlite database in the output root."""
    return config.tracking.uri or f"sqlite:///{output_root(config) / 'mlflow.db'}"


def compare_command(config: RunConfig, sweep: str) -> str:
    """The shell command that compares a sweep's runs."""
    root, tracking = output_root(config), config.tracking
    words = {"sweep": sweep, "root": root, "uri": tracking.uri, "experiment": tracking.experiment}
    usual = {"root": runfolder.usual_root(), "experiment": type(tracking)().experiment}
    given = [f"{key}={value}" for key, value in words.items() if value is not None and value != usual.get(key)]
    return shlex.join(["realsr-hpc", "compare", *given])


def write_launch_tags(run_dir: Path, tags: dict[str, str]) -> None:
    """Store tags that only the launcher knows; the job creates the MLflow run with them."""
    write_atomically(runfolder.launch_tags(run_dir), json.dumps(tags))


def sweep_of(run_dir: Path) -> str:
    """The sweep or chain that a run was last launched in; empty for a single run."""
    return sweep_tags(run_dir).get(SWEEP_TAG, "")


def sweep_tags(run_dir: Path) -> dict[str, str]:
    """Tags with the sweep that a run was last launched in, and the run's values of the swept keys."""
    return {key: value for key, value in _launch_tags(run_dir).items() if key in (SWEEP_TAG, VARIED_TAG)}


def _launch_tags(run_dir: Path) -> dict[str, str]:
    return read_json(runfolder.launch_tags(run_dir), dict[str, str]) or {}


def prepare_run(config: RunConfig, run_dir: Path) -> str:
    """MLflow run id of `run_dir` in the recipe's store; the run is created with parameters and tags if necessary.

    An existing run is found by the bookmark in the folder, else by its tag. It is restored if it was deleted in MLflow,
    and its description and tags are updated if those of the recipe changed. MLflow cannot move a run to another
    experiment, so if `tracking.experiment` changed, the run is created again there. MLflow's errors propagate.
    """
    uri = tracking_uri(config)
    with hold(runfolder.mlflow_lock(run_dir), "opening the MLflow run", MAKING_WAIT_S):
        mlflow, known = client(uri), read_bookmark(run_dir)
        run_id = _restored(mlflow, known["run_id"]) if known else None
        left = run_id if run_id and known and _is_elsewhere(mlflow, run_id, known, config) else None
        if known and run_id and not left:
            _retell(mlflow, run_id, known, config, run_dir)
            if known["uri"] != uri:
                _experiment(mlflow, config)  # the store was moved, and its artifacts with it
                mlflow.set_tag(run_id, RUN_TAG, printable(run_dir))
        else:
            experiment = _experiment(mlflow, config)
            run_id = _find_run(mlflow, experiment, run_dir)
            run_id = run_id or _create(mlflow, experiment, run_dir.name, _tags(config, run_dir))
            _log_params(mlflow, run_id, config)
        if left:
            mlflow.set_tag(left, "realsr_hpc.goes_on_in", f"experiment {config.tracking.experiment}, run {run_id}")
            mlflow.set_terminated(left, status="KILLED")
        told = {"experiment": config.tracking.experiment, "told": _told(config)}
        if known != (bookmark := {"uri": uri, "run_id": run_id, **told}):
            write_atomically(runfolder.mlflow(run_dir), json.dumps(bookmark))
    return run_id


def prepare_store(config: RunConfig) -> None:
    """Create database and experiment before any job starts, because jobs that create them simultaneously fail."""
    _experiment(client(tracking_uri(config)), config)


def prepare_sweep(config: RunConfig, sweep: str) -> str:
    """MLflow run id of a sweep's parent run, which is created if necessary."""
    mlflow = client(tracking_uri(config))
    (root := output_root(config)).mkdir(parents=True, exist_ok=True)
    with hold(root / ".mlflow-sweeps.lock", f"opening sweep {sweep}", MAKING_WAIT_S):
        experiment = _experiment(mlflow, config)
        found = _find(mlflow, experiment, SWEEP_TAG, sweep, extra="tags.`realsr_hpc.kind` = 'sweep'")
        note = config.tracking.description or f"Compare its runs: `{compare_command(config, sweep)}`"
        tags = {SWEEP_TAG: sweep, "realsr_hpc.kind": "sweep", "mlflow.note.content": note}
        return found or _create(mlflow, experiment, sweep, tags)


def read_bookmark(run_dir: Path) -> dict[str, str] | None:
    """`uri` and `run_id` of a run folder's MLflow run, and the description and tags sent last; None without a run."""
    known = read_json(runfolder.mlflow(run_dir), dict[str, str])
    return known if known and {"uri", "run_id"} <= known.keys() else None


def set_status(run_dir: Path, status: str) -> None:
    """Set the MLflow status of a run, if it has an MLflow run: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED.

    Raises ValueError if its sqlite store is gone; it is not created again.
    """
    bookmark = read_bookmark(run_dir)
    if bookmark is None:
        return
    uri = bookmark["uri"]
    if uri.startswith(SQLITE) and not os.path.exists(uri.removeprefix(SQLITE)):
        raise ValueError(f"{uri} is gone; realsr-hpc sync-tracking tells the store that is there now")
    mlflow = client(uri)
    if status in ("RUNNING", "SCHEDULED"):
        mlflow.update_run(bookmark["run_id"], status=status)
    else:
        mlflow.set_terminated(bookmark["run_id"], status=status)


def _restored(mlflow: MlflowClient, run_id: str) -> str | None:
    """The run's id if the store has it, after restoring it if it was deleted there; None if the store never had it."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        # Invalid: a damaged bookmark, or another server's way of writing ids.
        if error.error_code in map(ErrorCode.Name, (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)):
            return None
        raise
    if (experiment := mlflow.get_experiment(run.info.experiment_id)).lifecycle_stage == "deleted":
        mlflow.restore_experiment(experiment.experiment_id)
    if mlflow.get_run(run_id).info.lifecycle_stage == "deleted":
        mlflow.restore_run(run_id)
    return run_id


def _is_elsewhere(mlflow: MlflowClient, run_id: str, known: dict[str, str], config: RunConfig) -> bool:
    """Whether the recipe named another experiment when the run was opened last; one renamed in MLflow is none."""
    before = known.get("experiment")
    if before is None:  # opened by an earlier version
        before = mlflow.get_experiment(mlflow.get_run(run_id).info.experiment_id).name
    return before != config.tracking.experiment


def _told(config: RunConfig) -> str:
    return json.dumps([config.tracking.description, config.tracking.tags])


def _retell(mlflow: MlflowClient, run_id: str, known: dict[str, str], config: RunConfig, run_dir: Path) -> None:
    """Update description and tags if those of the recipe changed; what users wrote in MLflow is kept."""
    if known.get("told", _told(config)) == _told(config):
        return
    try:
        description, tags = parse_json(known["told"].encode(), tuple[str, dict[str, str]])
    except ValueError:  # a damaged bookmark: as if nothing had been told
        description, tags = "", {}
    new = {name: value for name, value in config.tracking.tags.items() if tags.get(name) != value}
    if description != config.tracking.description:
        new["mlflow.note.content"] = config.tracking.description or _describe(config, run_dir)
    for name, value in new.items():
        mlflow.set_tag(run_id, printable(name), printable(value))
    there = mlflow.get_run(run_id).data.tags
    for name in [name for name in tags if name not in config.tracking.tags and there.get(name) == tags[name]]:
        mlflow.delete_tag(run_id, name)


def _experiment(mlflow: MlflowClient, config: RunConfig) -> str:
    """Id of the recipe's experiment, which is created, restored, or given its present artifact folder if necessary."""
    own = tracking_uri(config).startswith(SQLITE)
    database = Path(tracking_uri(config).removeprefix(SQLITE))
    artifacts = database.parent / "mlartifacts"
    if own:  # MLflow's own default is the current folder
        artifacts.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = mlflow.get_experiment_by_name(config.tracking.experiment)
    if found is None:
        return _make_experiment(mlflow, config.tracking.experiment, artifacts.as_uri() if own else None)
    if found.lifecycle_stage == "deleted":
        mlflow.restore_experiment(found.experiment_id)
    if own and found.artifact_location != artifacts.as_uri() and found.artifact_location.endswith("/mlartifacts"):
        move_artifacts(database, found.artifact_location, artifacts.as_uri())
    return found.experiment_id


def _make_experiment(mlflow: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.create_experiment(name, artifact_location=location)
    except MlflowException:
        if (found := mlflow.get_experiment_by_name(name)) is None:  # no other process has created it meanwhile
            raise
        return found.experiment_id


def _find_run(mlflow: MlflowClient, experiment: str, run_dir: Path) -> str | None:
    """MLflow run id found by the tag with the run's folder, the present one or the one at launch."""
    place = read_place(run_dir)
    folders: dict[str, None] = dict.fromkeys(map(printable, [run_dir, *([place.folder] if place else [])]))
    found = (_find(mlflow, experiment, RUN_TAG, folder) for folder in folders)
    return next((run_id for run_id in found if run_id), None)


def _find(mlflow: MlflowClient, experiment: str, tag: str, value: str, extra: str = "") -> str | None:
    condition = f"tags.`{tag}` = {quoted(value)}" + (f" and {extra}" if extra else "")
    runs = mlflow.search_runs([experiment], filter_string=condition, max_results=1)
    return runs[0].info.run_id if runs else None


def quoted(text: str) -> str:
    """The text in quotes for MLflow's filter language, which has two kinds of quotes and no escapes. ValueError if the
    text contains both."""
    mark = '"' if "'" in text else "'"
    if mark in text:
        raise ValueError(f"{text!r}: holds both kinds of quotation marks, which MLflow cannot search for; rename it")
    return f"{mark}{text}{mark}"


def _create(mlflow: MlflowClient, experiment: str, name: str, tags: dict[str, str]) -> str:
    return mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id


def _tags(config: RunConfig, run_dir: Path) -> dict[str, str]:
    launched = _launch_tags(run_dir)
    # Run ids differ between stores, so the parent is found, or created, by the sweep's name.
    parent = {PARENT_TAG: prepare_sweep(config, launched[SWEEP_TAG])} if SWEEP_TAG in launched else {}
    found = {
        RUN_TAG: str(run_dir),
        "realsr_hpc.recipe": config.name,
        "realsr_hpc.task": config.task,
        "realsr_hpc.signature": signature(config),
        "mlflow.note.content": config.tracking.description or _describe(config, run_dir),
        **config.tracking.tags,
        **launched,
        **parent,
    }
    return {printable(name): printable(value) for name, value in found.items()}  # no store takes half characters


def _describe(config: RunConfig, run_dir: Path) -> str:
    """The run's description in MLflow (Markdown)."""
    run = shlex.quote(f"run={run_dir}")
    profile = f", profile {config.tracking.tags['profile']}" if "profile" in config.tracking.tags else ""
    return (
        f"Recipe `{config.name}` ({config.task}){profile}, seed {config.seed}; folder `{run_dir}`\n\n"
        f"- images, words and rewards: `realsr-hpc gallery {run}`\n"
        f"- metrics: `realsr-hpc evaluate {run}`"
    )


def _log_params(mlflow: MlflowClient, run_id: str, config: RunConfig) -> None:
    """Log the recipe's fields as parameters, in batches below MLflow's limits.

    Parameters that the run has stay as they are, because MLflow refuses to change one: a run that was moved, and whose
    bookmark was lost, has another output root.
    """
    from mlflow.entities import Param

    texts = dict(part for name, value in flatten(config).items() for part in _in_parts(name, value))
    there = mlflow.get_run(run_id).data.params
    params = [Param(key, text) for key, text in texts.items() if key not in there]
    for start in range(0, len(params), PARAMS_A_BATCH):
        mlflow.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])


def _in_parts(name: str, value: object) -> list[tuple[str, str]]:
    name, text = printable(name), printable(value) if isinstance(value, str) else json.dumps(value)
    parts = [text[start : start + MAX_PARAM_CHARACTERS] for start in range(0, len(text), MAX_PARAM_CHARACTERS)]
    return [(name, text)] if len(parts) <= 1 else [(f"{name}.{number}", part) for number, part in enumerate(parts, 1)]
