"""Runs that were launched: their states, and ending or continuing one."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.config.identity import may_change_on_resume
from realsr_hpc.config.load import from_yaml, override
from realsr_hpc.launch.rundir import (
    ALIVE,
    Queue,
    Status,
    current_status,
    list_runs,
    rank_log,
    read_job,
    read_status,
    slurm_queue,
)
from realsr_hpc.launch.rundir import write_status as set_state
from realsr_hpc.launch.submit import Submission, submit_into
from realsr_hpc.tracking import read_progress, set_status


@dataclass(frozen=True)
class RunRow:
    """One line of `tools/jobs.py`."""

    name: str
    state: str
    progress: str
    job: str
    log: Path


def rows(root: Path) -> list[RunRow]:
    """All runs of an output root, oldest first; Slurm is asked once."""
    runs = list_runs(root)
    queue = slurm_queue() if any((job := read_job(run)) and job.kind == "slurm" for run in runs) else Queue({})
    return [_row(run, queue) for run in runs]


def cancel(run_dir: Path) -> str:
    """Ask a run to stop at its next step, with a checkpoint; what was done, in words."""
    status, job = current_status(run_dir), read_job(run_dir)
    if status is None or job is None or status.state not in ALIVE:
        return f"{run_dir.name} is {status.state if status else 'not launched'}: nothing to cancel"
    if job.kind == "slurm":
        # SIGTERM reaches the ranks, which save and leave, and their supervisor says so; what waits goes at once.
        waits = slurm_queue().states.get(job.job_id) == "PENDING"
        subprocess.run(["scancel", job.job_id], check=True, capture_output=True, timeout=60)
        if waits:
            set_state(run_dir, "stopped", None, "cancelled before it began")
        return f"{run_dir.name}: job {job.job_id} cancelled"
    if job.host != os.uname().nodename:
        raise ValueError(f"{run_dir.name}: its job runs on {job.host}; cancel it there")
    os.kill(int(job.job_id), signal.SIGTERM)
    return f"{run_dir.name}: asked to stop at its next step"


def resume(run_dir: Path, overrides: list[str] | None = None) -> Submission:
    """Launch a run again as its recipe.yaml says, perhaps elsewhere or on another layout, from its last checkpoint.

    ValueError for an override of what decides the result: that would be another run.
    """
    config = from_yaml(run_dir / "recipe.yaml")
    if overrides:
        keys = {item: item.lstrip("+~").partition("=")[0] for item in overrides}
        foreign = [item for item, key in keys.items() if "." not in key or not may_change_on_resume(key)]
        if foreign:
            raise ValueError(
                f"{foreign[0]}: a resumed run keeps what decides its result; only layout and operation may change "
                "(parallel, cluster, checkpoint, tracking, ...: docs/recipes.md marks them); launch another run for it"
            )
        config = override(config, overrides)
    return submit_into([(config, run_dir)])[0]


def reconcile(root: Path) -> list[str]:
    """Write down, here and in MLflow, the end of runs whose job ended without a word; their names."""
    ended = []
    for run_dir in list_runs(root):
        said, status = read_status(run_dir), current_status(run_dir)
        if said is not None and said.state in ALIVE and status is not None and status.state not in ALIVE:
            set_state(run_dir, status.state, status.code, status.message)
            set_status(run_dir, "KILLED")
            ended.append(run_dir.name)
    return ended


def _row(run_dir: Path, queue: Queue) -> RunRow:
    status = current_status(run_dir, queue) or Status("stopped", message="never launched")
    job, progress = read_job(run_dir), read_progress(run_dir)
    done = f"{progress['step']}/{progress['total']}" if progress else "-"
    named = f"{job.kind} {job.job_id}" if job else "-"
    state = ""
    if job and status.state in ALIVE:
        silent = job.kind == "slurm" and not queue.answered
        state = "Slurm does not answer" if silent else queue.states.get(job.job_id, "").lower()
    return RunRow(
        run_dir.name, f"{status.state} ({state})" if state else status.state, done, named, rank_log(run_dir, 0)
    )
