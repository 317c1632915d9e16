"""What a run has reported so far, read on from where the last look ended: cheap for hundreds of runs."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path

from realsr_hpc.tracking.spool import SPOOL_NAME, read_events

SHOWN = ("rewards/total/mean", "sft/loss/mean", "tokenizer/loss/step")
"""What a run of each task is watched by, the first that it reports."""
RECENT = 40


class Feed:
    """Last values and recent history of one run's metrics; `read` takes in what is new in events.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / SPOOL_NAME
        self._begin()

    def _begin(self) -> None:
        self.offset = 0
        """Bytes read so far."""
        self.last: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        """Largest value of each `system/` metric."""
        self.step = 0
        self.step_s: deque[float] = deque(maxlen=RECENT)
        """Measured time of the recent steps, seconds: the sum of a step's `time/.../s`."""
        self.computed_s = 0.0
        """Of all steps, those done again after a resume included."""
        self.history: deque[tuple[int, float]] = deque(maxlen=RECENT)
        """Recent steps with the value that the run is watched by."""

    @property
    def watched(self) -> str:
        """Name of the metric in `history`; empty before the first step."""
        return next((name for name in SHOWN if name in self.last), "")

    @property
    def median_step_s(self) -> float | None:
        """None before the first step."""
        return statistics.median(self.step_s) if self.step_s else None

    def read(self) -> int:
        """Take in the new events; the number of bytes that were read. A line still being written waits."""
        before = self.offset
        if self.path.exists() and self.path.stat().st_size < self.offset:
            self._begin()  # another file of that name
            before = 0
        for event, offset in read_events(self.path, self.offset):
            self.offset = offset
            if event["kind"] == "truncate":
                self.step = min(self.step, max(event["step"], 0))
                while self.history and self.history[-1][0] > event["step"]:
                    self.history.pop()
            elif event["kind"] == "metrics":
                self._take(event["step"], event["metrics"])
        return self.offset - before

    def _take(self, step: int, metrics: dict[str, float]) -> None:
        self.last |= metrics
        for name, value in metrics.items():
            if name.startswith("system/"):
                self.peak[name] = max(value, self.peak.get(name, value))
        self.step = max(self.step, step)
        seconds = sum(value for name, value in metrics.items() if name.startswith("time/") and name.endswith("/s"))
        if step and seconds:
            self.step_s.append(seconds)
            self.computed_s += seconds
        if self.watched in metrics:
            self.history.append((step, metrics[self.watched]))
