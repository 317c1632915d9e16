"""Compare runs from MLflow: `python tools/compare.py sweep=NAME` or `runs=a,b` [metric=KEY] [output=DIR].

Options: root=DIR (output root, default runs/), uri=MLFLOW_URI, experiment=NAME. Prints a table and the best run;
writes comparison.csv and curve.png to output= (default: ROOT/compare/NAME).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from realsr_hpc.compare import Comparison, compare, connect, find_runs, find_sweep, plot_curves  # noqa: E402
from realsr_hpc.launch.arguments import read_options  # noqa: E402

OPTIONS = {
    "sweep": "", "runs": "", "metric": "", "output": "", "root": "runs", "uri": "", "experiment": "realsr_hpc",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for a wrong option or an unknown run."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        options = read_options(arguments, OPTIONS, __doc__ or "")
        if bool(options["sweep"]) == bool(options["runs"]):
            raise ValueError("give either sweep=NAME or runs=a,b")
        root = Path(options["root"]).resolve()
        mlflow = connect(options["uri"] or f"sqlite:///{root / 'mlflow.db'}")
        if options["sweep"]:
            runs = find_sweep(mlflow, options["experiment"], options["sweep"])
        else:
            runs = find_runs(mlflow, options["experiment"], options["runs"].split(","))
        comparison = compare(runs, options["metric"])
        default = root / "compare" / (options["sweep"] or options["runs"].replace(",", "-vs-"))
        output = Path(options["output"] or default)
        output.mkdir(parents=True, exist_ok=True)
        comparison.write_csv(output / "comparison.csv")
        curve = next((run for run in (comparison.metric, "rewards/total/mean") if run), "")
        plot_curves(mlflow, comparison, curve, output / "curve.png")
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    show(comparison, console)
    console.print(f"written: {output / 'comparison.csv'}, {output / 'curve.png'}", markup=False, soft_wrap=True)
    return 0


def show(comparison: Comparison, console: Console) -> None:
    """The table, best run first said in words."""
    metrics = comparison.columns()[:6]
    table = Table("run", "status", *comparison.differing[:4], *metrics)
    for run in comparison.runs:
        style = "bold green" if run is comparison.best else ""
        varied = [run.params.get(key, "") for key in comparison.differing[:4]]
        values = [f"{run.metrics[key]:.4g}" if key in run.metrics else "-" for key in metrics]
        table.add_row(run.name, run.status, *varied, *values, style=style)
    console.print(table)
    best = comparison.best
    if best is None:
        console.print(f"no run has {comparison.metric} yet")
    else:
        console.print(f"best by {comparison.metric}: {best.name} ({best.metrics[comparison.metric]:.4g})", markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
