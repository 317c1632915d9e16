"""Append-only record of a run: events.jsonl in its folder, one JSON object a line.

Events are never rewritten. Resuming from an older checkpoint appends `{"kind": "truncate", "step": k}`: what was logged
for later steps before that line no longer holds. A line torn by a kill is cut off when the spool is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
SPOOL_NAME = "events.jsonl"


class Spool:
    """Writer of one run's events; one process owns it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / SPOOL_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("ab")

    def append(self, event: Event) -> None:
        """On disk when this returns."""
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Further appends are errors."""
        self._file.close()


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Whole events from byte `offset` on, each with the offset behind it; a torn last line is left alone."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def metrics_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """What holds of a run's metrics, truncations applied and the last value of a step kept, in step order."""
    steps: dict[int, dict[str, float]] = {}
    for event, _ in read_events(run_dir / SPOOL_NAME):
        if event["kind"] == "truncate":
            steps = {step: metrics for step, metrics in steps.items() if step <= event["step"]}
        elif event["kind"] == "metrics":
            steps.setdefault(event["step"], {}).update(event["metrics"])
    return dict(sorted(steps.items()))


def write_atomically(path: Path, text: str) -> None:
    """The old content or the new, never a part of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
