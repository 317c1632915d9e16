"""pyiqa's metrics in their own unit, for evaluation; weights are staged as for rewards (see pyiqa_adapter.py)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any  # pyiqa's metrics

import numpy as np
import torch

from realsr_hpc.quality.pyiqa_adapter import create_metric, load_pyiqa


class PyiqaScore:
    """One metric by pyiqa's name: `fid` compares two folders, any other scores an image, if needed with its truth."""

    def __init__(self, name: str, weights_dir: str | None = None, device: str = "cpu"):
        """Raises ValueError if pyiqa, the metric or its weights are missing."""
        load_pyiqa(weights_dir)
        from pyiqa.default_model_configs import DEFAULT_CONFIGS

        if name not in DEFAULT_CONFIGS:
            raise ValueError(f"pyiqa has no metric {name!r}; python -c 'import pyiqa; print(pyiqa.list_models())'")
        entry = DEFAULT_CONFIGS[name]
        self.name, self.device = name, torch.device(device)
        self.lower_is_better = bool(entry.get("lower_better", False))
        self.needs_truth = entry.get("metric_mode") == "FR"
        options = ", ".join(f"{key}={value}" for key, value in entry.get("metric_opts", {}).items()) or "its defaults"
        self.note = f"pyiqa {importlib.metadata.version('pyiqa')} `{name}` ({options}), RGB input, no border left out"
        self._metric: Any = create_metric(name, device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, truth: np.ndarray | None = None) -> float:
        """Score of an RGB uint8 image [H, W, 3]; NaN if the metric needs a truth and there is none."""
        if self.needs_truth and truth is None:
            return float("nan")
        inputs = [image, truth] if self.needs_truth else [image]
        pixels = [torch.from_numpy(np.array(x)).permute(2, 0, 1)[None].float() / 255.0 for x in inputs]
        return float(self._metric(*(x.to(self.device) for x in pixels)))

    @torch.no_grad()
    def of_folders(self, ours: Path, truths: Path) -> float:
        """Distance between two folders of images (`fid`)."""
        return float(self._metric(str(ours), str(truths)))


def open_scores(names: Sequence[str], weights_dir: str | None) -> tuple[list[PyiqaScore], dict[str, str]]:
    """The metrics that can be computed here, and by name the reason why others cannot."""
    scores, missing = [], {}
    for name in names:
        try:
            scores.append(PyiqaScore(name, weights_dir))
        except ValueError as error:
            missing[name] = str(error)
    return scores, missing
