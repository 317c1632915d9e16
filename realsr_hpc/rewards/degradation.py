"""Degradation reward: the weighted share of slots in which the written phrase matches the true words.

Slots: blur, first resize, noise, compression, second resize. The phrase is parsed leniently: order and other words do
not matter. A slot that is named twice with different words counts as empty, so that naming every word does not score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple
from typing import cast

import numpy as np

from realsr_hpc.config.reward_options import DegradationOptions
from realsr_hpc.records import LEVELS, Candidate, DegradationLabel
from realsr_hpc.rewards.base import Reward

Slots = tuple[str | None, str | None, str | None, str | None, str | None]


class DegradationReward(Reward):
    """Weighted share of the five slots that the trace names correctly; 0 if the truth is unknown."""

    judges = ("degradation",)

    def __init__(self, options: DegradationOptions):
        self.options = options

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        return np.array([self._score_phrase(item.trace.degradation, item.label) for item in candidates], np.float64)

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Credit of each slot times its weight, [n, 5]; the sum of a row is the score.

        A row is NaN without a truth, and for a phrase that is not five pieces between commas in the order of the slots.
        """
        weights = np.array(self.options.slot_weights) / sum(self.options.slot_weights)
        scores = np.full((len(candidates), len(weights)), np.nan)
        for row, item in enumerate(candidates):
            if item.label is not None and item.trace.degradation is not None and _in_order(item.trace.degradation):
                scores[row] = weights * self._credits(item.trace.degradation, item.label)
        return scores

    def _score_phrase(self, phrase: str | None, label: DegradationLabel | None) -> float:
        if phrase is None or label is None:
            return 0.0
        return float(np.average(self._credits(phrase, label), weights=self.options.slot_weights))

    def _credits(self, phrase: str, label: DegradationLabel) -> list[float]:
        slots = zip(read_phrase(phrase), astuple(label), strict=True)
        return [_credit(predicted, true, self.options.neighbour) for predicted, true in slots]


def read_phrase(phrase: str) -> Slots:
    """Words for blur, resize 1, noise, compression and resize 2 in a phrase; None for a slot that it does not name.

    A single resize word counts as the first resize if it comes before the noise word, else as the second.
    """
    text = phrase.lower()
    levels = {kind: _only(re.findall(rf"\b({'|'.join(LEVELS)})\s+{kind}\b", text)) for kind in _KINDS}
    first, second = _resizes(text)
    return (levels["blur"], first, levels["noise"], levels["compression"], second)


def slot_matches(phrase: str | None, label: DegradationLabel) -> np.ndarray:
    """Which of the five slots match, bool [5] in the order of `DegradationLabel`."""
    predicted = read_phrase(phrase) if phrase is not None else (None,) * 5
    return np.array([a == b for a, b in zip(predicted, astuple(label), strict=True)])


_KINDS = ("blur", "noise", "compression")


def _in_order(phrase: str) -> bool:
    """Whether the phrase has one piece for each slot, in the order of `DegradationLabel`."""
    pieces = phrase.lower().split(",")
    kinds = [next((kind for kind in _KINDS if piece.endswith(kind)), "resize") for piece in pieces]
    return kinds == ["blur", "resize", "noise", "compression", "resize"]


def _only(words: list[str]) -> str | None:
    return words[0] if len(set(words)) == 1 else None


def _resizes(text: str) -> tuple[str | None, str | None]:
    found = list(re.finditer(r"\b(upsample|downsample|keep)\b", text))
    if len(found) == 2:
        return found[0][1], found[1][1]
    if len(found) != 1:
        return None, None
    noise = text.find("noise")
    is_first = noise < 0 or found[0].start() < noise
    return (found[0][1], None) if is_first else (None, found[0][1])


def _credit(predicted: str | None, true: str, neighbour: float) -> float:
    if predicted == true:
        return 1.0
    if predicted in LEVELS and true in LEVELS and abs(LEVELS.index(cast(str, predicted)) - LEVELS.index(true)) == 1:
        return neighbour
    return 0.0
