"""Understanding reward: are the content tags named, and do the three texts say what their captions say?

Tags: share of the tags that stand in the rough text as whole words, singular or plural. Similarity: chrF
(Popovic 2015; the chrF2 of sacrebleu, character 1..6-grams, beta 2, no weights to load) or the cosine of
MiniLM sentence embeddings. Without tags or captions the term is 0 for every rollout of the group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from realsr_hpc.config.reward_options import UnderstandingOptions
from realsr_hpc.records import SceneText
from realsr_hpc.rewards.base import Candidate, Reward

_CHRF_ORDER = 6
_CHRF_BETA = 2.0


class UnderstandingReward(Reward):
    """Weighted mean of the tag share and the caption similarity."""

    def __init__(self, options: UnderstandingOptions):
        self.options = options
        self._minilm = None
        if options.similarity == "minilm":
            from realsr_hpc.rewards.minilm import MiniLM

            self._minilm = MiniLM()

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        tags = np.array([tag_share(item.trace.texts[0], item.scene) for item in candidates], np.float64)
        if self.options.similarity == "none":
            return tags
        weight = self.options.tags_weight
        return weight * tags + (1.0 - weight) * self._similarities(candidates)

    def _similarities(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Mean over the three texts, [n]; a missing text or caption counts 0."""
        totals = np.zeros(len(candidates))
        pairs = [
            (i, text, caption)
            for i, item in enumerate(candidates)
            if item.scene is not None
            for text, caption in zip(item.trace.texts, item.scene.captions, strict=True)
            if text and caption
        ]
        texts, captions = [text for _, text, _ in pairs], [caption for _, _, caption in pairs]
        values = self._minilm.similarity(texts, captions) if self._minilm else list(map(chrf, texts, captions))
        np.add.at(totals, [i for i, _, _ in pairs], values)
        return totals / 3.0


def tag_share(text: str | None, scene: SceneText | None) -> float:
    """Share of the scene's tags named in the text as whole words, plural or singular."""
    if text is None or scene is None or not scene.tags:
        return 0.0
    words = " ".join(map(_singular, _words(text)))
    named = [re.search(rf"\b{re.escape(' '.join(map(_singular, _words(tag))))}\b", words) for tag in scene.tags]
    return sum(hit is not None for hit in named) / len(named)


def chrf(text: str, reference: str) -> float:
    """chrF2 of one text in [0, 1]: F-beta of the mean precision and recall over orders both texts have."""
    hypothesis, truth = "".join(text.split()), "".join(reference.split())
    rates = []
    for order in range(1, _CHRF_ORDER + 1):
        ours, theirs = _ngrams(hypothesis, order), _ngrams(truth, order)
        if ours and theirs:
            hits = (ours & theirs).total()
            rates.append((hits / ours.total(), hits / theirs.total()))
    if not rates:
        return 0.0
    precision, recall = np.mean(rates, axis=0)
    weight = _CHRF_BETA**2
    below = weight * precision + recall
    return float((1 + weight) * precision * recall / below) if below > 0 else 0.0


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _singular(word: str) -> str:
    """A rough English singular; both sides pass through it, so it only has to be consistent."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
