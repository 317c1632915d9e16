"""Submit runs through submitit, which calls sbatch or starts a local process.

A run's job.json is written only after its job exists. Each launch has a random id, which job.json and every state that
the job writes carry, so that the last state of an earlier job is not mistaken for this one's. If sbatch refuses, the
run is left unchanged and sbatch's message is reported.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.job import node_job
from realsr_hpc.launch.prune import link_code
from realsr_hpc.launch.rundir import Job, make_private, write_job
from realsr_hpc.launch.script import executor_parameters, setup_lines
from realsr_hpc.launch.snapshot import take_snapshot
from realsr_hpc.launch.turns import node_job_in_turn
from realsr_hpc.paths import SAFE_PATH, python_path

NOT_SUBMITTED = (RuntimeError, OSError, subprocess.SubprocessError)
"""Exceptions that submitit raises if sbatch fails or prints no job id, or if srun or sbatch is not installed."""
AWAY = "unable to contact slurm controller"
"""In sbatch's words where nothing was submitted."""
DEFAULT_MAX_ARRAY = 1001
"""Slurm's default MaxArraySize, used if `scontrol show config` gives none."""


@dataclass(frozen=True)
class Submission:
    """The outcome of submitting one recipe."""

    config: RunConfig
    run_dir: Path
    submitted: bool
    note: str = ""
    """The reason it was not submitted, or a warning for the user."""
    failed: bool = False
    """True if submitting it was tried and refused (a run that is already done or running is not tried)."""
    away: bool = False
    """True if it failed because Slurm's controller does not answer."""
    alive: bool = False
    """True if it was not submitted because its earlier job waits or runs."""


def start_together(group: list[Submission], after: Sequence[str] = ()) -> list[Submission]:
    """Submit runs that can share one Slurm array; returns a Submission for each, in the same order.

    After a refusal the rest of the group is not tried, since Slurm would refuse it for the same reason.

    after: ids of the Slurm jobs that must succeed before these start.
    """
    if group[0].config.cluster.kind != "slurm":
        return [_attempt([item], lambda part: _start_local(part[0], len(group)))[0] for item in group]
    size = max_array_size() if len(group) > 1 else 1
    parts = [group[start : start + size] for start in range(0, len(group), size)]
    became: list[Submission] = []
    for part in parts:
        if became and became[-1].failed:
            before = became[-1]
            became += [replace(item, submitted=False, failed=True, away=before.away, note=before.note) for item in part]
        else:
            became += _attempt(part, lambda part: _submit_slurm(part, len(parts), after))
    return became


def _attempt(part: list[Submission], start) -> list[Submission]:
    try:
        start(part)
    except NOT_SUBMITTED as error:
        note = refusal(error)
        return [replace(item, submitted=False, failed=True, away=AWAY in note.lower(), note=note) for item in part]
    return part


def refusal(error: Exception) -> str:
    """sbatch's own message, without the text that submitit puts around it."""
    from submitit.core.utils import FailedSubmissionError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, FailedSubmissionError):  # sbatch exited with 0 but printed no job id
        return f"{lines[0]}; if squeue --me lists a new job, scancel it and launch again"
    errors = [line for line in lines if line.startswith("sbatch:")] or lines[-1:] or [type(error).__name__]
    return " ".join(dict.fromkeys(line.removeprefix("sbatch: ") for line in errors))


def max_array_size() -> int:
    """The largest number of tasks in one array that this Slurm accepts (MaxArraySize)."""
    command = ["scontrol", "show", "config"]
    try:
        shown = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        shown = ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(found[1]) if found else DEFAULT_MAX_ARRAY)


def _submit_slurm(group: list[Submission], num_arrays: int = 1, after: Sequence[str] = ()) -> None:
    """Submit one job or one array. Several arrays share the limit on runs at once (`cluster.array_parallelism`)."""
    from realsr_hpc.launch.sbatch import Executor

    config = group[0].config
    code = take_snapshot([item.config for item in group])
    single = len(group) == 1
    folder = runfolder.job_logs(group[0].run_dir) if single else make_private(output_root(config) / "arrays") / "%A"
    executor = Executor(folder=folder, max_num_timeout=config.cluster.max_requeues)
    parameters = executor_parameters(config.cluster, config.name, setup_lines(config.cluster, code), after)
    parameters["array_parallelism"] = max(1, config.cluster.runs_at_once // num_arrays)
    executor.update_parameters(**parameters)
    for item in group:
        link_code(item.run_dir, code)
    folders, launch = [item.run_dir for item in group], secrets.token_hex(8)
    if single:
        jobs = [executor.submit(node_job, folders[0], launch)]
    else:
        jobs = executor.map_array(node_job, folders, [launch] * len(folders))
    for item, job in zip(group, jobs, strict=True):
        write_job(item.run_dir, Job("slurm", job.job_id, "", str(job.paths.stdout), launch, time.time()))


def _start_local(item: Submission, num_runs: int) -> None:
    """Start a local process: immediately for a single run; runs of a sweep wait for a free slot."""
    import submitit

    cluster, launch = item.config.cluster, secrets.token_hex(8)
    gpus = list(range(cluster.gpus_per_node))
    executor = submitit.LocalExecutor(folder=runfolder.job_logs(item.run_dir))
    executor.update_parameters(
        timeout_min=cluster.time_min * num_runs,
        signal_delay_s=cluster.signal_delay_s,
        stderr_to_stdout=True,
        tasks_per_node=1,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
    )
    with _outliving_the_terminal(runfolder.controller_log(item.run_dir)):
        if num_runs == 1:
            job = executor.submit(node_job, item.run_dir, launch)
        else:
            slots, place = output_root(item.config) / "slots", time.time_ns()
            job = executor.submit(node_job_in_turn, item.run_dir, slots, cluster.runs_at_once, place, launch)
    host = os.uname().nodename
    write_job(item.run_dir, Job("local", job.job_id, host, str(job.paths.stdout), launch, time.time()))


@contextmanager
def _outliving_the_terminal(log: Path) -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C and hang-up, import this same code, and write to `log`.

    If they inherited stdout, they would keep its pipe open and the reader (`launch.py ... follow=false | tee`) would
    not end before the run.
    """
    numbers = (signal.SIGINT, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", SAFE_PATH)}
    os.environ |= {"PYTHONPATH": python_path(), SAFE_PATH: "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    streams = [os.dup(number) for number in (1, 2)]
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
