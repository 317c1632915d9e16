"""The tracking interface of a training loop: metrics, artifacts, progress.

Calls write to the run's spool and return; a thread delivers to MLflow. A slow or unreachable server therefore does not
delay training, and `sync` sends later what did not arrive.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from realsr_hpc import runfolder
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.tracking.database import client
from realsr_hpc.tracking.delivery import Delivery, DeliveryThread, brief
from realsr_hpc.tracking.place import recipe_of
from realsr_hpc.tracking.spool import Spool
from realsr_hpc.tracking.store import read_bookmark, set_status, tracking_uri

LAUNCH_FILES = (runfolder.recipe, runfolder.plan, runfolder.environment)
"""Files that the launcher wrote to the run folder; they are logged once, under `launch/`."""
INTERVAL_S = 2.0
CLOSE_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


class Tracker:
    """Tracker of one run. With writer=False (on all ranks but one) every call does nothing."""

    def __init__(self, config: RunConfig, run_dir: Path, *, writer: bool) -> None:
        self.config = config
        self.run_dir = run_dir
        self._spool = Spool(run_dir) if writer else None
        self._thread = DeliveryThread(config, run_dir, INTERVAL_S) if writer else None

    @classmethod
    def open(cls, config: RunConfig, run_dir: Path, *, writer: bool) -> Tracker:
        """The tracker of `run_dir`. Its MLflow run is found or created in the background."""
        tracker = cls(config, run_dir, writer=writer)
        if tracker._spool is not None and tracker._spool.is_new:
            for path in (file(run_dir) for file in LAUNCH_FILES):
                if path.exists():
                    tracker.log_artifact(path, "launch")
        if tracker._thread is not None:
            try:
                # Imports MLflow in this thread, because importing it in two threads at once fails.
                client(tracking_uri(config))
            except Exception as error:  # tracking never stops training
                logger.warning("tracking: %s; events are kept in %s", brief(error), run_dir)
            tracker._thread.start()
        return tracker

    @property
    def run_id(self) -> str:
        """MLflow run id; empty until MLflow has been reached."""
        return (read_bookmark(self.run_dir) or {}).get("run_id", "")

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log values of one step, with keys `room/quantity/reduction`; they are on disk when this returns."""
        if self._spool is not None and metrics:
            numbers = {key: float(value) for key, value in metrics.items()}
            self._spool.append({"kind": "metrics", "step": step, "time_ms": _now_ms(), "metrics": numbers})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file, which stays where it is; MLflow gets a copy under `folder`."""
        if self._spool is not None:
            self._spool.append({"kind": "artifact", "path": str(path.resolve()), "folder": folder})

    def progress(self, step: int, total: int, text: str) -> None:
        """Write the run's progress for `jobs` and `follow`. The watchdog uses it to detect a hang."""
        if self._spool is not None:
            state = Progress(step, total, text, _now_ms())
            try:
                write_atomically(runfolder.progress(self.run_dir), json.dumps(asdict(state)))
            except OSError as error:  # a full disk; the next step tries again
                logger.error("tracking: progress not written (%s)", error.strerror)

    def truncate(self, step: int) -> None:
        """After a resume from `step`: mark everything logged for later steps as invalid."""
        if self._spool is not None:
            self._spool.append({"kind": "truncate", "step": step})

    def close(self, status: str = "FINISHED") -> None:
        """Deliver the rest and set the MLflow run's status; `sync` sends later what cannot be delivered now."""
        if self._spool is None or self._thread is None:
            return
        self._spool.close()
        if not self._thread.finish(CLOSE_TIMEOUT_S):
            return
        try:
            set_status(self.run_dir, status)
        except Exception as error:  # tracking never stops training
            logger.warning("tracking: status %s not delivered (%s)", status, brief(error))


def sync(run_dir: Path) -> int:
    """Send everything in a run's folder that MLflow does not have; returns the number of values and artifacts sent.

    Raises RecipeError if recipe.yaml is missing or invalid. MLflow's errors propagate.
    """
    delivery = Delivery(recipe_of(run_dir), run_dir)
    return delivery.send_pending() + delivery.num_results


Count = Annotated[int, Field(ge=0, le=10**15)]
"""Steps and times in progress.json; larger numbers come from a damaged file."""


@dataclass(frozen=True)
class Progress:
    """progress.json: the last completed step of a run, with a line of text and its Unix time in milliseconds."""

    step: Count
    total: Count = 0
    text: str = ""
    time_ms: Count = 0


def read_progress(run_dir: Path) -> Progress | None:
    """The run's progress; None before its first step."""
    return read_json(runfolder.progress(run_dir), Progress)


def _now_ms() -> int:
    return int(time.time() * 1000)
