"""A command as a stage of a chain: its folder, job and state.

OUTPUT_ROOT/stages/<command>-<signature>/
    stage.json   the command and its arguments    status.json, job.json   as in a run's folder
    log.txt      what it printed                  output/                 what it wrote
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.launch.chain import OUTPUT, STAGE_FILE, CommandLine, Node
from realsr_hpc.launch.rundir import (
    LAUNCH_VARIABLE,
    Job,
    Queue,
    Status,
    current_status,
    make_private,
    read_status,
    write_job,
    write_status,
)
from realsr_hpc.launch.script import executor_parameters, setup_lines
from realsr_hpc.launch.signals import die_with_parent
from realsr_hpc.launch.snapshot import take_snapshot
from realsr_hpc.launch.start import NOT_SUBMITTED, refusal
from realsr_hpc.locks import hold
from realsr_hpc.paths import module_command, project_root, python_path

WROTE = {"evaluate": "metrics.csv", "export_hf": "config.json"}
"""The file that shows that a command has written its output: evaluate writes it last (an exception in it also ends with
code 1), an export appears under its name only when it is complete."""
WORKED = {"evaluate": (0, 1), "export_hf": (0,)}
"""Exit codes that count as done; evaluate's 1 means that it left out some images or metrics, which it names."""
LOG_END_CHARACTERS = 2000


def stage_status(node: Node, queue: Queue) -> Status | None:
    """The actual state of a command's stage; `done` requires that its output still exists."""
    status = current_status(node.folder, queue)
    if status is not None and status.state == "done" and not (node.output / WROTE[node.command]).exists():
        return Status("lost", None, f"{node.output} is gone")
    return status


def prepare_stage(node: Node) -> None:
    """Create the stage's folder with stage.json."""
    make_private(node.folder.parent)
    make_private(node.folder)
    line = CommandLine(node.command, list(node.arguments))
    write_atomically(node.folder / STAGE_FILE, json.dumps(asdict(line), indent=1))


def submit_stage(node: Node, after: Sequence[str]) -> str:
    """Submit to Slurm, to start after the jobs in `after` succeeded; returns the job's id.

    ValueError with sbatch's message if it is refused.
    """
    from realsr_hpc.launch.sbatch import Executor

    prepare_stage(node)
    cluster = node.config.cluster
    setup = setup_lines(cluster, take_snapshot([node.config]))
    launch = secrets.token_hex(8)
    try:
        executor = Executor(folder=node.folder / "job")
        executor.update_parameters(**executor_parameters(cluster, node.config.name, setup, after))
        job = executor.submit(stage_job, node.folder, launch)
    except NOT_SUBMITTED as error:
        raise ValueError(f"{node.stage}: {refusal(error)}; launch the chain again to continue") from None
    write_job(node.folder, Job("slurm", job.job_id, "", str(job.paths.stdout), launch, time.time()))
    return job.job_id


def stage_job(folder: Path, launch: str) -> int:
    """The function that submitit calls. SystemExit unless it succeeds, so that jobs which depend on it do not start."""
    os.environ[LAUNCH_VARIABLE] = launch
    try:
        code = run_stage(folder)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    if code:
        raise SystemExit(1)
    return 0


def run_stage(folder: Path) -> int:
    """Run a prepared command to its end and record its state; returns 0 if it wrote its output, else its exit code.

    A requeued job waits without limit for a first attempt that may still run on a node that Slurm cannot reach.
    Otherwise raises LockRefused (a ValueError) if another process runs the stage.
    """
    line = read_json(folder / STAGE_FILE, CommandLine)
    if line is None:
        raise ValueError(f"{folder / STAGE_FILE} is missing or damaged; launch the chain again to write it")
    command, output = line.command, folder / OUTPUT
    again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    with hold(runfolder.lock(folder), command, math.inf if again else 0.0):
        before = read_status(folder)
        if again and before and before.state == "done" and before.launch == os.environ.get(LAUNCH_VARIABLE):
            return 0  # the first attempt finished after Slurm had requeued the job
        write_status(folder, "running")
        if command == "export_hf" and output.exists():  # left by an attempt that was killed before it could report
            shutil.rmtree(output)
        started = time.time()
        called = module_command("realsr_hpc.commands", command, *line.arguments, f"output={output}")
        code = _call(called, folder / "log.txt")
        wrote = output / WROTE[command]
        if code in WORKED[command] and wrote.exists() and wrote.stat().st_mtime >= started - 1.0:
            write_status(folder, "done", 0, "" if code == 0 else f"not all of it, see {folder / 'log.txt'}")
            return 0
        with (folder / "log.txt").open(encoding="utf-8", errors="replace") as file:
            last = file.read()[-LOG_END_CHARACTERS:].strip()
        message = f"{command} ended with code {code}; the end of {folder / 'log.txt'}:\n{last}"
        write_status(folder, "failed", code, message)
        return code or 1


def _call(words: list[str], log: Path) -> int:
    with log.open("ab") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {os.uname().nodename}\n".encode())
        output.flush()
        return subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": python_path()},
            cwd=project_root(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            check=False,
        ).returncode
