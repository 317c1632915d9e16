"""Which folder belongs to a recipe's run, and the state of the run in it; `runfolder` names the files in it."""

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
"""stopping: asked to, saving. stopped: launching it again goes on. lost: its job ended without a word."""
ALIVE: tuple[State, ...] = ("submitted", "running", "stopping", "requeued")
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
"""Slurm's names for jobs that are over; it keeps them in its queue for some minutes (MinJobAge)."""
LAUNCH_VARIABLE = "REALSR_HPC_LAUNCH"
SLURM_QUIET_S = 60
"""A requeued or just submitted job may be missing from squeue for a moment."""


@dataclass(frozen=True)
class Job:
    """The job that runs a folder; `job_id` is a process id on `host` for a local job."""

    kind: Literal["local", "slurm"]
    job_id: str
    host: str
    log: str
    """The supervisor's own output."""
    launch: str = ""
    """Which launch it belongs to: a state that bears another one was left by an earlier job."""
    time_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """Last known state."""

    state: State
    code: int | None = None
    message: str = ""
    time_s: float = 0.0
    launch: str = ""


@dataclass(frozen=True)
class Queue:
    """What Slurm said of this user's jobs: id -> state, or that it does not answer."""

    states: dict[str, str]
    """Waiting, running or leaving."""
    answered: bool = True
    ended: dict[str, str] = field(default_factory=dict)
    """Over, as far as Slurm still knows them."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a job waits, in Slurm's word (`Resources`, `QOSMaxJobsPerUserLimit`, ...)."""


def run_folder(config: RunConfig, *, fresh: bool = False) -> Path:
    """The folder of this recipe's run; with `fresh` the first numbered one that does not exist."""
    base = output_root(config) / f"{config.name}-{signature(config)}"
    if not fresh:
        return base if base.exists() else _of_earlier_scheme(base, config) or base
    number = 2
    while (path := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return path if base.exists() else base


def _of_earlier_scheme(base: Path, config: RunConfig) -> Path | None:
    """This recipe's run, launched when signatures covered other fields; its recipe.yaml says the same today."""
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
    """The folder, with access for its owner alone: recipes, logs and pickles are private. ValueError: not ours."""
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
    """Replace the run's state, as the job of `launch` (None: the one that this process belongs to) sees it."""
    own = os.environ.get(LAUNCH_VARIABLE, "") if launch is None else launch
    write_atomically(runfolder.status(run_dir), json.dumps(asdict(Status(state, code, message, time.time(), own))))


def read_status(run_dir: Path) -> Status | None:
    """The state as last written; `current_status` also asks whether the job still lives."""
    return read_json(runfolder.status(run_dir), Status)


def write_job(run_dir: Path, job: Job) -> None:
    """Remember the job."""
    write_atomically(runfolder.job(run_dir), json.dumps(asdict(job)))


def read_job(run_dir: Path) -> Job | None:
    """The job last submitted for the run."""
    return read_json(runfolder.job(run_dir), Job)


def current_status(run_dir: Path, queue: Queue | None = None) -> Status | None:
    """The true state: a run that calls itself alive without a living job was stopped, or is `lost`.

    A run whose job is gone but whose process goes on, on a node that Slurm lost sight of, is `running`.
    `queue` is `slurm_queue()`'s answer, to ask Slurm once for many runs.
    """
    status, job = read_status(run_dir), read_job(run_dir)
    if job is None:
        return _without_job(run_dir, status)
    if status is None or status.launch != job.launch:  # its job has said nothing yet, or nothing that can be read
        status = Status("submitted", time_s=job.time_s, launch=job.launch)
    if status.state not in (*ALIVE, "stopped"):
        return status
    known = (slurm_queue() if queue is None else queue) if job.kind == "slurm" else Queue({})
    if status.state == "stopped":
        if known.states.get(job.job_id, "COMPLETING") == "COMPLETING":
            return status
        return Status("requeued", status.code, status.message, status.time_s)  # Slurm requeued it of itself
    if is_alive(job, status, known):
        return status
    settled = read_status(run_dir)  # it may have ended between the two looks
    if settled is not None and settled.launch == job.launch and settled.state not in ALIVE:
        return settled
    if holder := process_of(run_dir):
        message = f"job {job.job_id} is over, yet {holder} still runs it: wait for its end, or end it"
        return Status("running", None, message, status.time_s)
    return _without_a_word(run_dir, status, job, known.ended.get(job.job_id, ""))


def _without_job(run_dir: Path, status: Status | None) -> Status | None:
    """A run whose job.json is missing or damaged; who runs it holds its lock."""
    if status is None or status.state not in ALIVE:
        return status
    if holder := process_of(run_dir):
        return Status(status.state, None, f"run by {holder}", status.time_s)
    return Status("lost", None, "no job of it is known (job.json); launch it again to go on", status.time_s)


def process_of(run_dir: Path) -> Holder | None:
    """The process that runs a folder now, whatever is known of its job; None: there is none."""
    lock = runfolder.lock(run_dir)
    return holder_of(lock) if is_held(lock) else None


def _without_a_word(run_dir: Path, status: Status, job: Job, ended: str) -> Status:
    """What became of a run whose job is gone and left no last state."""
    step = saved_step(run_dir)
    again = "launch it again to start" if step is None else f"launch it again to go on from step {step}"
    if status.state == "stopping":
        return Status("stopped", None, f"job {job.job_id} was ended before it could save; {again}", status.time_s)
    if ended == "CANCELLED" or (job.kind == "slurm" and status.state != "running" and not Path(job.log).exists()):
        return Status("stopped", None, f"job {job.job_id} was cancelled; {again}", status.time_s)
    how = f" ({ended})" if ended else ""
    return Status("lost", None, f"job {job.job_id} ended without a word{how}; see {job.log}; {again}", status.time_s)


def saved_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint that was completed; None before the first. Its bytes are not read."""
    folders = [path.parent for path in runfolder.checkpoints(run_dir).glob("*/manifest.json")]
    return max((runfolder.step_of(folder) for folder in folders if runfolder.is_step(folder)), default=None)


def is_alive(job: Job, status: Status, queue: Queue) -> bool:
    """Whether the job is queued or running. Believed: a local job of another host, any job while Slurm is silent."""
    if job.kind == "local":
        return job.host != os.uname().nodename or (job.job_id.isdecimal() and _is_controller(int(job.job_id)))
    if not queue.answered or job.job_id in queue.states:
        return True
    return job.job_id not in queue.ended and time.time() - status.time_s < SLURM_QUIET_S


def slurm_queue() -> Queue:
    """This user's jobs, one call."""
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
    """Slurm's queue where the job of one of these folders is Slurm's; otherwise an empty one, and nothing is asked."""
    return slurm_queue() if any(is_slurm(read_job(folder)) for folder in folders) else Queue({})


def is_slurm(job: Job | None) -> bool:
    """Whether there is a job, and Slurm runs it."""
    return job is not None and job.kind == "slurm"


def _is_controller(pid: int) -> bool:
    """Process ids are used again: the process must be submitit's controller, and no zombie."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    # While it is being started, a process has no words yet.
    return state not in "ZX" and (not words or b"submitit.local._local" in words)
