"""Show a run's progress bar until its job ends, then its state and, after a failure, the end of the log.

Following only reads files and Slurm's queue: Ctrl-C stops following, not the run.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from realsr_hpc import runfolder
from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.launch.rundir import ALIVE, Status, current_status
from realsr_hpc.tracking import read_progress

POLL_LOCAL_S = 0.5
POLL_SLURM_S = 5.0
EXIT_CODES = {"done": DONE, "stopped": STOPPED}


def follow(run_dir: Path, console: Console, *, slurm: bool = False) -> int:
    """Follow a run; returns the job's exit code: 0 done, 85 stopped with a checkpoint, else failed."""
    columns = (TextColumn("{task.fields[state]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None, state="submitted")
        try:
            status = _wait(run_dir, bar, task, POLL_SLURM_S if slurm else POLL_LOCAL_S)
        except KeyboardInterrupt:
            status = None
    if status is None:
        known = run_dir.name if run_dir.parent == runfolder.usual_root() else str(run_dir)
        follow_it, end_it = [shlex.join(["realsr-hpc", "jobs", f"{action}={known}"]) for action in ("follow", "cancel")]
        console.print(f"The run continues. Follow it: {follow_it}; end it: {end_it}", markup=False, soft_wrap=True)
        return 0
    console.print(f"{run_dir.name}: {status.state}" + (f"\n{status.message}" if status.message else ""), markup=False)
    return EXIT_CODES.get(status.state, status.code or 1)


def _wait(run_dir: Path, bar: Progress, task, poll_s: float) -> Status:
    shown = -1
    while True:
        status = current_status(run_dir)
        if status is None:
            raise ValueError(f"{run_dir}: no status.json; launch the run first")
        progress = read_progress(run_dir)
        if progress:
            bar.update(task, completed=progress.step, total=progress.total, description=progress.text)
            if not bar.console.is_terminal and progress.step != shown:
                shown = progress.step
                bar.console.print(f"step {shown}/{progress.total}  {progress.text}", markup=False)
        bar.update(task, state=status.state)
        if status.state not in ALIVE:
            return status
        time.sleep(poll_s)
