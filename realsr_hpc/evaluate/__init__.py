"""Restored images against their truths, on named test sets: metrics with intervals, pictures, words, published tables.

`cases` and `sets` say what is restored, `methods` by what, `metrics` and `words` how it is judged, `run` does it over
all ranks, `report` writes it down. A method that gave no image for some inputs is averaged over those it gave, with
their number beside; a metric whose weights are not there is listed as not computed; nothing is filled in.
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
