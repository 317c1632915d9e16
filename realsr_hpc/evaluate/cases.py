"""One image to restore, with what is known of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from realsr_hpc.data.naming import flat_names
from realsr_hpc.records import DegradationLabel, LQBatch, Operators, SceneText


@dataclass(frozen=True)
class Case:
    """RGB uint8 [h, w, 3] and its truth [H, W, 3], where there is one."""

    key: str
    """Unique in its set; can be a file's name."""
    lq: np.ndarray
    gt: np.ndarray | None = None
    label: DegradationLabel | None = None
    scene: SceneText | None = None
    index: int = 0
    """Decides a model's draws, whatever batch and rank the case falls to."""
    operators: Operators | None = None
    """What made `lq` of the truth, where it is known."""


def cases_of(batch: LQBatch) -> list[Case]:
    """A loader's batch as cases; a photograph that stands in it several times is numbered."""
    uses = Counter(batch.keys)
    lqs = _to_hwc(batch.lq)
    gts = [None] * len(batch) if batch.gt is None else list(_to_hwc(batch.gt))
    keys = [f"{key}-{index}" if uses[key] > 1 else key for key, index in zip(batch.keys, batch.index, strict=True)]
    operators = batch.operators or (None,) * len(batch)
    rows = zip(keys, lqs, gts, batch.labels, batch.scenes, batch.index.tolist(), operators, strict=True)
    return [Case(key, *rest) for key, (_, *rest) in zip(flat_names(keys), rows, strict=True)]


def batch_of(cases: list[Case]) -> LQBatch:
    """Cases of one size as a batch, without their truths."""
    pixels = torch.from_numpy(np.stack([case.lq for case in cases])).permute(0, 3, 1, 2).contiguous()
    labels, scenes = tuple(case.label for case in cases), tuple(case.scene for case in cases)
    index = torch.tensor([case.index for case in cases])
    return LQBatch(pixels, None, labels, scenes, tuple(case.key for case in cases), index)


def _to_hwc(images: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.cpu().permute(0, 2, 3, 1).numpy())
