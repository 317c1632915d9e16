"""Asynchronous successive halving: from the results at the rungs to the next move of a free slot.

Algorithm 2 (ASHA) of Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020): a run that is
among the best 1 / `keep` of those measured at its rung is promoted, without waiting for the rung to fill up. As in the
delayed variant of Hyper-Tune (Li et al., VLDB 2022), at most n / `keep` of the n runs at a rung are promoted. One rule
is added for finite sweeps: when there is nothing else to do, the best run of a rung is promoted. These are pure
functions; asha.py handles runs, folders and Slurm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """The present state of one run of a sweep."""

    target: int
    """The rung, from 0, up to which it was last told to run."""
    values: tuple[float, ...] = ()
    """Its metric at the rungs it has reached, in order; NaN if the metric could not be measured there."""
    busy: bool = False
    """Whether it is queued or running."""

    def waits_at(self, rung: int) -> bool:
        """Whether it was measured at this rung and has not been promoted."""
        return (
            not self.busy and self.target == rung and len(self.values) == rung + 1 and math.isfinite(self.values[rung])
        )


@dataclass(frozen=True)
class Move:
    """Run trial number `trial` up to `rung`; trial None: start a new one up to the first rung."""

    trial: int | None
    rung: int


def next_move(trials: Sequence[Trial], num_rungs: int, keep: int, *, highest: bool, may_propose: bool) -> Move | None:
    """The next move of a free slot: a promotion at the highest possible rung, else a new trial.

    None: wait for a busy trial; if none is busy, the sweep is over.
    """
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
    """Numbers of the trials that have reached a rung, best first; those with NaN come last."""
    reached = [number for number, trial in enumerate(trials) if len(trial.values) > rung]

    def place(number: int) -> tuple[bool, float, int]:
        value = trials[number].values[rung]
        if not math.isfinite(value):
            return (True, 0.0, number)
        return (False, -value if highest else value, number)

    return sorted(reached, key=place)


def even_rungs(num_steps: int, keep: int, every: int) -> tuple[int, ...]:
    """Rungs at `num_steps` / keep², / keep and `num_steps`, rounded to multiples of the measuring interval `every`."""
    below = (round(num_steps / keep**power / every) * every for power in (2, 1))
    return (*sorted({step for step in below if 0 < step < num_steps}), num_steps)
