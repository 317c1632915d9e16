"""The five words that label a sample's degradation. `degradation.labels` selects what they describe.

`applied` (`applied.py`): the drawn numbers. `visible` (`visible.py`): the damage still visible in the LQ image; light,
medium and heavy are separated by the terciles for the recipe's preset and sizes, so that the words are about equally
frequent. Both name the resizes as drawn.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from realsr_hpc.config.schema import DegradationConfig
from realsr_hpc.data.applied import applied_words
from realsr_hpc.data.degradation import PRESETS, DegradationParameters
from realsr_hpc.data.visible import Edges, tercile_edges, visible
from realsr_hpc.records import LEVELS, DegradationLabel, Level, Operators

BRIGHTNESS_STRIDE = 4
"""The mean brightness of a photograph is computed from every 4th pixel down and across."""


class Labeller:
    """Labels samples whose truths have a side of `gt_px` and whose LQ images a side of `gt_px // upscale`."""

    def __init__(self, config: DegradationConfig, gt_px: int, upscale: int) -> None:
        self._config, self._gt_px, self._lq_px = config, gt_px, gt_px // upscale
        self._edges: dict[str, Edges] = {}
        if config.labels == "visible":
            self._edges = {**tercile_edges(config.preset, gt_px, upscale), **config.severity_edges}

    def __call__(
        self, parameters: DegradationParameters, operators: Operators, photograph: np.ndarray
    ) -> DegradationLabel:
        """The label of one sample, from its drawn parameters, their operators, and the photograph."""
        if self._config.labels == "applied":
            return applied_words(parameters, PRESETS[self._config.preset], self._config.severity_edges)
        brightness = float(photograph[::BRIGHTNESS_STRIDE, ::BRIGHTNESS_STRIDE].mean())
        seen = visible(parameters, operators, self._gt_px, self._lq_px, brightness)
        levels: list[Level] = [
            LEVELS[sum(value >= edge for edge in self._edges[name])] for name, value in asdict(seen).items()
        ]
        blur, noise, compression = levels
        return DegradationLabel(blur, parameters.first.resize, noise, compression, parameters.second.resize)
