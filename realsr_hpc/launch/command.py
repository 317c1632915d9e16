"""The command line of `realsr-hpc launch`: separates launch options (`plan=true`) from overrides of the recipe."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from realsr_hpc.config.arguments import read_count, read_flag, read_with_overrides, take_switch
from realsr_hpc.config.checks import name_fault
from realsr_hpc.config.execution_checks import path_fault
from realsr_hpc.config.load import RecipeError, compose, read_axes, recipe_names, swept_keys, to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import adapter, writable_folder
from realsr_hpc.launch.asha import Halving
from realsr_hpc.launch.console import print_plan, print_submissions
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.proposals import Space, read_space, recipes
from realsr_hpc.launch.refusals import refuse_what_cannot_fit, refuse_what_is_missing, unchecked_manifests
from realsr_hpc.launch.search import sample
from realsr_hpc.launch.submit import prepare, submit
from realsr_hpc.tracking import compare_command

USAGE = """\
realsr-hpc launch [-m] recipe=NAME [group=NAME] [section.field=value ...] [option=value ...]

  recipe=NAME       one of: {recipes}
  chain=NAME        several recipes and commands that build on each other, recipes/chains/NAME.yaml. Takes -m, plan=true
                    and STAGE:section.field=value or STAGE:option=value; launched again, it continues
  cluster=NAME      recipes/cluster/NAME.yaml; the other groups are model, data, rewards and parallel
  -m                a sweep: a,b,c or range(..) or choice(..) as values; one Slurm array, one MLflow parent run
  axes=NAME         a sweep over the values of recipes/sweeps/NAME.yaml; values on the command line take precedence
Options:
  plan=true         submit nothing: sbatch script, memory per GPU, pipeline bubble, GPU-hours
  resolve=true      submit nothing: print the resolved recipe as YAML
  prepare=DIR       submit nothing: prepare DIR, including the code, for `RUN_DIR=DIR sbatch slurm/grpo_7b.sbatch`
  follow=false      return immediately (the default waits for a single run; Ctrl-C does not stop the run)
  fresh=true        start over in a new folder instead of resuming or keeping this recipe's run
  sweep=NAME        name of the sweep (default: derived from the recipe and the swept keys)
  sampler=optuna    Optuna draws from the swept values, which may be interval(a,b); launched again with the same
                    sweep=NAME it learns from the earlier runs and draws more
  trials=16         number of recipes drawn per launch
  sampler=asha      asynchronous successive halving: of the runs that reach a rung, one in `keep` is promoted to the
                    next; launched again with the same values, it continues. Swept values form a grid, or are drawn by
                    Optuna if one is interval(a,b); with follow=false it submits what can start now and returns
  rungs=4,12 keep=3 steps at which runs are compared (default: a ninth and a third of all), and one in how many survives
"""


@dataclass(frozen=True)
class Options:
    """Launch options; every other argument on the command line overrides the recipe."""

    plan: bool = False
    resolve: bool = False
    prepare: str = ""
    follow: bool = True
    fresh: bool = False
    sweep: str = ""
    axes: str = ""
    sampler: str = "all"
    trials: int = 0
    """0 if not given; so is `keep`."""
    rungs: str = ""
    keep: int = 0


FLAGS = tuple(field.name for field in fields(Options) if isinstance(field.default, bool))
COUNTS = {"trials": 1, "keep": 2}
"""Integer options and the smallest value of each."""


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if done or submitted, 2 for an invalid recipe or option, else the job's exit code."""
    console = Console(markup=False, emoji=False)
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE.format(recipes=", ".join(recipe_names())))  # not through rich, which cuts its columns
        return 0 if arguments else 2
    try:
        options, multirun, overrides = read_command_line(arguments)
        configs = choose(options, multirun, overrides)
        if options.resolve:
            sys.stdout.write("---\n".join(map(to_yaml, configs)))
            return 0
        if options.plan:
            print_plan(configs, console)
            return 0
        if options.prepare:
            return _prepare(configs, Path(options.prepare).resolve(), console)
        if options.sampler == "asha":
            return halve(configs, options, overrides, console)
        return launch(configs, options, swept_keys(overrides) if multirun else [], overrides, console)
    except ValueError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        return 2


def choose(options: Options, multirun: bool, overrides: list[str]) -> list[RunConfig]:
    """The recipes to run: one, every combination of a sweep, or those that the sampler would draw now."""
    if options.sampler == "all":
        if given := [name for name in ("rungs", "keep", "trials") if getattr(options, name)]:
            raise RecipeError(f"{given[0]}: goes with sampler=asha{' or optuna' * (given[0] == 'trials')}")
        composed = compose(overrides, multirun=multirun)
        return composed if isinstance(composed, list) else [composed]
    if options.sampler == "asha":
        return recipes(_space(options, overrides))
    if options.sampler != "optuna":
        raise RecipeError(f"sampler: {options.sampler!r} is not one of all, optuna, asha")
    return _draw(options, overrides, keep=False)


def _draw(options: Options, overrides: list[str], *, keep: bool) -> list[RunConfig]:
    return sample(overrides, options.sweep or _sweep_name(overrides), options.trials or 16, keep=keep)


def halve(configs: list[RunConfig], options: Options, overrides: list[str], console: Console) -> int:
    """Run a sweep by asynchronous successive halving to its end; with follow=false submit what can start now."""
    if options.fresh:
        raise RecipeError("fresh: not with sampler=asha, which continues its runs; choose another output_root")
    refuse_what_cannot_fit(configs)
    refuse_what_is_missing(configs)
    return Halving(options.sweep or _sweep_name(overrides), _space(options, overrides), console).run(
        follow=options.follow
    )


def _space(options: Options, overrides: list[str]) -> Space:
    return read_space(overrides, options.trials, options.rungs, options.keep or 3)


def launch(
    configs: list[RunConfig], options: Options, varied: list[str], overrides: list[str], console: Console
) -> int:
    """Submit, print what was submitted, and follow a single run."""
    refuse_what_cannot_fit(configs)
    refuse_what_is_missing(configs)
    for note in unchecked_manifests(configs):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    sweep = (options.sweep or _sweep_name(overrides)) if varied else ""
    if options.sampler == "optuna":
        configs = _draw(options, overrides, keep=True)  # only now: refused recipes must not be recorded as drawn
    submissions = submit(configs, sweep=sweep, varied=varied, fresh=options.fresh)
    print_submissions(submissions, console)
    if any(item.failed for item in submissions):
        return 1
    if sweep:
        console.print(f"compare: {compare_command(configs[0], sweep)}", highlight=False, soft_wrap=True)
    elif options.follow and (submissions[0].submitted or submissions[0].alive):
        item = submissions[0]
        return follow(item.run_dir, console, slurm=item.config.cluster.kind == "slurm")
    return 0


def _prepare(configs: list[RunConfig], run_dir: Path, console: Console) -> int:
    if fault := path_fault(run_dir):
        raise RecipeError(f"prepare: {fault}")
    if len(configs) != 1:
        raise RecipeError(f"prepare: {run_dir}: holds one run, not a sweep of {len(configs)}")
    refuse_what_cannot_fit(configs)
    refuse_what_is_missing(configs)
    for unchecked in unchecked_manifests(configs):
        console.print(unchecked, style="yellow", highlight=False, soft_wrap=True)
    writable_folder(run_dir.parent, "prepare")
    note = prepare(configs[0], run_dir)
    console.print(f"prepared {run_dir}" + (f" ({note})" if note else ""), highlight=False, soft_wrap=True)
    return 0


def read_command_line(arguments: list[str]) -> tuple[Options, bool, list[str]]:
    """Returns the options, whether this is a sweep, and the recipe's overrides including those of `axes=`.

    Raises ValueError (ArgumentError, RecipeError) for an unknown argument or a value out of range.
    """
    multirun, rest = take_switch(arguments, "-m", "--multirun")
    defaults = {field.name: str(field.default).lower() if field.name in FLAGS else "" for field in fields(Options)}
    given, overrides = read_with_overrides(rest, {**defaults, "sampler": Options.sampler}, None)
    values: dict[str, object] = {**given, **{key: read_flag(given, key) for key in FLAGS}}
    values |= {key: read_count(given, key, least) if given[key] else 0 for key, least in COUNTS.items()}
    options = adapter(Options).validate_python(values)
    if options.sweep and (fault := name_fault(options.sweep)):
        raise RecipeError(f"sweep: {fault}")
    own = {override.partition("=")[0] for override in overrides}
    axes = read_axes(options.axes) if options.axes else []
    overrides += [axis for axis in axes if axis.partition("=")[0] not in own]
    return options, multirun or bool(options.axes), overrides


def _sweep_name(overrides: list[str]) -> str:
    recipe = next((item.partition("=")[2] for item in overrides if item.startswith("recipe=")), "none")
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:6]
    return f"{recipe}-sweep-{digest}"
