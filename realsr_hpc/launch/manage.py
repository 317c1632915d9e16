"""List launched runs with their states, cancel and resume them, and record the end of lost ones."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.identity import may_change_on_resume
from realsr_hpc.config.load import override
from realsr_hpc.launch.rundir import (
    ALIVE,
    Job,
    Queue,
    Status,
    current_status,
    process_of,
    queue_of,
    read_job,
    read_status,
    slurm_queue,
)
from realsr_hpc.launch.rundir import write_status as set_state
from realsr_hpc.launch.start import Submission
from realsr_hpc.launch.submit import submit_into
from realsr_hpc.tracking import read_progress, recipe_of, set_status
from realsr_hpc.tracking.delivery import brief

CANCEL_WAIT_S = 900.0
"""How long a cancelled job may take to finish its step and save before it is ended by scancel."""
POLL_S = 1.0
UNANSWERED = "Slurm does not answer"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRow:
    """One line of `realsr-hpc jobs`; with `json=true`, one object of its list."""

    name: str
    state: str
    """A launch.rundir.State."""
    slurm: str
    """Slurm's state of the job and the reason why it waits; empty without a live Slurm job."""
    step: int | None
    total: int | None
    job: str
    message: str
    log: Path

    @property
    def progress(self) -> str:
        """`12/30`, or `-` before the first step."""
        return "-" if self.step is None else f"{self.step}/{self.total}"

    @property
    def states(self) -> str:
        """`state` and `slurm` as one column."""
        return f"{self.state} ({self.slurm})" if self.slurm else self.state


def rows(root: Path) -> list[RunRow]:
    """All runs of an output root, oldest first. Calls squeue once; an unreadable run does not affect the others."""
    runs = runfolder.list_runs(root)
    queue = queue_of(runs)
    return [_row(run, queue) for run in runs]


def cancel(run_dir: Path, wait_s: float = CANCEL_WAIT_S) -> str:
    """Ask a run to stop at its next step with a checkpoint; returns a sentence that says what was done.

    A Slurm job gets a signal and up to `wait_s` seconds to end by itself; then scancel ends it. scancel alone would
    give it only Slurm's KillWait (30 s by default) to finish its step and save.

    Raises ValueError if the process cannot be cancelled from here, or if squeue or scancel fails.
    """
    status, job = current_status(run_dir), read_job(run_dir)
    if status is not None and status.state in ALIVE and job is None:
        raise ValueError(f"{run_dir.name}: {status.message}, and job.json is missing: end that process yourself")
    if status is None or job is None or status.state not in ALIVE:
        return f"{run_dir.name} is {status.state if status else 'not launched'}: nothing to cancel"
    if job.kind == "slurm":
        return _cancel_slurm(run_dir, job, wait_s)
    if job.host != os.uname().nodename:
        raise ValueError(f"{run_dir.name}: its job runs on {job.host}; cancel it there")
    os.kill(int(job.job_id), signal.SIGTERM)
    return f"{run_dir.name}: asked to stop at its next step"


def _cancel_slurm(run_dir: Path, job: Job, wait_s: float) -> str:
    state = _slurm_state(job)
    if not state and (holder := process_of(run_dir)):
        fault = f"job {job.job_id} is over, yet {holder} still runs it"
        raise ValueError(f"{run_dir.name}: {fault}: end that process yourself")
    if not runfolder.recipe(run_dir).exists():  # a command of a chain, which has no checkpoint to save
        _scancel(job.job_id)
        return f"{run_dir.name}: job {job.job_id} cancelled; launch its chain again to run it from its beginning"
    if state == "PENDING":
        # Without --state=PENDING, which would cancel the whole array that a waiting task belongs to. A job that starts
        # just now has not computed anything yet.
        _scancel(job.job_id)
        state = _slurm_state(job)
    if state != "RUNNING":
        if state not in ("", "PENDING"):
            _scancel(job.job_id)
        set_state(run_dir, "stopped", None, "cancelled before it began", launch=job.launch)
        return f"{run_dir.name}: job {job.job_id} cancelled"
    _scancel("--signal=TERM", job.job_id)
    left, last = _left(run_dir, job, time.time() + wait_s)
    if not left:
        _scancel(job.job_id)
        return f"{run_dir.name}: job {job.job_id} cancelled without a checkpoint, after {wait_s:.0f} s"
    if last is None:
        return f"{run_dir.name}: job {job.job_id} ended without reporting a state; see {job.log}"
    word = {"stopped": "cancelled; it has stopped with a checkpoint", "done": "came to its end, all steps done"}
    return f"{run_dir.name}: job {job.job_id} {word.get(last.state, f'ended: {last.state}, {last.message}')}"


def _slurm_state(job: Job) -> str:
    """Slurm's state of the job, empty if squeue no longer lists it as active.

    ValueError if squeue does not answer: the job may be saving a checkpoint just now.
    """
    queue = slurm_queue()
    if not queue.answered:
        raise ValueError(f"job {job.job_id}: squeue does not answer; nothing was cancelled, ask again")
    return queue.states.get(job.job_id, "")


def _left(run_dir: Path, job: Job, deadline: float) -> tuple[bool, Status | None]:
    """Wait until the job has ended by itself; returns whether it has, and the final state if it wrote one."""
    gone = False
    while time.time() < deadline:
        status = read_status(run_dir)
        if status is not None and status.launch == job.launch and status.state not in ALIVE:
            return True, status
        if gone:  # it had ended before its state was read just now, so no state will follow
            return True, None
        queue = slurm_queue()
        gone = queue.answered and job.job_id not in queue.states
        time.sleep(0 if gone else POLL_S)
    return gone, None


def _scancel(*words: str) -> None:
    """Call scancel; ValueError with its message if it fails."""
    try:
        subprocess.run(
            ["scancel", *words], check=True, capture_output=True, timeout=60, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or str(error)
        raise ValueError(f"scancel {' '.join(words)}: {message.strip()}") from None


def resume(run_dir: Path, overrides: list[str] | None = None) -> Submission:
    """Launch a run again from its last checkpoint, with its recipe.yaml and overrides of layout or operation.

    ValueError for an override of a field that decides the result: that would be another run.
    """
    config = recipe_of(run_dir)
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
    """Record the end of runs whose jobs disappeared without reporting it, in status.json and MLflow; returns names."""
    ended = []
    for run_dir in runfolder.list_runs(root):
        stored, status = read_status(run_dir), current_status(run_dir)
        if stored is not None and stored.state in ALIVE and status is not None and status.state not in ALIVE:
            try:
                set_state(run_dir, status.state, status.code, status.message, launch=stored.launch)
            except OSError as error:  # perhaps another user's run; continue with the others
                logger.warning("%s: its end is not written down (%s)", run_dir.name, error.strerror)
                continue
            try:
                set_status(run_dir, "KILLED")
            except Exception as error:  # tracking never stops anything; sync_tracking sends it later
                logger.warning("%s: not told to MLflow (%s)", run_dir.name, brief(error))
            ended.append(run_dir.name)
    return ended


def _row(run_dir: Path, queue: Queue) -> RunRow:
    status = current_status(run_dir, queue) or Status("stopped", message="never launched")
    job, progress = read_job(run_dir), read_progress(run_dir)
    slurm = ""
    if job and job.kind == "slurm" and status.state in ALIVE:
        words = [queue.states.get(job.job_id, "").lower(), queue.reasons.get(job.job_id, "")]
        slurm = ": ".join(word for word in words if word and word != "None") if queue.answered else UNANSWERED
    return RunRow(
        name=run_dir.name,
        state=status.state,
        slurm=slurm,
        step=progress.step if progress else None,
        total=progress.total if progress else None,
        job=f"{job.kind} {job.job_id}" if job else "-",
        message=status.message,
        log=runfolder.rank_log(run_dir, 0),
    )
