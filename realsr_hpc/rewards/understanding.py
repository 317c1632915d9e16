"""Understanding reward: whether the texts name the content tags and agree with their captions.

- Tags: the share of tags that occur in the rough text as whole words, singular or plural. With `synonyms` another word
  of the same WordNet sense, or words with a similar embedding, count as well.
- Captions: the similarity of each of the three texts with its caption, by sacrebleu's chrF2 (Popovic 2015: character
  1- to 6-grams, beta 2) or the cosine of MiniLM sentence embeddings.
- Words: if the image shows a known word (generated signs), part of the score is whether the rough text contains it.

Without tags or captions the term is 0 for every rollout of the group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from sacrebleu.metrics.chrf import CHRF

from realsr_hpc.config.reward_options import UnderstandingOptions
from realsr_hpc.paths import resolve
from realsr_hpc.records import Candidate, SceneText
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.wordnet import WordNet
from realsr_hpc.vlcot.sequence import TEXT_FIELDS

_CHRF = CHRF(char_order=6, word_order=0, beta=2)


class UnderstandingReward(Reward):
    """Weighted mean of the tag share, the caption similarity and, on signs, the word."""

    judges = TEXT_FIELDS

    def __init__(self, options: UnderstandingOptions, device: torch.device | str = "cpu"):
        self.options = options
        self._minilm = None
        self._wordnet = WordNet(resolve(options.wordnet_dir)) if options.synonyms == "wordnet" else None
        if "minilm" in (options.similarity, options.synonyms):
            from realsr_hpc.rewards.minilm import MiniLM

            self._minilm = MiniLM(device)

    def to(self, device: torch.device) -> None:
        """Move the sentence embedder."""
        if self._minilm is not None:
            self._minilm.to(device)

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]."""
        scores = np.array([self._tag_share(item) for item in candidates], np.float64)
        if self.options.similarity != "none":
            weight = self.options.tags_weight
            scores = weight * scores + (1.0 - weight) * self._similarities(candidates)
        return np.array([self._with_word(item, score) for item, score in zip(candidates, scores, strict=True)])

    def _with_word(self, item: Candidate, score: float) -> float:
        if item.scene is None or not item.scene.word:
            return score
        text, weight = item.trace.texts[0], self.options.word_weight
        exact = self.options.word_credit == "exact"
        right = word_right(text, item.scene) if exact else letters_right(text, item.scene.word)
        return weight * right + (1.0 - weight) * score

    def _tag_share(self, item: Candidate) -> float:
        text, scene = item.trace.texts[0], item.scene
        if self.options.synonyms == "none" or text is None or scene is None or not scene.tags:
            return tag_share(text, scene)
        named = np.array([names(text, tag) for tag in scene.tags])
        if self._wordnet is not None:
            synonyms = [any(names(text, word) for word in self._wordnet.synonyms(tag)) for tag in scene.tags]
            named = named | np.array(synonyms)
        elif self.options.synonyms == "minilm" and self._minilm is not None:
            named = named | (self._minilm.nearest(scene.tags, _phrases(text)) >= self.options.min_cosine)
        return float(named.mean())

    def _similarities(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Mean similarity [n] over the three texts; a missing text or caption counts as 0."""
        totals = np.zeros(len(candidates))
        pairs = [
            (i, text, caption)
            for i, item in enumerate(candidates)
            if item.scene is not None
            for text, caption in zip(item.trace.texts, item.scene.captions, strict=True)
            if text and caption
        ]
        texts, captions = [text for _, text, _ in pairs], [caption for _, _, caption in pairs]
        if self.options.similarity == "minilm" and self._minilm is not None:
            values = self._minilm.similarity(texts, captions)
        else:
            values = list(map(chrf, texts, captions))
        np.add.at(totals, [i for i, _, _ in pairs], values)
        return totals / 3.0


def tag_share(text: str | None, scene: SceneText | None) -> float:
    """Share (0..1) of the scene's tags that occur in the text as whole words, plural or singular."""
    if text is None or scene is None or not scene.tags:
        return 0.0
    return sum(names(text, tag) for tag in scene.tags) / len(scene.tags)


def word_right(text: str | None, scene: SceneText) -> float:
    """1.0 if the text contains the word that the image shows, else 0.0."""
    return float(text is not None and re.search(rf"\b{re.escape(scene.word)}\b", text, re.IGNORECASE) is not None)


def letters_right(text: str | None, word: str) -> float:
    """Similarity in [0, 1] of the word and the first all-capitals word of the text: 1 - edit distance / longer
    length."""
    found = re.search(r"\b[A-Z]{2,}\b", text or "")
    if found is None:
        return 0.0
    read, truth = found.group().lower(), word.lower()
    return 1.0 - edit_distance(read, truth) / max(len(read), len(truth))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the smallest number of inserted, removed and replaced letters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row, above = [i], row
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def names(text: str, tag: str) -> bool:
    """Whether the tag occurs in the text as whole words, plural or singular."""
    words = " ".join(map(_singular, _words(text)))
    return re.search(rf"\b{re.escape(' '.join(map(_singular, _words(tag))))}\b", words) is not None


def _phrases(text: str) -> list[str]:
    """Single words and neighbouring pairs."""
    words = _words(text)
    return words + [" ".join(pair) for pair in zip(words, words[1:], strict=False)]


def chrf(text: str, reference: str) -> float:
    """chrF2 of one text in [0, 1] (sacrebleu's sentence score, which is in percent)."""
    return _CHRF.sentence_score(text, [reference]).score / 100


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _singular(word: str) -> str:
    """An approximate English singular; it is applied to text and tag, so it only has to be consistent."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
