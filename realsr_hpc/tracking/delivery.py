"""Delivers the spool to MLflow: in batches, in order, each (metric, step) once.

`delivered.json` has two byte offsets of the spool: up to where it has arrived, and up to where a batch is being sent.
If the process is killed between MLflow's commit and the update of that file, exactly the same batch is sent again,
whatever was appended since. Nothing is stored twice, because MLflow ignores a metric with the same key, step, time and
value, and times come from the spool. A step that is logged again after a resume is sent only if it had not arrived
before. The offsets belong to one MLflow run: another store, or one that was emptied, gets everything that it does not
have from the start.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc import runfolder
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import first_line, read_json, write_atomically
from realsr_hpc.tracking.database import client
from realsr_hpc.tracking.results import METRICS_A_BATCH, send_file, send_metrics, send_results
from realsr_hpc.tracking.spool import Event, MetricsEvent, read_events
from realsr_hpc.tracking.store import prepare_run, set_status, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Noted:
    """delivered.json: byte offsets of the spool, up to where events have arrived and up to where they are sent."""

    offset: int = 0
    sending: int = 0
    run_id: str = ""


class Delivery:
    """Sends the events of one run's spool that MLflow does not have yet."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self._spool = runfolder.events(run_dir)
        self._noted = _read_offsets(run_dir)
        self._run_id = ""
        """MLflow's run id; empty before the first use and after an error, so that it is looked up again."""
        self._arrived: set[tuple[str, int]] = set()
        self.num_results = 0
        """Values and files of evaluations sent so far."""

    def open(self) -> str:
        """MLflow run id of this run in the recipe's store; the MLflow run is created if necessary."""
        run_id = prepare_run(self.config, self.run_dir)
        if self._noted.run_id not in ("", run_id) or self._noted.offset > _size(self._spool):
            self._noted = _Noted()
        if self._noted.offset == 0:
            self._arrived = _arrived_at(client(tracking_uri(self.config)), run_id)
        else:
            events = [event for event, end in read_events(self._spool) if end <= self._noted.offset]
            sent = [event for event in events if event["kind"] == "metrics"]
            self._arrived = {(key, event["step"]) for event in sent for key in event["metrics"]}
        self._run_id = run_id
        self.num_results += send_results(client(tracking_uri(self.config)), run_id, self.run_dir)
        return run_id

    def send_pending(self) -> int:
        """Send the pending events; returns the number of values and artifacts sent. MLflow's errors propagate."""
        try:
            return self._send_pending(self._run_id or self.open())
        except Exception:
            self._run_id = ""
            raise

    def _send_pending(self, run_id: str) -> int:
        sent, mlflow = 0, client(tracking_uri(self.config))
        while pending := self._next_batch():
            self._note(self._noted.offset, pending[-1][1])
            sent += self._send_metrics(mlflow, run_id, [event for event, _ in pending])
            for event, _ in pending:
                if event["kind"] == "artifact":
                    sent += send_file(mlflow, run_id, Path(event["path"]), event["folder"], self.run_dir)
            self._note(pending[-1][1], pending[-1][1])
        return sent

    def _next_batch(self) -> list[tuple[Event, int]]:
        """The batch that was being sent and may have arrived, else all new events; each with the offset after it."""
        events = list(read_events(self._spool, self._noted.offset))
        begun = [(event, end) for event, end in events if end <= self._noted.sending]
        return begun if self._noted.sending > self._noted.offset and begun else events

    def _note(self, offset: int, sending: int) -> None:
        noted = _Noted(offset, sending, self._run_id)
        write_atomically(runfolder.delivered(self.run_dir), json.dumps(asdict(noted)))
        self._noted = noted

    def _send_metrics(self, mlflow: MlflowClient, run_id: str, events: list[Event]) -> int:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        for event in _without_truncated(events):
            for key, value in event["metrics"].items():
                if (key, event["step"]) not in self._arrived:
                    self._arrived.add((key, event["step"]))
                    metrics.append(Metric(key, value, event["time_ms"], event["step"]))
        try:
            for start in range(0, len(metrics), METRICS_A_BATCH):
                send_metrics(mlflow, run_id, metrics[start : start + METRICS_A_BATCH])
        except Exception:
            self._arrived.difference_update((metric.key, metric.step) for metric in metrics)
            raise
        return len(metrics)


class DeliveryThread(threading.Thread):
    """Opens the MLflow run and delivers to it in the background. An unreachable server is retried at growing
    intervals."""

    def __init__(self, config: RunConfig, run_dir: Path, interval_s: float) -> None:
        super().__init__(name="tracking", daemon=True)
        self._delivery = Delivery(config, run_dir)
        self._interval_s = interval_s
        self._end = threading.Event()
        self._is_open = False

    def run(self) -> None:
        """Deliver repeatedly until `finish` is called, then once more."""
        wait_s = 0.0
        while not self._end.wait(wait_s):
            wait_s = self._interval_s if self._try() else min(LAST_RETRY_S, max(FIRST_RETRY_S, 2 * wait_s))
        self._try()

    def finish(self, timeout_s: float) -> bool:
        """Deliver the rest; returns whether everything arrived within `timeout_s`. If not, `realsr-hpc sync-tracking`
        sends the rest later."""
        self._end.set()
        self.join(timeout_s)
        return not self.is_alive()

    def _try(self) -> bool:
        try:
            if not self._is_open:
                self._delivery.open()
                set_status(self._delivery.run_dir, "RUNNING")
                self._is_open = True
            self._delivery.send_pending()
        except Exception as error:  # tracking never stops training; the spool keeps the events
            logger.warning("tracking: not delivered (%s); kept in %s", brief(error), self._delivery.run_dir)
            return False
        return True


def _without_truncated(events: list[Event]) -> list[MetricsEvent]:
    kept: list[MetricsEvent] = []
    for event in events:
        if event["kind"] == "truncate":
            kept = [earlier for earlier in kept if earlier["step"] <= event["step"]]
        elif event["kind"] == "metrics":
            kept.append(event)
    return kept


def _read_offsets(run_dir: Path) -> _Noted:
    return read_json(runfolder.delivered(run_dir), _Noted) or _Noted()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _arrived_at(mlflow: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    """Metric and step of every value that an MLflow run already has."""
    keys = mlflow.get_run(run_id).data.metrics
    return {(key, point.step) for key in keys for point in mlflow.get_metric_history(run_id, key)}


def brief(error: Exception) -> str:
    """An error's type and the first line of its message, at most 160 characters of it."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line[:160]}"
