"""The search space of successive halving (axes, rungs, metric) and the next recipe to try.

If every axis lists its values, all combinations are tried once, in an order shuffled with the recipe's seed, because in
grid order results may steadily improve or worsen. If an axis is an interval, Optuna's TPE sampler draws values and
learns from the results at the rungs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from types import ModuleType
from typing import TYPE_CHECKING

from realsr_hpc.config.identity import differences
from realsr_hpc.config.load import Axis, RecipeError, compose_each, search_space, written
from realsr_hpc.config.metrics import best_is_highest, best_metric, measured_every, num_steps
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.halving import Trial, even_rungs
from realsr_hpc.launch.rundir import run_folder

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DRAWN = 27
"""Number of recipes that are drawn if `trials` is not given."""
TOLD = 5
"""Number of differences that an error message lists."""
DRAWS = 20
"""Draws in a row that repeat earlier recipes before the space counts as exhausted."""


@dataclass(frozen=True)
class Space:
    """A sweep: the fixed overrides, the axes that vary, and the steps at which runs are compared."""

    fixed: list[str]
    axes: list[Axis]
    varied: list[str]
    """The axes as overrides, as the command line gave them."""
    num_trials: int
    rungs: tuple[int, ...]
    """Steps, ascending; the last is the number of steps of a whole run."""
    keep: int
    """One in `keep` runs is promoted to the next rung."""
    sample: RunConfig
    """One of the recipes, to read what all have in common."""

    @property
    def keys(self) -> list[str]:
        """Configuration keys that vary."""
        return [axis.key for axis in self.axes]

    @property
    def metric(self) -> str:
        """The metric by which runs are compared."""
        return best_metric(self.sample)

    @property
    def highest(self) -> bool:
        """Whether the highest value of the metric is best."""
        return best_is_highest(self.sample)

    @cached_property
    def grid(self) -> list[list[str]] | None:
        """All combinations in the order in which they are tried; None if values are drawn."""
        return _grid(self.axes, self.sample.seed)

    def propose(self, tried: Sequence[list[str]], seen: Sequence[Trial]) -> list[str] | None:
        """Overrides of the next run; None if `num_trials` or all combinations were tried."""
        if len(tried) >= self.num_trials:
            return None
        if self.grid is not None:
            return next((overrides for overrides in self.grid if overrides not in tried), None)
        for attempt in range(DRAWS):
            if (drawn := self._draw(tried, seen, attempt)) not in tried:
                return drawn
        return None

    def _draw(self, tried: Sequence[list[str]], seen: Sequence[Trial], attempt: int) -> list[str]:
        """Overrides that Optuna draws, given the present results of all runs."""
        from optuna.trial import TrialState, create_trial

        optuna = quiet_optuna("asha")
        seed = self.sample.seed + len(tried) + 1_000_003 * attempt
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        study = optuna.create_study(direction="maximize" if self.highest else "minimize", sampler=sampler)
        choices = {axis.key: _distribution(axis) for axis in self.axes}
        for overrides, trial in zip(tried, seen, strict=True):
            shown = {step: value for step, value in zip(self.rungs, trial.values, strict=False) if isfinite(value)}
            state = TrialState.RUNNING if not trial.values else TrialState.PRUNED if shown else TrialState.FAIL
            value = shown.get(self.rungs[-1])
            if value is not None:
                state = TrialState.COMPLETE
            params = {axis.key: _read(axis, line) for axis, line in zip(self.axes, overrides, strict=True)}
            study.add_trial(
                create_trial(state=state, value=value, params=params, distributions=choices, intermediate_values=shown)
            )
        drawn = study.ask(choices).params
        return [f"{axis.key}={drawn[axis.key]}" for axis in self.axes]


def read_space(overrides: list[str], trials: int, rungs: str, keep: int) -> Space:
    """The search space of a command line. Raises RecipeError naming the option or override at fault.

    trials: maximum number of recipes to try; 0: the whole grid, or `DRAWN`. rungs: steps separated by commas; empty:
    `even_rungs`. keep: one in `keep` runs is promoted.
    """
    fixed, axes = search_space(overrides)
    if not axes:
        raise RecipeError("sampler: asha: nothing to choose; give a key several values, or interval(low, high)")
    first = [f"{axis.key}={axis.choices[0] if axis.choices else axis.low}" for axis in axes]
    [sample] = compose_each([[*fixed, *first]])
    grid = _grid(axes, sample.seed)
    field, every = measured_every(sample)
    if every == 0:
        raise RecipeError(f"{field}: 0: sampler=asha judges runs by {best_metric(sample)}; set it above 0")
    total = num_steps(sample)
    steps = _read_rungs(rungs, total) if rungs else even_rungs(total, keep, every)
    for step in steps[:-1]:
        if step % every:
            near = max(every, round(step / every) * every)
            raise RecipeError(
                f"rungs: {step}: {best_metric(sample)} is measured every {every} steps ({field}); take {near}"
            )
    if len(steps) < 2:
        raise RecipeError(
            f"rungs: {total}: runs of {total} steps leave no rung before their end; set rungs=..., or lower {field}"
        )
    varied = [line for line in overrides if line not in fixed]
    size = min(trials, len(grid)) if trials and grid else trials or (len(grid) if grid else DRAWN)
    space = Space(fixed, axes, varied, size, steps, keep, sample)
    found = recipes(space)
    if len({run_folder(config) for config in found}) < len(found):
        raise RecipeError(f"sampler: asha: {', '.join(space.keys)} varies nothing that makes another run; fix it")
    for config in found:
        if num_steps(config) != total or measured_every(config) != (field, every) or config.task != sample.task:
            raise RecipeError("sampler: asha: the number of steps and the measuring interval may not vary; fix them")
        if best_metric(config) != best_metric(sample) or config.output_root != sample.output_root:
            raise RecipeError("sampler: asha: checkpoint.best_metric and output_root may not vary; fix them")
    return space


def refuse_another_space(sweep: str, before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> None:
    """Raise RecipeError if fields that decide results differ from the sweep's first launch.

    before, now: the `fixed` and `varied` overrides then and now. Operation (`cluster`, `tracking`, ...) may change.
    """
    old, new = _lines(before["varied"]), _lines(now["varied"])
    changes = [
        f"{old[key][1] if key in old else f'{key} fixed'}, now {new[key][1] if key in new else f'{key} fixed'}"
        for key in old | new
        if (old[key][0] if key in old else None) != (new[key][0] if key in new else None)
    ]
    if not changes:
        first = [f"{axis.key}={axis.choices[0] if axis.choices else axis.low}" for axis, _ in new.values()]
        one, two = compose_each([[*before["fixed"], *first], [*now["fixed"], *first]])
        changes = [f"{key}={written(was)}, now {written(has)}" for key, (was, has) in differences(one, two).items()]
    if changes:
        more = f"; and {len(changes) - TOLD} more" if len(changes) > TOLD else ""
        raise RecipeError(f"sweep: {sweep}: was launched with {'; '.join(changes[:TOLD])}{more}; choose another sweep=")


def _lines(varied: list[str]) -> dict[str, tuple[Axis, str]]:
    """By key: each axis with its override. Overrides with a single value are left out."""
    return {axis.key: (axis, line) for line in varied for axis in search_space([line])[1]}


def recipes(space: Space) -> list[RunConfig]:
    """All recipes that will be tried; if they are drawn, those that are drawn before there are any results."""
    tried: list[list[str]] = []
    while (overrides := space.propose(tried, [Trial(0, busy=True)] * len(tried))) is not None:
        tried.append(overrides)
    return compose_each([[*space.fixed, *overrides] for overrides in tried])


def quiet_optuna(sampler: str) -> ModuleType:
    """Import Optuna with its log level set to warnings; RecipeError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise RecipeError(f"sampler: {sampler}: Optuna is not installed; pip install 'realsr_hpc[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _grid(axes: list[Axis], seed: int) -> list[list[str]] | None:
    if not all(axis.choices for axis in axes):
        return None
    lines = [[f"{axis.key}={value}" for value in axis.choices] for axis in axes]
    combinations = [list(combination) for combination in itertools.product(*lines)]
    random.Random(seed).shuffle(combinations)
    return combinations


def _read_rungs(text: str, total: int) -> tuple[int, ...]:
    words = text.strip("[]").split(",")
    if not all(word.strip().isdecimal() and 0 < int(word) <= total for word in words):
        raise RecipeError(f"rungs: {text!r}: write steps from 1 to {total}, such as rungs=4,12")
    return tuple(sorted({*(int(word) for word in words), total}))


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.choices:
        return CategoricalDistribution(axis.choices)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _read(axis: Axis, line: str) -> str | float:
    value = line.partition("=")[2]
    return value if axis.choices else float(value)
