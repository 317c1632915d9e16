"""Measures a model's texts: the five degradation slots against the true ones, the texts against their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np

from realsr_hpc.records import DegradationLabel, Level, ParsedTrace, Resize, SceneText
from realsr_hpc.rewards.degradation import read_phrase
from realsr_hpc.rewards.understanding import chrf, letters_right, tag_share, word_right

SLOTS = tuple(item.name for item in fields(DegradationLabel))
NOTHING = "nothing"
TEXT_NOTES = {
    "text_tags": "share of the truth's content tags named in the rough text",
    "text_chrf": "chrF2 of the three texts with their captions, mean",
    "text_word": "share of signs whose word the rough text names",
    "text_letters": "likeness of the sign's word and the one read: 1 - edits / longer length",
}


def slot_words(slot: str) -> tuple[str, ...]:
    """The possible words of a degradation slot."""
    return get_args(Resize) if slot.startswith("resize") else get_args(Level)


@dataclass(frozen=True)
class Confusion:
    """Counts [true words, predicted words + 1] of one slot; the last column counts unreadable answers."""

    slot: str
    counts: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of correct answers; NaN without cases."""
        return float(np.trace(self.counts) / self.counts.sum()) if self.counts.sum() else float("nan")

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent word."""
        return float(self.counts.sum(1).max() / self.counts.sum()) if self.counts.sum() else float("nan")

    def markdown(self) -> list[str]:
        """The counts as a Markdown table."""
        words = slot_words(self.slot)
        head = [f"| {self.slot}: true \\ predicted | " + " | ".join([*words, NOTHING]) + " |", "|---" * 5 + "|"]
        return head + [f"| {word} | " + " | ".join(map(str, row)) + " |" for word, row in zip(words, self.counts)]  # noqa: B905


def confusions(predicted: Sequence[str | None], truths: Sequence[str | None]) -> list[Confusion]:
    """One table per slot, over the cases whose true phrase is known."""
    counts = {slot: np.zeros((3, 4), dtype=int) for slot in SLOTS}
    for phrase, truth in zip(predicted, truths, strict=True):
        if truth is None:
            continue
        spoken = read_phrase(phrase) if phrase is not None else (None,) * len(SLOTS)
        for slot, word, right in zip(SLOTS, spoken, read_phrase(truth), strict=True):
            words = slot_words(slot)
            counts[slot][words.index(right or words[0]), words.index(word) if word in words else 3] += 1
    return [Confusion(slot, table) for slot, table in counts.items()]


def text_scores(trace: ParsedTrace, scene: SceneText | None) -> Mapping[str, float]:
    """The metrics of `TEXT_NOTES`, each in 0..1; NaN if the truth has no tags, captions or word."""
    if scene is None:
        return dict.fromkeys(TEXT_NOTES, float("nan"))
    pairs = zip(trace.texts, scene.captions, strict=True)
    likeness = [chrf(text, caption) if text else 0.0 for text, caption in pairs if caption]
    return {
        "text_tags": tag_share(trace.texts[0], scene) if scene.tags else float("nan"),
        "text_chrf": float(np.mean(likeness)) if likeness else float("nan"),
        "text_word": word_right(trace.texts[0], scene) if scene.word else float("nan"),
        "text_letters": letters_right(trace.texts[0], scene.word) if scene.word else float("nan"),
    }
