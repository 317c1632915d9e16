"""Runs, their states and logs: `realsr-hpc jobs [root=DIR]`; cancel=RUN, resume=RUN, follow=RUN, reconcile=true.

    json=true             the list as JSON, for other programs: state, Slurm's state and reason, step, job, message
    cancel=RUN wait_s=900 ask for a checkpoint at the next step; Slurm ends the job if that takes longer than wait_s
    prune=true            snapshots of the code that no run's folder links to; with yes=true they are removed
    watch=true            a live board: steps, rewards, speed, time left; keys to follow, cancel and resume a run
    report=true           device-hours, step time and memory of every run, measured and planned

RUN is a run's name, a unique prefix of it, or its folder. A `lost` run's job disappeared without a report (the machine
went down, SIGKILL); resume continues from its last checkpoint, also on another layout or cluster:
`resume=RUN parallel.tp=2 cluster.nodes=4`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc.config.arguments import read_count, read_flag, read_with_overrides
from realsr_hpc.files import GIB
from realsr_hpc.launch.console import print_submissions
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.manage import CANCEL_WAIT_S, cancel, reconcile, resume, rows
from realsr_hpc.launch.prune import remove_snapshots, unused_snapshots
from realsr_hpc.launch.rundir import read_job
from realsr_hpc.launch.used import used_table
from realsr_hpc.launch.watch import watch
from realsr_hpc.runfolder import find_run

OPTIONS = {
    "root": "runs",
    "cancel": "",
    "wait_s": f"{CANCEL_WAIT_S:.0f}",
    "resume": "",
    "follow": "",
    "reconcile": "false",
    "json": "false",
    "prune": "false",
    "yes": "false",
    "watch": "false",
    "report": "false",
}
FLAGS = ("reconcile", "json", "prune", "yes", "watch", "report")
ACTIONS = ("cancel", "resume", "follow", "watch", "report", "prune", "json")
"""At most one of these per call; without one, runs are listed."""
GO_WITH = {"wait_s": "cancel", "yes": "prune"}
"""Options that need another one."""


def main(arguments: list[str]) -> int:
    """Returns 0; 2 for a wrong option or an unknown run; with follow=RUN the job's exit code."""
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    try:
        options, overrides = read_with_overrides(arguments, OPTIONS, __doc__, sections_only=True)
        if overrides and not options["resume"]:
            raise ValueError(f"{overrides[0]}: overrides are only for resume=RUN")
        flags = {key: read_flag(options, key) for key in FLAGS}
        refuse_what_would_be_lost(options)
        root = Path(options["root"]).resolve()
        if options["root"] != OPTIONS["root"] and not root.is_dir():
            raise ValueError(f"root={root}: no such folder; name the output_root of your runs")
        if options["cancel"]:
            wait_s = read_count(options, "wait_s")
            console.print(cancel(find_run(root, options["cancel"]), wait_s), soft_wrap=True)
        elif options["resume"]:
            submission = resume(find_run(root, options["resume"]), overrides)
            print_submissions([submission], console)
            return 1 if submission.failed else 0
        elif options["follow"]:
            run_dir = find_run(root, options["follow"])
            job = read_job(run_dir)
            return follow(run_dir, console, slurm=job is not None and job.kind == "slurm")
        else:
            return about_all(root, flags, console)
    except ValueError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 2
    return 0


def about_all(root: Path, flags: dict[str, bool], console: Console) -> int:
    """Perform the action of the given flag on all runs, or list them; returns the exit code."""
    if flags["reconcile"]:
        console.print(f"ended without reporting a state: {', '.join(reconcile(root)) or 'none'}")
    if flags["watch"]:
        return watch(root, console)
    if flags["report"]:
        console.print(used_table(root))
    elif flags["prune"]:
        prune(root, console, remove=flags["yes"])
    elif flags["json"]:
        print(json.dumps([asdict(row) for row in rows(root)], default=str, indent=1))
    else:
        show(root, console)
    return 0


def refuse_what_would_be_lost(options: dict[str, str]) -> None:
    """Raise ValueError for two actions at once, and for an option of an action that is not given."""
    chosen = [key for key in ACTIONS if options[key] not in ("", "false")]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]} and {chosen[1]} exclude each other; run the command once for each")
    for key, action in GO_WITH.items():
        if options[key] != OPTIONS[key] and action not in chosen:
            raise ValueError(f"{key}={options[key]} goes with {action}")


def prune(root: Path, console: Console, *, remove: bool) -> None:
    """List the code snapshots that no run needs, or remove them."""
    found = remove_snapshots(root) if remove else unused_snapshots(root)
    for item in found:
        word = "removed" if remove else "not needed"
        console.print(f"{word}: {item.path} ({item.num_bytes / GIB:.3f} GiB)", soft_wrap=True)
    if not found:
        console.print(f"every snapshot of {root} belongs to a run")
    elif not remove:
        console.print("prune=true yes=true removes them")


def show(root: Path, console: Console) -> None:
    """Print one line per run."""
    table = Table("run", "state", "step", "job", box=None)
    table.add_column("log", overflow="fold")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows(root):
        table.add_row(row.name, row.states, row.progress, row.job, str(row.log))
    console.print(table if table.row_count else f"no runs in {root}")
