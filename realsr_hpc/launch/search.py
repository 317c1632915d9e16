"""`sampler=optuna`: each launch reports the results of the earlier runs to Optuna and asks it for new recipes.

Optuna's journal is in OUTPUT_ROOT/sweeps/NAME/, so a sweep can continue on any machine that sees the output root.
Unfinished runs are proposed again first, new ones only after all earlier ones have ended. The objective is the recipe's
best metric in its declared direction. Optuna's own loop and pruning are not used: Slurm executes the runs as one array.
A plan draws from a copy of the journal, so it shows what launching would draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from realsr_hpc.config.load import Axis, RecipeError, compose_one, search_space
from realsr_hpc.config.metrics import best_is_highest, best_metric, is_measured
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.proposals import quiet_optuna, refuse_another_space
from realsr_hpc.launch.rundir import current_status, make_private, run_folder
from realsr_hpc.locks import hold
from realsr_hpc.tracking import metrics_by_step

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

WAIT_S = 120.0
JOURNAL = "optuna.journal"


def sample(overrides: list[str], sweep: str, trials: int, *, keep: bool) -> list[RunConfig]:
    """Recipes to run now: the unfinished ones of this sweep, or `trials` new ones. RecipeError if Optuna is missing.

    keep: record them as drawn, for the next launch; otherwise nothing is written.
    """
    fixed, axes = search_space(overrides)
    if not axes:
        raise RecipeError("sampler: optuna: nothing to choose; give a key several values, or interval(low, high)")
    root = output_root(compose_one(fixed))
    with _kept(root, sweep) if keep else _copied(root, sweep) as folder:
        study = _study(fixed, sweep, folder)
        space = {"fixed": fixed, "varied": [line for line in overrides if line not in fixed]}
        refuse_another_space(sweep, study.user_attrs.get("space", space), space)
        study.set_user_attr("space", space)
        waiting = _tell(study, fixed)
        if not waiting:
            for _ in range(trials):
                trial = study.ask()
                trial.set_user_attr("overrides", [f"{axis.key}={_draw(trial, axis)}" for axis in axes])
            waiting = _running(study)
        return [_config(fixed, trial) for trial in waiting]


@contextmanager
def _kept(root: Path, sweep: str) -> Iterator[Path]:
    """The sweep's folder, locked, because two processes would both draw the same recipes."""
    folder = make_private(make_private(root / "sweeps") / sweep)
    with hold(folder / "journal.lock", f"drawing for sweep {sweep}", WAIT_S):
        yield folder


@contextmanager
def _copied(root: Path, sweep: str) -> Iterator[Path]:
    """A temporary folder with a copy of the sweep's journal, if it has one, up to its last complete line."""
    with TemporaryDirectory() as folder:
        journal = root / "sweeps" / sweep / JOURNAL
        if journal.exists():
            content = journal.read_bytes()
            (Path(folder) / JOURNAL).write_bytes(content[: content.rfind(b"\n") + 1])
        yield Path(folder)


def _study(fixed: list[str], sweep: str, folder: Path) -> Study:
    optuna = quiet_optuna("optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    config = compose_one(fixed)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name=sweep,
        direction="maximize" if best_is_highest(config) else "minimize",
        load_if_exists=True,
    )
    # With the same seed at each launch the sampler would repeat its random first draws.
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials), constant_liar=True)
    return study


def _tell(study: Study, fixed: list[str]) -> list[FrozenTrial]:
    """Report finished runs to Optuna; returns the trials that have no result yet."""
    from optuna.trial import TrialState

    for trial in _running(study):
        config = _config(fixed, trial)
        run_dir = run_folder(config)
        status = current_status(run_dir)
        value = _last(run_dir, best_metric(config))
        if status is not None and status.state == "done" and is_measured(value):
            study.tell(trial.number, value)
        elif status is not None and status.state in ("done", "failed"):
            study.tell(trial.number, state=TrialState.FAIL)
    return _running(study)


def _running(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))


def _config(fixed: list[str], trial: FrozenTrial) -> RunConfig:
    return compose_one([*fixed, *trial.user_attrs["overrides"]])


def _draw(trial: Trial, axis: Axis) -> object:
    if axis.choices:
        return trial.suggest_categorical(axis.key, axis.choices)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)


def _last(run_dir: Path, metric: str) -> float | None:
    values = [metrics[metric] for metrics in metrics_by_step(run_dir).values() if metric in metrics]
    return values[-1] if values else None
