"""Waiting for a run and reading what it left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from realsr_hpc.launch.rundir import ALIVE, current_status
from realsr_hpc.runfolder import rank_log
from realsr_hpc.tracking import metrics_by_step, read_progress

PATIENCE_S = 400


def wait_for(what: Callable[[], bool], run_dir: Path) -> None:
    """Until `what` holds; AssertionError with the end of the log when it never does."""
    deadline = time.time() + PATIENCE_S
    while not what():
        assert time.time() < deadline, f"{current_status(run_dir)}\n{log_of(run_dir)[-3000:]}"
        time.sleep(0.3)


def wait_for_end(run_dir: Path) -> str:
    """The state in which the run came to rest."""
    wait_for(lambda: state_of(run_dir) not in ALIVE, run_dir)
    return state_of(run_dir)


def state_of(run_dir: Path) -> str:
    """The run's state now."""
    return (current_status(run_dir) or pytest.fail("never launched")).state


def steps_done(run_dir: Path) -> int:
    """The last step that was reported."""
    progress = read_progress(run_dir)
    return progress.step if progress else 0


def log_of(run_dir: Path) -> str:
    """What rank 0 printed in all attempts."""
    log = rank_log(run_dir, 0)
    return log.read_text() if log.exists() else "no log"


def results(run_dir: Path) -> dict[int, dict[str, float]]:
    """Everything reported but time, machine and disk, by step."""
    steps = metrics_by_step(run_dir)
    return {
        step: {key: value for key, value in metrics.items() if not key.startswith(("time/", "system/", "checkpoint/"))}
        for step, metrics in steps.items()
    }
