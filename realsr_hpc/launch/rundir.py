"""The folder of a recipe's run and the run's state, as its files and Slurm's queue show it.

`runfolder` names the files inside a run folder.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from realsr_hpc import runfolder
from realsr_hpc.config.identity import scheme, signature
from realsr_hpc.config.load import SCHEME_LINE, from_yaml
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.locks import Holder, holder_of, is_held
from realsr_hpc.tracking import recipe_of

State = Literal["submitted", "running", "stopping", "requeued", "stopped", "done", "failed", "lost"]
"""stopping: was asked to stop and is saving. requeued: waits in Slurm's queue for its next attempt. stopped: launching
it again continues it. lost: its job ended without reporting a state."""
ALIVE: tuple[State, ...] = ("submitted", "running", "stopping", "requeued")
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
"""Slurm's states of finished jobs; squeue shows them for some minutes (MinJobAge)."""
LAUNCH_VARIABLE = "REALSR_HPC_LAUNCH"
SLURM_QUIET_S = 60
"""A requeued or just submitted job may be missing from squeue for a moment."""


@dataclass(frozen=True)
class Job:
    """The job that runs a folder. For a local job `job_id` is a process id on `host`."""

    kind: Literal["local", "slurm"]
    job_id: str
    host: str
    log: str
    """The supervisor's output file."""
    launch: str = ""
    """Id of its launch: a state with another id was written by an earlier job."""
    time_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """A state of a run, with the exit code and message of its job."""

    state: State
    code: int | None = None
    message: str = ""
    time_s: float = 0.0
    launch: str = ""


@dataclass(frozen=True)
class Queue:
    """squeue's answer about this user's jobs."""

    states: dict[str, str]
    """Job id -> Slurm state of every job that is pending, running or completing."""
    answered: bool = True
    """False if squeue failed or timed out."""
    ended: dict[str, str] = field(default_factory=dict)
    """Job id -> Slurm state of finished jobs that squeue still lists."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Job id -> why a pending job waits (`Resources`, `QOSMaxJobsPerUserLimit`, ...)."""


def run_folder(config: RunConfig, *, fresh: bool = False) -> Path:
    """The folder of this recipe's run; with `fresh`, the first numbered folder that does not exist yet."""
    base = output_root(config) / f"{config.name}-{signature(config)}"
    if not fresh:
        return base if base.exists() else _of_earlier_scheme(base, config) or base
    number = 2
    while (path := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return path if base.exists() else base


def _of_earlier_scheme(base: Path, config: RunConfig) -> Path | None:
    """A run of this recipe that was launched when signatures covered other fields, found by its recipe.yaml."""
    for path in sorted(base.parent.glob(f"{glob.escape(config.name)}-*/{runfolder.RECIPE}")):
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                current = file.readline().strip() == f"{SCHEME_LINE}{scheme()}"
            if current:
                continue
            written, found = from_yaml(path), recipe_of(path.parent)  # the root may have been copied, or moved
            if signature(config) in (signature(written), signature(found)):
                return path.parent
        except (ValueError, OSError):
            continue  # a recipe that today's schema refuses is not this one
    return None


def make_private(folder: Path) -> Path:
    """Create the folder with access for its owner only: recipes, logs and pickles are private.

    ValueError if it belongs to another user.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise ValueError(f"{folder}: belongs to user {found.st_uid}: choose another output_root, or a new folder")
    if found.st_mode & 0o077:
        folder.chmod(found.st_mode & 0o700)
    return folder


def write_status(
    run_dir: Path, state: State, code: int | None = None, message: str = "", launch: str | None = None
) -> None:
    """Replace the run's state.

    launch: id of the launch that reports it; None for the launch that this process belongs to.
    """
    own = os.environ.get(LAUNCH_VARIABLE, "") if launch is None else launch
    write_atomically(runfolder.status(run_dir), json.dumps(asdict(Status(state, code, message, time.time(), own))))


def read_status(run_dir: Path) -> Status | None:
    """The state that was written last; `current_status` also checks whether the job still exists."""
    return read_json(runfolder.status(run_dir), Status)


def write_job(run_dir: Path, job: Job) -> None:
    """Record the run's job in job.json."""
    write_atomically(runfolder.job(run_dir), json.dumps(asdict(job)))


def read_job(run_dir: Path) -> Job | None:
    """The job that was submitted last for the run; None if job.json is missing or damaged."""
    return read_json(runfolder.job(run_dir), Job)


def current_status(run_dir: Path, queue: Queue | None = None) -> Status | None:
    """The run's actual state: the written one, corrected if the job it belongs to no longer exists.

    A run that was alive by its last report but has no job any more is `stopped` or `lost`. A run whose job is gone but
    whose process still holds the run's lock (on a node that lost contact with Slurm) is `running`.

    queue: the result of `slurm_queue()`, to call squeue once for many runs. None: call it now if needed.
    """
    status, job = read_status(run_dir), read_job(run_dir)
    if job is None:
        return _without_job(run_dir, status)
    if status is None or status.launch != job.launch:  # the job has not reported yet, or its report is damaged
        status = Status("submitted", time_s=job.time_s, launch=job.launch)
    if status.state not in (*ALIVE, "stopped"):
        return status
    known = (slurm_queue() if queue is None else queue) if job.kind == "slurm" else Queue({})
    if status.state == "stopped":
        if known.states.get(job.job_id, "COMPLETING") == "COMPLETING":
            return status
        return Status("requeued", status.code, status.message, status.time_s)  # by Slurm, not by its supervisor
    if is_alive(job, status, known):
        return status
    settled = read_status(run_dir)  # it may have ended after the first read and before squeue answered
    if settled is not None and settled.launch == job.launch and settled.state not in ALIVE:
        return settled
    if holder := process_of(run_dir):
        message = f"job {job.job_id} is over, yet {holder} still runs it: wait for its end, or end it"
        return Status("running", None, message, status.time_s)
    return _ended_unreported(run_dir, status, job, known.ended.get(job.job_id, ""))


def _without_job(run_dir: Path, status: Status | None) -> Status | None:
    """State of a run whose job.json is missing or damaged: alive only if a process holds its lock."""
    if status is None or status.state not in ALIVE:
        return status
    if holder := process_of(run_dir):
        return Status(status.state, None, f"run by {holder}", status.time_s)
    return Status("lost", None, "no job of it is known (job.json); launch it again to continue", status.time_s)


def process_of(run_dir: Path) -> Holder | None:
    """The process that holds the run's lock now, even if its job is unknown; None if no process does."""
    lock = runfolder.lock(run_dir)
    return holder_of(lock) if is_held(lock) else None


def _ended_unreported(run_dir: Path, status: Status, job: Job, ended: str) -> Status:
    """State of a run whose job is gone and wrote no final state; `ended` is Slurm's state of the job, if known."""
    step = saved_step(run_dir)
    again = "launch it again to start" if step is None else f"launch it again to continue from step {step}"
    if status.state == "stopping":
        return Status("stopped", None, f"job {job.job_id} was ended before it could save; {again}", status.time_s)
    if ended == "CANCELLED" or (job.kind == "slurm" and status.state != "running" and not Path(job.log).exists()):
        return Status("stopped", None, f"job {job.job_id} was cancelled; {again}", status.time_s)
    how = f" ({ended})" if ended else ""
    message = f"job {job.job_id} ended without reporting a state{how}; see {job.log}; {again}"
    return Status("lost", None, message, status.time_s)


def saved_step(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint; None if there is none. Its tensors are not read."""
    folders = [path.parent for path in runfolder.checkpoints(run_dir).glob("*/manifest.json")]
    return max((runfolder.step_of(folder) for folder in folders if runfolder.is_step(folder)), default=None)


def is_alive(job: Job, status: Status, queue: Queue) -> bool:
    """Whether the job is queued or running.

    If that cannot be checked, it counts as alive: a local job on another host, or a Slurm job while squeue fails.
    """
    if job.kind == "local":
        return job.host != os.uname().nodename or (job.job_id.isdecimal() and _is_controller(int(job.job_id)))
    if not queue.answered or job.job_id in queue.states:
        return True
    return job.job_id not in queue.ended and time.time() - status.time_s < SLURM_QUIET_S


def slurm_queue() -> Queue:
    """This user's jobs, from one call of squeue."""
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T %r"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return Queue({}, answered=False)
    lines = [(*line.split(maxsplit=2), "")[:3] for line in answer.splitlines() if len(line.split()) > 1]
    return Queue(
        {job: state for job, state, _ in lines if state not in ENDED},
        ended={job: state for job, state, _ in lines if state in ENDED},
        reasons={job: reason.strip("() ") for job, state, reason in lines if state == "PENDING"},
    )


def queue_of(folders: Iterable[Path]) -> Queue:
    """Slurm's queue if one of these runs has a Slurm job; otherwise an empty one, without calling squeue."""
    return slurm_queue() if any(is_slurm(read_job(folder)) for folder in folders) else Queue({})


def is_slurm(job: Job | None) -> bool:
    """Whether there is a job and it belongs to Slurm."""
    return job is not None and job.kind == "slurm"


def _is_controller(pid: int) -> bool:
    """Whether the process is submitit's controller and not a zombie; the system may have reused the process id."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    # While the process is starting, its command line is empty.
    return state not in "ZX" and (not words or b"submitit.local._local" in words)
