# pyright: strict, reportUnknownMemberType=false
"""Opens MLflow's store. sqlite databases are created here too: atomically, private, by one process at a time."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc.locks import hold

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAKING_WAIT_S = 120.0
"""Longest wait for another process that creates or migrates the database: seconds, on a slow disk longer."""
SQLITE = "sqlite:///"
_opened: set[tuple[int, str]] = set()
"""Process id and URI of databases that were opened; later clients of the same process need no lock."""


def client(uri: str) -> MlflowClient:
    """An MLflow client with short time-outs, without log messages and without telemetry.

    Raises:
        LockRefused: if another process has been creating the database for longer than MAKING_WAIT_S.
        ValueError: if the database is damaged.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's default of 7 takes minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri)
    path = Path(uri.removeprefix(SQLITE))
    if (os.getpid(), uri) in _opened and path.exists():
        return MlflowClient(tracking_uri=uri)
    return _open(path, uri)


def _open(path: Path, uri: str) -> MlflowClient:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), "opening MLflow's database", MAKING_WAIT_S):
        try:
            if not path.exists() or not path.stat().st_size:
                _make(path)
            opened = MlflowClient(tracking_uri=uri)
        except (SQLAlchemyError, MlflowException) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ValueError(
                f"{path} cannot be opened ({reason}); if it is damaged, move it away: realsr-hpc sync-tracking "
                "makes it again from the runs' own events"
            ) from error
    _opened.add((os.getpid(), uri))
    return opened


def _make(path: Path) -> None:
    """Create the schema in a file of another name, then rename it: a killed process leaves no partial database."""
    from mlflow import MlflowClient

    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL, 0o600))  # sqlite gives its side files the same mode
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{aside}").search_experiments(max_results=1)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def move_artifacts(path: Path, before: str, now: str) -> None:
    """Update the artifact paths in a database that was moved together with them; MLflow stores absolute paths."""
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                (now, len(before) + 1, len(before), before),
            )
