"""Asynchronous successive halving: from the results at the rungs to the next move of a free slot.

Algorithm 2 of Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020): a run in the best 1 /
`keep` of those measured at its rung is promoted; no run waits for a rung to fill up. With the delay of Hyper-Tune (Li
et al., VLDB 2022): of n runs at a rung at most n / `keep` are promoted, as in synchronous halving. One rule is added
for finite sweeps: when nothing else is left to do, the best run of a rung is promoted. Pure functions; runs, folders
and Slurm are in asha.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as far as it is known."""

    target: int
    """The rung, from 0, that it was sent to last."""
    values: tuple[float, ...] = ()
    """Its metric at the rungs that it has come to, in order; NaN: it could not be measured there."""
    busy: bool = False
    """It is queued or running."""

    def waits_at(self, rung: int) -> bool:
        """It has been measured there and was not sent on."""
        return (
            not self.busy and self.target == rung and len(self.values) == rung + 1 and math.isfinite(self.values[rung])
        )


@dataclass(frozen=True)
class Move:
    """Send a trial to a rung; trial None: a new one, to the first rung."""

    trial: int | None
    rung: int


def next_move(trials: Sequence[Trial], num_rungs: int, keep: int, *, highest: bool, may_propose: bool) -> Move | None:
    """The next move of a free slot: promote as high as possible, else propose; None: wait, or the sweep is over."""
    rungs = [ranking(trials, rung, highest=highest) for rung in range(num_rungs)]
    for rung in reversed(range(num_rungs - 1)):
        allowed = len(rungs[rung]) // keep
        if sum(trial.target > rung for trial in trials) >= allowed:
            continue
        for number in rungs[rung][:allowed]:
            if trials[number].waits_at(rung):
                return Move(number, rung + 1)
    if may_propose:
        return Move(None, 0)
    if any(trial.busy for trial in trials):
        return None
    bests = [(rungs[rung][0], rung + 1) for rung in reversed(range(num_rungs - 1)) if rungs[rung]]
    return next((Move(best, rung) for best, rung in bests if trials[best].waits_at(rung - 1)), None)


def ranking(trials: Sequence[Trial], rung: int, *, highest: bool) -> list[int]:
    """Numbers of the trials that have come to a rung, best first, those that could not be measured last."""
    reached = [number for number, trial in enumerate(trials) if len(trial.values) > rung]

    def place(number: int) -> tuple[bool, float, int]:
        value = trials[number].values[rung]
        if not math.isfinite(value):
            return (True, 0.0, number)
        return (False, -value if highest else value, number)

    return sorted(reached, key=place)


def even_rungs(num_steps: int, keep: int, every: int) -> tuple[int, ...]:
    """`num_steps` and, below it, its `keep`-th and `keep`-squared-th part, at steps where the metric is measured."""
    below = (round(num_steps / keep**power / every) * every for power in (2, 1))
    return (*sorted({step for step in below if 0 < step < num_steps}), num_steps)
