"""A loader's batch as the cases of an evaluation, each under a name of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from realsr_hpc.data.naming import flat_names
from realsr_hpc.records import Case, LQBatch


def cases_of(batch: LQBatch) -> list[Case]:
    """The batch's images; a photograph that stands in it several times is numbered."""
    uses, cases = Counter(batch.keys), batch.cases()
    keys = [f"{case.key}-{case.index}" if uses[case.key] > 1 else case.key for case in cases]
    return [_contiguous(case, key) for case, key in zip(cases, flat_names(keys), strict=True)]


def _contiguous(case: Case, key: str) -> Case:
    """As if its images were read from files: a set that is written out and read again scores alike to the last bit."""
    gt = None if case.gt is None else np.ascontiguousarray(case.gt)
    return replace(case, key=key, lq=np.ascontiguousarray(case.lq), gt=gt)
