"""Turns a loader's batch into the cases of an evaluation, each with a unique name."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from realsr_hpc.data.naming import flat_names
from realsr_hpc.records import Case, LQBatch


def cases_of(batch: LQBatch) -> list[Case]:
    """The batch's images as cases; a photograph that occurs several times is numbered."""
    uses, cases = Counter(batch.keys), batch.cases()
    keys = [f"{case.key}-{case.index}" if uses[case.key] > 1 else case.key for case in cases]
    return [_contiguous(case, key) for case, key in zip(cases, flat_names(keys), strict=True)]


def _contiguous(case: Case, key: str) -> Case:
    """The case with contiguous arrays, as if read from files, so that metrics are bitwise equal to those of a set that
    was written and read again."""
    gt = None if case.gt is None else np.ascontiguousarray(case.gt)
    return replace(case, key=key, lq=np.ascontiguousarray(case.lq), gt=gt)
