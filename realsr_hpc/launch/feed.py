"""The metrics of a running run, read incrementally from its events so that watching hundreds of runs is cheap."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.tracking.spool import read_events

SHOWN = ("rewards/total/mean", "sft/loss/mean", "tokenizer/loss/step")
"""The metric shown for a run: the first of these that it reports."""
RECENT = 40


class Feed:
    """Last values and recent history of one run's metrics; `read` processes the new lines of events.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self.path = runfolder.events(run_dir)
        self._begin()

    def _begin(self) -> None:
        self.offset = 0
        """Bytes read so far."""
        self.last: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        """Largest value of each `system/` metric."""
        self._others: set[str] = set()
        """Names of the other metrics seen so far, to test each name only once: a step reports dozens."""
        self.step = 0
        self.step_s: deque[float] = deque(maxlen=RECENT)
        """Seconds per step of the recent steps, measured between reports; the first step after a start has none."""
        self.computed_s = 0.0
        """Seconds of all steps, including steps repeated after a resume."""
        self._reported: tuple[int, int] | None = None
        """Step and Unix time in milliseconds of the last report of this attempt."""
        self.history: deque[tuple[int, float]] = deque(maxlen=RECENT)
        """Recent steps with the value of the watched metric."""

    @property
    def watched(self) -> str:
        """Name of the metric in `history`; empty before the first step."""
        return next((name for name in SHOWN if name in self.last), "")

    @property
    def median_step_s(self) -> float | None:
        """Median of the recent seconds per step; None before the second report."""
        return statistics.median(self.step_s) if self.step_s else None

    def read(self) -> int:
        """Process the new events; returns the number of bytes read. An incomplete last line waits for the next call."""
        before = self.offset
        if self.path.exists() and self.path.stat().st_size < self.offset:
            self._begin()  # the file was replaced
            before = 0
        for event, offset in read_events(self.path, self.offset):
            self.offset = offset
            if event["kind"] == "truncate":
                self.step, self._reported = min(self.step, max(event["step"], 0)), None
                while self.history and self.history[-1][0] > event["step"]:
                    self.history.pop()
            elif event["kind"] == "metrics":
                self._take(event["step"], event["time_ms"], event["metrics"])
        return self.offset - before

    def _take(self, step: int, time_ms: int, metrics: dict[str, float]) -> None:
        self.last |= metrics
        for name in metrics.keys() - self._others:
            if name.startswith("system/"):
                self.peak[name] = max(metrics[name], self.peak.get(name, metrics[name]))
            else:
                self._others.add(name)
        self.step = max(self.step, step)
        if self._reported is None or step > self._reported[0]:  # a step may report more than once
            if self._reported is not None:
                seconds = (time_ms - self._reported[1]) / 1000 / (step - self._reported[0])
                self.step_s.append(seconds)
                self.computed_s += seconds * (step - self._reported[0])
            self._reported = (step, time_ms)
        if (watched := self.watched) in metrics:
            self.history.append((step, metrics[watched]))
