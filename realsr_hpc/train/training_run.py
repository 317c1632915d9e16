"""What all training loops share: resuming, reporting, checkpoints, and stopping all ranks at the same step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from realsr_hpc import checkpoint, runfolder
from realsr_hpc.config.metrics import best_is_highest, best_metric
from realsr_hpc.parallel.reduce import reduce_floats
from realsr_hpc.records import StepReport
from realsr_hpc.tracking.system import SystemUse
from realsr_hpc.tracking.tracker import Tracker
from realsr_hpc.train.parity import ParityGate
from realsr_hpc.train.parts import Parts
from realsr_hpc.train.skipped import keep_skipped

logger = logging.getLogger(__name__)

Stop = Callable[[], bool]


class Source(Protocol):
    """What a run reads: `LQLoader`, or `TraceLoader`."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Reasons, by key, for the photographs that could not be used so far."""
        ...

    def state_dict(self) -> dict[str, bool | int | str]:
        """Its position, and what that belongs to."""
        ...

    def load_state_dict(self, state: Mapping[str, bool | int | str]) -> None:
        """Continue there. ValueError if the position belongs to something else."""
        ...


class TrainingRun:
    """A run on this rank: its parts, tracker, checkpoints and counters."""

    def __init__(self, parts: Parts, run_dir: Path, stop: Stop, num_steps: int):
        config = parts.config
        self.parts, self.config, self.run_dir, self._stop, self.num_steps = parts, config, run_dir, stop, num_steps
        self.tracker = Tracker.open(config, run_dir, writer=parts.groups.is_main)
        self.counters: dict[str, int] = {}
        """Saved with every checkpoint; changed in place, because the FP8 gate shares the dictionary."""
        keep_skipped(runfolder.skipped(run_dir), parts.optimiser, config.optim.max_skipped_in_a_row)
        keep = config.checkpoint
        self._keep = checkpoint.Keep(keep.keep_last, keep.keep_best, highest=best_is_highest(config))
        self._saver = checkpoint.Saver(runfolder.checkpoints(run_dir), self._keep, behind=keep.async_save)
        self._measured: float | None = None
        self._not_saved = 0
        """Number of consecutive checkpoints that could not be written."""
        self._use = SystemUse(run_dir)
        self.parity = ParityGate(parts, self.counters) if config.precision.fp8 != "none" else None
        """The FP8 gate; None without FP8."""

    def resume(self, loader: Source) -> int:
        """Load the newest complete checkpoint, if there is one, into parts and loader; returns the steps done."""
        step = self._resume(loader)
        if self.parity is not None:
            self.parity.start(step)
        return step

    def _resume(self, loader: Source) -> int:
        path = checkpoint.resume_path(self._saver.root, self.parts.groups)
        if path is None:
            self.tracker.truncate(-1)
            return 0
        state = checkpoint.load(path, self.parts.policy, self.parts.optimiser, self.parts.groups)
        loader.load_state_dict(state.data)
        self.counters.update(state.counters)
        self.tracker.truncate(state.step)
        logger.info("resumed from %s: step %d of %d", path, state.step, self.num_steps)
        return state.step

    def report(self, report: StepReport, text: str) -> None:
        """Send the metrics to the tracker, a line to the log, and the progress to the run's status."""
        self._measured = report.metrics.get(best_metric(self.config))
        counted = {"optim/skipped_updates/count": float(self.parts.optimiser.num_skipped)}
        if self._not_saved:
            counted["checkpoint/not_saved/count"] = float(self._not_saved)
        parity = {} if self.parity is None else self.parity.metrics(report.step)
        self.tracker.log_metrics(report.step, {**report.metrics, **parity, **counted, **self._use.sample()})
        self.tracker.progress(report.step, self.num_steps, text)
        if self.parts.groups.is_main:
            logger.info("step %d/%d  %s", report.step, self.num_steps, text)

    def must_stop(self, step: int, loader: Source) -> bool:
        """At the boundary after `step`: save a checkpoint when due, and return whether all ranks stop here.

        One rank's signal stops all ranks at the same step: the flag is reduced, so that the collective save cannot
        hang.
        """
        stop = self._stop() or step == self.config.checkpoint.stop_at_step
        own = {"stop": stop, "best": self._is_among_best(), "writing": self._saver.writing}
        # this rank's flags; the maximum over all ranks decides, so that all of them save or stop together
        flags = {name: float(flag) for name, flag in own.items()}
        flags["left_out"] = float(len(loader.skipped))
        world = torch.distributed.group.WORLD
        assert world is not None, "the parts of a run exist in a process group only"
        agreed = reduce_floats(flags, world, self.parts.groups.device, "max")
        if agreed["left_out"]:  # unreadable photographs so far, on the rank with most of them
            self.tracker.log_metrics(step, {"data/skipped/count": agreed["left_out"]})
        leaving = agreed["stop"] > 0 or step == self.num_steps
        due = leaving or agreed["best"] > 0 or step % self.config.checkpoint.every_steps == 0
        began = time.perf_counter()
        # complete the previous asynchronous save before the next one starts, or as soon as all ranks have written
        if self._saver.pending and (due or not agreed["writing"]):
            self._try(self._complete)
        if due:
            self._try(lambda: self.save(step, loader), must=step == self.num_steps)
        if self._saver.pending and (leaving or not self._saver.behind):
            self._try(self._complete, must=step == self.num_steps)
        if due:  # the time training waited; asynchronous writing is not counted
            self.tracker.log_metrics(step, {"time/checkpoint/s": time.perf_counter() - began})
        return agreed["stop"] > 0 and step < self.num_steps

    def _try(self, act: Callable[[], None], *, must: bool = False) -> None:
        """Call `act`; continue after a failed checkpoint unless it `must` be written or too many in a row failed."""
        try:
            act()
        except checkpoint.NotSaved as error:
            self._not_saved += 1
            limit = self.config.checkpoint.max_failed_in_a_row
            if must or self._not_saved >= limit:
                raise
            if self.parts.groups.is_main:
                logger.error(
                    "%s; training continues (%d failed in a row, %d end the run)", error, self._not_saved, limit
                )

    def _complete(self) -> None:
        self._saver.complete()
        self._not_saved = 0

    def save(self, step: int, loader: Source) -> None:
        """Start a checkpoint with everything that the run needs to continue."""
        state = checkpoint.RunState(step, loader.state_dict(), self.counters, self.tracker.run_id)
        self._saver.start(step, self.parts.policy, self.parts.optimiser, state, self._measured)

    def _is_among_best(self) -> bool:
        """Whether this step's metric is among the best that are kept; rank 0 decides for all."""
        if not self._keep.best or self._measured is None or not self.parts.groups.is_main:
            return False
        best = checkpoint.best(self._saver.root, self._keep.best, highest=self._keep.highest)
        sign = 1.0 if self._keep.highest else -1.0
        return len(best) < self._keep.best or sign * self._measured > sign * best[-1][1]
