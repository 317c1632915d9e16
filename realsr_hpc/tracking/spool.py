"""The append-only record of a run: events.jsonl in its folder, one JSON object per line.

Events are never rewritten. Resuming from an older checkpoint appends `{"kind": "truncate", "step": k}`, which makes
earlier events of steps after k invalid. An incomplete last line, left by a killed process, is cut off when the spool is
opened again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, TypedDict, cast

from pydantic_core import from_json

from realsr_hpc import runfolder
from realsr_hpc.files import Json, json_value


class MetricsEvent(TypedDict):
    """Metrics of a step."""

    kind: Literal["metrics"]
    step: int
    time_ms: int
    metrics: dict[str, float]


class TruncateEvent(TypedDict):
    """Events before this one of steps after `step` do not count."""

    kind: Literal["truncate"]
    step: int


class ArtifactEvent(TypedDict):
    """A file for MLflow."""

    kind: Literal["artifact"]
    path: str
    folder: str
    """Where it goes among the run's artifacts."""


Event = MetricsEvent | TruncateEvent | ArtifactEvent
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, or a file of the largest size."""
_KINDS: dict[str, dict[str, type]] = {
    "metrics": {"step": int, "time_ms": int, "metrics": dict},
    "truncate": {"step": int},
    "artifact": {"path": str, "folder": str},
}
_NUMBERS = frozenset({float, int})
LARGEST = 2**53
"""Largest valid step and time; only damaged lines have larger ones."""
MOST_FLOAT = 10**308
"""Larger integers cannot be converted to floats."""
logger = logging.getLogger(__name__)


class Spool:
    """Writer of one run's events; one process owns it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = runfolder.events(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.is_new = not self.path.exists()
        _cut_torn_line(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._waiting = b""
        """Events that could not be written yet because the disk is full."""

    def append(self, event: Event) -> None:
        """Write an event; it is on disk when this returns. If the disk is full, it is kept in memory and written with a
        later event."""
        self._waiting += json.dumps(event).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            os.truncate(self.path, self._size)
            logger.error("%s: not written (%s); %d bytes wait", self.path, error.strerror, len(self._waiting))

    def close(self) -> None:
        """Close the file; nothing can be appended afterwards."""
        self._file.close()

    def _write(self) -> None:
        rest = memoryview(self._waiting)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        os.fsync(self._file.fileno())
        self._size += len(self._waiting)
        self._waiting = b""


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Yields the complete events from byte `offset` on, each with the offset after it."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _event(line)
            if event is None:
                logger.warning("%s: the line before byte %d is damaged and left out", path, offset)
            else:
                yield event, offset


def _event(line: bytes) -> Event | None:
    """One event; None for a damaged line, as a disk that lost power can leave."""
    try:
        event = _parsed(line)
    except ValueError:
        return None
    kinds = _KINDS.get(kind) if isinstance(event, dict) and isinstance(kind := event.get("kind"), str) else None
    if kinds is None or not isinstance(event, dict) or any(type(event.get(key)) is not kinds[key] for key in kinds):
        return None
    found = cast("Event", event)  # its values are of the kinds that were asked for
    if found["kind"] != "artifact" and abs(found["step"]) > LARGEST:
        return None
    if found["kind"] == "metrics" and (abs(found["time_ms"]) > LARGEST or not _are_floats(found["metrics"].values())):
        return None
    return found


def _are_floats(values: Collection[object]) -> bool:
    kinds = set(map(type, values))
    return kinds <= _NUMBERS and not (
        int in kinds and any(abs(value) > MOST_FLOAT for value in values if isinstance(value, int))
    )


def _parsed(line: bytes) -> Json:
    """Parse JSON with pydantic_core, which is three times as fast as `json`: boards read hundreds of megabytes.

    `json` also accepts lone surrogates (`\\udc80`), which stand for bytes of file names that are not UTF-8.
    """
    try:
        return from_json(line)
    except ValueError:
        return json_value(line)


def metrics_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics of a run by step, in step order. Truncations are applied; the last value logged for a step counts."""
    steps: dict[int, dict[str, float]] = {}
    for event, _ in read_events(runfolder.events(run_dir)):
        if event["kind"] == "truncate":
            steps = {step: metrics for step, metrics in steps.items() if step <= event["step"]}
        elif event["kind"] == "metrics":
            steps.setdefault(event["step"], {}).update(event["metrics"])
    return dict(sorted(steps.items()))


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
