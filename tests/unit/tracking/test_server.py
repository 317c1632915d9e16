"""Many writers, and a real MLflow server on PostgreSQL that goes away and comes back."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import Tracker, prepare_store, read_bookmark, sync
from realsr_hpc.tracking.database import client
from tests.mlflow_server import Server, running

RUNS, STEPS = 32, 40
KEYS = ("rewards/total/mean", "grpo/kl_reference/mean")


def make_run(root: Path, name: str, uri: str | None = None) -> tuple[RunConfig, Path]:
    tree = {"name": name, "task": "grpo", "output_root": str(root), "tracking": {"uri": uri}}
    config = RunConfig.model_validate(tree)
    (root / name).mkdir()
    (root / name / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return config, root / name


def history(run_dir: Path, key: str) -> list[tuple[int, float]]:
    bookmark = read_bookmark(run_dir)
    assert bookmark is not None
    points = client(bookmark["uri"]).get_metric_history(bookmark["run_id"], key)
    return sorted((point.step, point.value) for point in points)


def log_a_run(config: RunConfig, run_dir: Path, first: int, last: int) -> None:
    tracker = Tracker.open(config, run_dir, writer=True)
    for step in range(first, last + 1):
        tracker.log_metrics(step, {key: step + 0.5 for key in KEYS})
    tracker.close()


@pytest.mark.timeout(600)
def test_32_runs_at_once_on_one_sqlite_file_lose_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"run-{number}") for number in range(RUNS)]
    prepare_store(runs[0][0])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "realsr_hpc.tracking"])
    writers = [context.Process(target=log_a_run, args=(*run, 1, STEPS)) for run in runs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for _, run_dir in runs:
        sync(run_dir)  # what a writer did not get through in time waits in its spool
        assert all(history(run_dir, key) == [(step, step + 0.5) for step in range(1, STEPS + 1)] for key in KEYS)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server") / "mlflow") as server:
        yield server


@pytest.mark.postgresql
@pytest.mark.timeout(600)
def test_a_server_that_was_away_gets_everything_once(
    mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, run_dir = make_run(tmp_path, "away", mlflow_server.uri)
    log_a_run(config, run_dir, 1, 5)
    mlflow_server.kill()
    log_a_run(config, run_dir, 6, 9)
    (run_dir / "delivered.json").unlink()  # as if it had died between MLflow's commit and its own note
    mlflow_server.up()
    (run_dir / "picture.txt").write_text("seen")
    tracker = Tracker.open(config, run_dir, writer=True)
    tracker.log_artifact(run_dir / "picture.txt", "samples")
    tracker.close()
    assert sync(run_dir) == 0
    assert history(run_dir, KEYS[0]) == [(step, step + 0.5) for step in range(1, 10)]
    files = client(mlflow_server.uri).list_artifacts(tracker.run_id)
    assert sorted(file.path for file in files) == ["launch", "samples"]


@pytest.mark.postgresql
def test_server_and_database_listen_on_loopback_alone_and_keep_their_password(mlflow_server: Server) -> None:
    ports = (mlflow_server.port, mlflow_server.port + 1)
    heard = [place.laddr for place in psutil.net_connections("tcp") if place.status == "LISTEN"]
    assert {(place.ip, place.port) for place in heard if place.port in ports} == {("127.0.0.1", port) for port in ports}
    assert mlflow_server.root.stat().st_mode & 0o077 == 0
    assert (mlflow_server.root / "pgpass").stat().st_mode & 0o077 == 0
