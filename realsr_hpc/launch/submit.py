"""Submit recipes: create run folders, code snapshot and MLflow runs, then start the jobs through submitit.

A run's folder is named after its recipe's signature. Launching a recipe again resumes a stopped run, or reports that
it is done or still running, so launching a sweep again submits only the missing runs.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.identity import flatten
from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import writable_folder, write_atomically
from realsr_hpc.launch.console import plan_text
from realsr_hpc.launch.prune import link_code
from realsr_hpc.launch.requeue import PATIENCE_S, pauses
from realsr_hpc.launch.rundir import (
    ALIVE,
    Queue,
    current_status,
    is_alive,
    make_private,
    queue_of,
    read_job,
    run_folder,
    saved_step,
    slurm_queue,
)
from realsr_hpc.launch.script import again_lines
from realsr_hpc.launch.snapshot import code_version, environment, take_snapshot
from realsr_hpc.launch.start import Submission, start_together
from realsr_hpc.locks import hold
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import (
    Place,
    prepare_run,
    prepare_store,
    prepare_sweep,
    set_status,
    sweep_tags,
    write_launch_tags,
    write_place,
)
from realsr_hpc.tracking.delivery import brief
from realsr_hpc.tracking.store import SWEEP_TAG, VARIED_TAG

LAUNCH_WAIT_S = 120.0
logger = logging.getLogger(__name__)


class SlurmAway(ValueError):
    """Slurm's commands are there, but its controller does not answer them."""


def submit(
    configs: list[RunConfig], *, sweep: str = "", varied: list[str] | None = None, fresh: bool = False
) -> list[Submission]:
    """Submit every recipe that is neither done nor running; returns a Submission for each distinct recipe, in order.

    Args:
        configs: equal recipes are one run.
        sweep: name of the MLflow parent run; empty for a single run.
        varied: configuration keys in which the recipes differ, recorded as a tag.
        fresh: start in new folders instead of resuming existing runs.

    Raises:
        ValueError: if a run would go to Slurm and squeue does not answer, or if the output root is not writable.
        LockRefused: if another process has been launching into the output root for more than LAUNCH_WAIT_S.
    """
    folders = {run_folder(config, fresh=fresh): config for config in configs}  # equal recipes are one run
    return submit_into([(config, folder) for folder, config in folders.items()], sweep=sweep, varied=varied)


def submit_into(
    folders: list[tuple[RunConfig, Path]],
    *,
    sweep: str = "",
    varied: list[str] | None = None,
    after: Sequence[str] = (),
) -> list[Submission]:
    """Like `submit`, for folders that are already chosen. On Slurm the jobs start after those in `after` succeeded.

    A lock on the output root lets one process at a time read the states there and submit.
    """
    with _alone({run_dir.parent for _, run_dir in folders}):
        queue = _queue(folders)
        planned = [_look(config, run_dir, queue) for config, run_dir in folders]
        pending = [item for item in planned if item.submitted]
        if not pending:
            return planned
        before = {item.run_dir: _recipe_text(item.run_dir) for item in pending}
        note = _prepare_tracking(pending, sweep, varied or [])
        became = {item.run_dir: item for group in _by_cluster(pending) for item in start_together(group, after)}
        for run_dir, item in became.items():
            if item.failed:
                _take_back(run_dir, before[run_dir])
        return [_with_note(became.get(item.run_dir, item), note) for item in planned]


def submit_patiently(
    folders: list[tuple[RunConfig, Path]],
    say: Callable[[str], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    sweep: str = "",
    varied: list[str] | None = None,
) -> list[Submission]:
    """Like `submit_into`, but retries for PATIENCE_S while Slurm's controller does not answer (restart, failover).

    For a launcher that follows a sweep for hours. Raises SlurmAway if the controller does not come back.
    """
    for pause in pauses(PATIENCE_S):
        try:
            found = submit_into(folders, sweep=sweep, varied=varied)
            away = next((item.note for item in found if item.away), "")
            if not away:
                return found
        except SlurmAway as error:
            away = str(error)
        say(f"{away}; asking again in {pause:.0f} s")
        sleep(pause)
    return submit_into(folders, sweep=sweep, varied=varied)


def _queue(folders: list[tuple[RunConfig, Path]]) -> Queue:
    """Slurm's queue if a run goes to Slurm or last ran there, else an empty one.

    Without asking, a local job could start in a folder that a Slurm job still writes to.
    """
    if not any(config.cluster.kind == "slurm" for config, _ in folders):
        return queue_of(run_dir for _, run_dir in folders)
    if not (queue := slurm_queue()).answered:
        raise SlurmAway(
            "cluster.kind: slurm: squeue does not answer; launch where Slurm's commands work, or cluster=local"
        )
    return queue


@contextmanager
def _alone(roots: set[Path]) -> Iterator[None]:
    """Hold the launch lock of every output root. LockRefused names the holder after LAUNCH_WAIT_S of waiting."""
    with ExitStack() as stack:
        for root in sorted(roots):
            writable_folder(root, "output_root")
            lock = root / f".launch-{os.getuid()}.lock"
            stack.enter_context(hold(lock, f"launching into {root}", LAUNCH_WAIT_S))
        yield


def _recipe_text(run_dir: Path) -> str | None:
    path = runfolder.recipe(run_dir)
    return path.read_text(encoding="utf-8") if path.exists() else None


def _take_back(run_dir: Path, recipe: str | None) -> None:
    """Undo a refused submission: restore the previous recipe.yaml, so that resuming does not use refused overrides."""
    if recipe is not None:
        write_atomically(runfolder.recipe(run_dir), recipe)
    try:
        set_status(run_dir, "FAILED")
    except Exception as error:  # tracking never stops training
        logger.warning("tracking: status FAILED not delivered (%s)", brief(error))


def prepare(config: RunConfig, run_dir: Path) -> str:
    """Prepare a folder that plain sbatch can run: recipe, plan, package versions, code snapshot and MLflow run.

    Returns a warning about tracking, or an empty string. Raises ValueError if the folder already holds a run.
    """
    if runfolder.recipe(run_dir).exists():
        raise ValueError(f"prepare: {run_dir} holds a run; RUN_DIR={run_dir} sbatch continues it, or name a new folder")
    with _alone({run_dir.parent}):
        code = take_snapshot([config])
        note = _prepare_tracking([Submission(config, run_dir, True)], "", [])
        link_code(run_dir, code)
        write_atomically(runfolder.again(run_dir), "\n".join([*again_lines(config.cluster), ""]))
    return note


def _look(config: RunConfig, run_dir: Path, queue: Queue) -> Submission:
    status = current_status(run_dir, queue)
    if status is not None and status.state in ALIVE:
        job = read_job(run_dir)
        over = job is not None and not is_alive(job, status, queue)
        note = status.message if over else f"already {status.state} as job {job.job_id if job else '?'}"
        silent = f"; squeue does not answer here: if that job is over, remove {runfolder.job(run_dir)}"
        return Submission(config, run_dir, False, note if queue.answered else note + silent, alive=not over)
    if status is not None and status.state == "done":
        return Submission(config, run_dir, False, "already done; fresh=true starts it from step 0")
    if status is None:
        return Submission(config, run_dir, True)
    step = saved_step(run_dir)
    begins = "starts again: it had saved no checkpoint" if step is None else f"continues from step {step}"
    return Submission(config, run_dir, True, begins)


def _prepare_tracking(pending: list[Submission], sweep: str, varied: list[str]) -> str:
    """Create database, experiment and parent run before any job starts, and write each run's folder.

    Returns a warning if the MLflow server cannot be reached; that does not stop the launch.
    """
    first = pending[0].config
    note, tags = "", code_version() | ({SWEEP_TAG: sweep} if sweep else {})
    installed = json.dumps(environment(), indent=1)
    try:
        prepare_store(first)
        if sweep:
            prepare_sweep(first, sweep)
    except Exception as error:  # tracking never stops training
        note = f"MLflow is not reachable ({brief(error)}); realsr-hpc sync-tracking sends the events later"
    for item in pending:
        make_private(item.run_dir)
        values = flatten(item.config)
        named = {VARIED_TAG: " ".join(f"{key}={values[key]}" for key in varied if key in values)}
        known = {} if sweep else sweep_tags(item.run_dir)  # a resumed run stays in its sweep
        write_launch_tags(item.run_dir, tags | known | (named if varied else {}))
        root = output_root(item.config)
        write_place(item.run_dir, Place(str(item.run_dir), str(root), str(project_root())))
        config = item.config.model_copy(update={"output_root": str(root)})
        write_atomically(runfolder.recipe(item.run_dir), to_yaml(config))
        write_atomically(runfolder.plan(item.run_dir), plan_text(item.config))
        write_atomically(runfolder.environment(item.run_dir), installed)
    if not sweep and not note:
        try:
            prepare_run(first, pending[0].run_dir)
        except Exception as error:  # tracking never stops training
            note = f"MLflow refused the run ({brief(error)}); realsr-hpc sync-tracking sends the events later"
    return note


def _by_cluster(pending: list[Submission]) -> list[list[Submission]]:
    """Group runs with equal cluster sections: those can share one array."""
    groups: dict[str, list[Submission]] = {}
    for item in pending:
        groups.setdefault(item.config.cluster.model_dump_json(), []).append(item)
    return list(groups.values())


def _with_note(item: Submission, note: str) -> Submission:
    if not note or not item.submitted:
        return item
    return replace(item, note=f"{item.note}; {note}" if item.note else note)
