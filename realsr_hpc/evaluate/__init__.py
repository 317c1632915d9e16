"""Evaluates restoration methods on test sets: metrics with intervals, image grids, texts and published results.

`cases` and `sets` define the inputs, `methods` the restorers, `metrics` and `words` the measurements; `runner` executes
them on all ranks and `report` writes the result. If a method has no image for some inputs, its mean is over the others
and the report states their number. A metric whose weights are missing is listed as not computed.
"""

from realsr_hpc.evaluate.cases import cases_of
from realsr_hpc.evaluate.intervals import Interval, bootstrap
from realsr_hpc.evaluate.methods import BICUBIC, Bicubic, FinishedImages, Method
from realsr_hpc.evaluate.metrics import Metrics
from realsr_hpc.evaluate.report import EvaluationReport
from realsr_hpc.evaluate.runner import World, evaluate
from realsr_hpc.evaluate.sets import NAMED_SETS, open_set

__all__ = [
    "BICUBIC",
    "NAMED_SETS",
    "Bicubic",
    "EvaluationReport",
    "FinishedImages",
    "Interval",
    "Method",
    "Metrics",
    "World",
    "bootstrap",
    "cases_of",
    "evaluate",
    "open_set",
]
