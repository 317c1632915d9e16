"""Send to MLflow what runs logged while it was unreachable: `realsr-hpc sync-tracking [root=DIR] [run=NAME]`.

Nothing is sent twice, so it may be run at any time, even while runs are active elsewhere. The final state of ended runs
is recorded in MLflow, too.
"""

import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_arguments
from realsr_hpc.launch.rundir import ALIVE, current_status
from realsr_hpc.runfolder import find_run, list_runs
from realsr_hpc.tracking import set_status, sync

ENDS = {"done": "FINISHED", "failed": "FAILED"}
"""MLflow's status by state; that of stopped and lost runs is KILLED."""


def main(arguments: list[str]) -> int:
    """Exit code 0; 1 when some run could not be sent; 2 for a wrong option."""
    try:
        options = read_arguments(arguments, {"root": "runs", "run": ""}, __doc__)
        root = Path(options["root"]).resolve()
        if options["root"] != "runs" and not root.is_dir():
            raise ValueError(f"root={root}: no such folder; name the output_root of your runs")
        runs = [find_run(root, options["run"])] if options["run"] else list_runs(root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for run in runs:
        status = current_status(run)
        if status is not None and status.state in ALIVE:
            print(f"{run.name}: {status.state}, it sends its own events")
            continue
        try:
            print(f"{run.name}: {sync(run)} events sent")
            if status is not None:
                set_status(run, ENDS.get(status.state, "KILLED"))
        except Exception as error:  # each run's fault is reported, the others are still sent
            failed += 1
            print(f"{run.name}: not sent ({type(error).__name__}: {error})", file=sys.stderr)
    return 1 if failed else 0
