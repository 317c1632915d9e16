"""Submit through submitit, which calls sbatch or starts a local process; recorded states reflect what happened.

A run's job.json is written only after its job exists. A job and every state it writes carry the name of the launch, so
that the last state of an earlier job is not mistaken for this one's. If sbatch refuses, the run is left unchanged and
sbatch's message is reported.
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
"""What submitit raises where sbatch fails or names no job, and where srun or sbatch are missing."""
DEFAULT_MAX_ARRAY = 1001
"""Slurm's own MaxArraySize where it does not tell."""


@dataclass(frozen=True)
class Submission:
    """What became of one recipe."""

    config: RunConfig
    run_dir: Path
    submitted: bool
    note: str = ""
    """Why it was not submitted, or what the user should know."""
    failed: bool = False
    """It should have been submitted and was refused."""


def start_together(group: list[Submission], after: Sequence[str] = ()) -> list[Submission]:
    """Submit runs that can share an array; each as it became. A refusal ends the group: the next would be the same.

    after: Slurm jobs that must have succeeded before.
    """
    if group[0].config.cluster.kind != "slurm":
        return [_attempt([item], lambda part: _start_local(part[0], len(group)))[0] for item in group]
    size = max_array_size() if len(group) > 1 else 1
    parts = [group[start : start + size] for start in range(0, len(group), size)]
    became: list[Submission] = []
    for part in parts:
        if became and became[-1].failed:
            became += [replace(item, submitted=False, failed=True, note=became[-1].note) for item in part]
        else:
            became += _attempt(part, lambda part: _submit_slurm(part, len(parts), after))
    return became


def _attempt(part: list[Submission], start) -> list[Submission]:
    try:
        start(part)
    except NOT_SUBMITTED as error:
        return [replace(item, submitted=False, failed=True, note=refusal(error)) for item in part]
    return part


def refusal(error: Exception) -> str:
    """What sbatch said, without submitit's words around it."""
    from submitit.core.utils import FailedSubmissionError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, FailedSubmissionError):  # it exited with 0 and named no job
        return f"{lines[0]}; if squeue --me lists a new job, scancel it and launch again"
    said = [line for line in lines if line.startswith("sbatch:")] or lines[-1:] or [type(error).__name__]
    return " ".join(dict.fromkeys(line.removeprefix("sbatch: ") for line in said))


def max_array_size() -> int:
    """How many runs this Slurm takes as one array."""
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
    """One job, or one array; of several arrays each gets its share of the runs that may go at once."""
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
    """At once when it is alone; runs of a sweep take turns."""
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
    """What is started here ignores Ctrl-C and hang-up, finds this very code, and writes to `log`.

    With the terminal's own streams it would keep a pipe open that somebody reads (`launch.py ... follow=false | tee`).
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
