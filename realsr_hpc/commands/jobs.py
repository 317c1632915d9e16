"""Runs, their states and logs: `realsr-hpc jobs [root=DIR]`; cancel=RUN, resume=RUN, follow=RUN, reconcile=true.

RUN is a run's name, a unique beginning of it, or its folder. A run that is `lost` ended without a word (the machine
went down, SIGKILL); resume goes on from its last checkpoint, also on another layout or cluster:
`resume=RUN parallel.tp=2 cluster.nodes=4`.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc.config.arguments import read_with_overrides
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.manage import cancel, reconcile, resume, rows
from realsr_hpc.launch.report import print_submissions
from realsr_hpc.launch.rundir import find_run, read_job

OPTIONS = {"root": "runs", "cancel": "", "resume": "", "follow": "", "reconcile": ""}


def main(arguments: list[str]) -> int:
    """Exit code 0; 2 for a wrong option or an unknown run; with follow the job's."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        options, overrides = read_with_overrides(arguments, OPTIONS, __doc__, sections_only=True)
        if overrides and not options["resume"]:
            raise ValueError(f"{overrides[0]}: an override goes with resume=RUN")
        root = Path(options["root"]).resolve()
        if options["cancel"]:
            console.print(cancel(find_run(root, options["cancel"])), markup=False)
        elif options["resume"]:
            print_submissions([resume(find_run(root, options["resume"]), overrides)], console)
        elif options["follow"]:
            run_dir = find_run(root, options["follow"])
            job = read_job(run_dir)
            return follow(run_dir, console, slurm=job is not None and job.kind == "slurm")
        else:
            if options["reconcile"]:
                console.print(f"ended without a word: {', '.join(reconcile(root)) or 'none'}", markup=False)
            show(root, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    return 0


def show(root: Path, console: Console) -> None:
    """One line a run."""
    table = Table("run", "state", "step", "job", box=None)
    table.add_column("log", overflow="fold")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows(root):
        table.add_row(row.name, row.state, row.progress, row.job, str(row.log))
    console.print(table if table.row_count else f"no runs in {root}")
