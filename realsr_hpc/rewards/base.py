"""The interface of a reward: it has a range (higher is better), is deterministic, scores batches, and never raises.

A rollout without a final image gets the minimum of every image reward; that is not counted as a failure. If the reward
itself fails on a rollout (an exception, a non-finite value), the rollout also gets the minimum, but is counted and
logged, so that a broken reward is noticed.
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
"""What image rewards judge."""
logger = logging.getLogger(__name__)


class NotAnswered(Exception):
    """A process elsewhere gave no scores; the reason has been logged already."""


class Reward(ABC):
    """Base of every reward: write `compute`, state `range` and `needs_image`.

    A candidate's score must depend on that candidate alone, since batches are distributed over the ranks of a replica.
    """

    range: tuple[float, float] = (0.0, 1.0)
    needs_image: bool = False
    judges: tuple[str, ...] = FIELDS
    """Parts of the trace that the score is read from."""

    def to(self, device: torch.device) -> None:  # noqa: B027  (most rewards have none)
        """Move the reward's networks, where it has any."""

    @abstractmethod
    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n], float64, higher is better; candidates have an image where `needs_image`. May raise."""

    def score(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n], float64 within `range`; never raises."""
        return self.score_counted(candidates)[0]

    def score_counted(self, candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float64 [n], and where computing one failed, bool [n]; never raises."""
        low, high = self.range
        scores = np.full(len(candidates), low, dtype=np.float64)
        chosen = [i for i, item in enumerate(candidates) if item.image is not None or not self.needs_image]
        if not chosen:
            return scores, np.zeros(len(candidates), dtype=bool)
        raw = self._compute_safely([candidates[i] for i in chosen])
        broken = np.zeros(len(candidates), dtype=bool)
        broken[chosen] = ~np.isfinite(raw)
        scores[chosen] = np.clip(np.where(np.isfinite(raw), raw, low), low, high)
        return scores, broken

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`score_counted` of each batch."""
        return [self.score_counted(batch) for batch in batches]

    def score_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """Scores of every place of the judged part by itself, float64 [n, places] in order, higher is better.

        Places are those of `TraceCodec.places_of`: an image's codes, a phrase's pieces. A row of NaN: this trace cannot
        be scored so; None: the reward has only one score for a trace. Never raises.
        """
        try:
            return self.compute_places(candidates)
        except Exception:  # as for the scores
            logger.exception("%s broke on the places of a batch of %d", type(self).__name__, len(candidates))
            return None

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """What `score_places` returns. May raise."""
        return None

    def _compute_safely(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """One batch; when it raises, item by item, NaN where an item raises alone."""
        try:
            scores = np.asarray(self.compute(candidates), dtype=np.float64)
            if scores.shape == (len(candidates),):
                return scores
            raise ValueError(f"{type(self).__name__}.compute: shape {scores.shape} for {len(candidates)} candidates")
        except NotAnswered:
            pass
        except Exception:  # a reward must not stop a run of days; what broke is logged and counted
            logger.exception("%s failed on a batch of %d", type(self).__name__, len(candidates))
        if len(candidates) == 1:
            return np.array([np.nan])
        return np.concatenate([self._compute_safely([item]) for item in candidates])
