"""Format reward: whether the whole chain of thought is well formed.

1 for a well-formed trace, otherwise `partial` x (parts present / 7). The parts are the degradation phrase, three texts
and three images. Partial credit rewards each further part, and the step to a well-formed trace remains large. A text
that is too short, too long or repetitive does not count as a part, and its trace is not well formed for this reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from realsr_hpc.config.reward_options import FormatOptions
from realsr_hpc.records import Candidate, ParsedTrace
from realsr_hpc.rewards.base import Reward

_MIN_WORDS_FOR_REPETITION = 8


class FormatReward(Reward):
    """1 for a well-formed trace, partial credit below."""

    def __init__(self, options: FormatOptions):
        self.options = options

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        return np.array([self._score_trace(item.trace) for item in candidates], dtype=np.float64)

    def _score_trace(self, trace: ParsedTrace) -> float:
        texts = [text is not None and text_passes(text, self.options) for text in trace.texts]
        parts = [trace.degradation is not None, *texts, *(image is not None for image in trace.images)]
        if trace.well_formed and all(parts):
            return 1.0
        return self.options.partial * sum(parts) / len(parts)


def text_passes(text: str, options: FormatOptions) -> bool:
    """Whether the text is within the limits of length and repetition."""
    words = re.findall(r"\w+", text.lower())
    if not options.min_words <= len(words) <= options.max_words:
        return False
    return len(words) < _MIN_WORDS_FOR_REPETITION or len(set(words)) / len(words) >= options.min_distinct
