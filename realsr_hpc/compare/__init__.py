"""Compares runs from MLflow: tables with intervals over seeds, curves, images of the same inputs, cost.

A sweep is the MLflow parent run that the launcher created; its children are the runs. Nothing is written to MLflow.
`runs` finds the runs, `repetitions` groups them over seeds, `figures` and `axes` draw, `summary` writes the report.
"""

from realsr_hpc.compare.figures import image_rows, plot_curves
from realsr_hpc.compare.repetitions import Estimate, Group, estimate, group_runs
from realsr_hpc.compare.runs import (
    ComparedRun,
    Comparison,
    compare,
    connect,
    find_runs,
    find_sweep,
    readable,
    refuse_unknown_metric,
)
from realsr_hpc.compare.summary import write_report

__all__ = [
    "ComparedRun",
    "Comparison",
    "Estimate",
    "Group",
    "compare",
    "connect",
    "estimate",
    "find_runs",
    "find_sweep",
    "group_runs",
    "image_rows",
    "plot_curves",
    "readable",
    "refuse_unknown_metric",
    "write_report",
]
