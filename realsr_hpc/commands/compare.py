"""Compare runs from MLflow: `realsr-hpc compare sweep=NAME` or `runs=a,b` [metric=KEY] [output=DIR].

Runs that differ in their seed alone become one row with an interval. Written to output= (default ROOT/compare/NAME):
comparison.md and .html (tables, cost, differing recipe keys, pictures), comparison.csv (one line per run), curves.png,
and grid.png: the same inputs restored by each run, from its evaluation or from the held-out rollouts that training
kept. Options: root=DIR (output root, default runs/), uri=MLFLOW_URI, experiment=NAME.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc.compare import (
    Comparison,
    compare,
    connect,
    find_runs,
    find_sweep,
    group_runs,
    readable,
    refuse_unknown_metric,
    write_report,
)
from realsr_hpc.config.arguments import read_arguments
from realsr_hpc.config.identity import digest

OPTIONS = {
    "sweep": "", "runs": "", "metric": "", "output": "", "root": "runs", "uri": "", "experiment": "realsr_hpc",
}  # fmt: skip

LONGEST_NAME = 200
"""In bytes; most file systems allow 255."""


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for a wrong option or an unknown run."""
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    try:
        options = read_arguments(arguments, OPTIONS, __doc__)
        if bool(options["sweep"]) == bool(options["runs"]):
            raise ValueError("give either sweep=NAME or runs=a,b")
        root = Path(options["root"]).resolve()
        if not options["uri"] and not (root / "mlflow.db").is_file():
            raise ValueError(
                f"root={root} has no mlflow.db: no run was launched there; name root=DIR or uri=MLFLOW_URI"
            )
        comparison = read(options, options["uri"] or f"sqlite:///{root / 'mlflow.db'}", root)
        output = Path(options["output"] or root / "compare" / folder_name(options))
        files = write_report(comparison, output, options["sweep"] or options["runs"])
    except ValueError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 2
    show(comparison, console)
    console.print(f"{output}: {', '.join(file.name for file in files)}", soft_wrap=True)
    return 0


def folder_name(options: dict[str, str]) -> str:
    """Name of the report's folder: the sweep or the runs, shortened with a hash if it is too long for a folder name."""
    name = options["sweep"] or options["runs"].replace(",", "-vs-")
    return name if len(name.encode()) <= LONGEST_NAME else f"{name[:80]}-{digest(name)[:8]}"


def read(options: dict[str, str], uri: str, root: Path) -> Comparison:
    """Read the named runs from MLflow. ValueError if it does not answer, or a run or the metric is unknown."""
    mlflow = connect(uri)
    with readable(uri):
        if options["sweep"]:
            runs = find_sweep(mlflow, options["experiment"], options["sweep"])
        else:
            runs = find_runs(mlflow, options["experiment"], options["runs"].split(","))
        comparison = compare(runs, options["metric"], mlflow, root)
    if options["metric"]:
        refuse_unknown_metric(comparison)
    return comparison


def show(comparison: Comparison, console: Console) -> None:
    """Print one line per group, and the best run."""
    metrics = comparison.columns()[:6]
    table = Table("runs", "n", "finished", *metrics)
    for group in group_runs(comparison):
        finished = sum(run.status == "FINISHED" for run in group.runs)
        style = "bold green" if comparison.best in group.runs else ""
        values = [str(group.final(key)) for key in metrics]
        table.add_row(group.label, str(len(group.runs)), str(finished), *values, style=style)
    console.print(table)
    best = comparison.best
    if best is None:
        console.print(f"no run has {comparison.metric} yet")
    else:
        console.print(f"best by {comparison.metric}: {best.name} ({best.metrics[comparison.metric]:.4g})")
