"""The interface of a reward: it has a range (higher is better), is deterministic, scores batches, and never raises.

A rollout without a final image gets the minimum of every image reward; that does not count as a failure. If the reward
itself fails on a rollout (an exception or a non-finite value), the rollout also gets the minimum, and the failure is
counted and logged.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from realsr_hpc.records import Candidate
from realsr_hpc.vlcot.sequence import FIELDS

FINAL_IMAGE = FIELDS[-1:]
"""The part of the trace that image rewards judge."""
logger = logging.getLogger(__name__)


class NotAnswered(Exception):
    """Another process gave no scores; the reason has already been logged."""


class Reward(ABC):
    """Base class of rewards: implement `compute`, set `range` and `needs_image`.

    A candidate's score must depend on that candidate alone, because batches are distributed over the ranks of a
    replica.
    """

    range: tuple[float, float] = (0.0, 1.0)
    needs_image: bool = False
    judges: tuple[str, ...] = FIELDS
    """Parts of the trace that determine the score; with grpo.credit=part only their tokens get its advantage."""

    def to(self, device: torch.device) -> None:  # noqa: B027  (most rewards have none)
        """Move the reward's networks, if it has any."""

    @abstractmethod
    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n], float64, higher is better. With `needs_image` all candidates have an image. May raise."""

    def score(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n], float64 within `range`; never raises."""
        return self.score_counted(candidates)[0]

    def score_counted(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float64 [n], and which of them failed, bool [n]; never raises."""
        low, high = self.range
        scores = np.full(len(candidates), low, dtype=np.float64)
        chosen = [i for i, item in enumerate(candidates) if item.image is not None or not self.needs_image]
        if not chosen:
            return scores, np.zeros(len(candidates), dtype=bool)
        # candidates without an image, where one is needed, keep the lowest score and are no failures
        raw = self._compute_safely([candidates[i] for i in chosen])
        broken = np.zeros(len(candidates), dtype=bool)
        broken[chosen] = ~np.isfinite(raw)
        scores[chosen] = np.clip(np.where(np.isfinite(raw), raw, low), low, high)
        return scores, broken

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`score_counted` of each batch."""
        return [self.score_counted(batch) for batch in batches]

    def score_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """Scores of each place of the judged part, float64 [n, places] in order, higher is better; never raises.

        Places are those of `TraceCodec.places_of`: the codes of an image or the pieces of a phrase. A row is NaN if
        the trace cannot be scored by place. None: the reward scores whole traces only.
        """
        try:
            return self.compute_places(candidates)
        except Exception:  # a reward must not stop training, as in `_compute_safely`
            logger.exception("%s broke on the places of a batch of %d", type(self).__name__, len(candidates))
            return None

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """The result of `score_places`. May raise."""
        return None

    def _compute_safely(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores of a batch. If it raises, candidates are scored one by one; those that raise get NaN."""
        try:
            scores = np.asarray(self.compute(candidates), dtype=np.float64)
            if scores.shape == (len(candidates),):
                return scores
            raise ValueError(f"{type(self).__name__}.compute: shape {scores.shape} for {len(candidates)} candidates")
        except NotAnswered:
            pass
        except Exception:  # a reward must not stop training; failures are logged and counted
            logger.exception("%s failed on a batch of %d", type(self).__name__, len(candidates))
        if len(candidates) == 1:
            return np.array([np.nan])
        return np.concatenate([self._compute_safely([item]) for item in candidates])
