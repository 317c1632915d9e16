"""RunConfigs -> jobs: folders, snapshot, tracking, and submitit as the one that starts them.

A run's folder is named by its recipe's signature. Launching it again goes on where it stopped, says that it is done,
or that it is running already; so launching a sweep again submits what is missing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.config.identity import flatten
from realsr_hpc.config.load import output_root, to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import write_atomically
from realsr_hpc.launch.job import node_job
from realsr_hpc.launch.report import plan_text
from realsr_hpc.launch.rundir import (
    ALIVE,
    Job,
    Queue,
    current_status,
    make_private,
    read_job,
    run_folder,
    slurm_queue,
    write_job,
)
from realsr_hpc.launch.rundir import write_status as set_state
from realsr_hpc.launch.script import executor_parameters, setup_lines
from realsr_hpc.launch.snapshot import code_version, environment, take_snapshot
from realsr_hpc.launch.turns import node_job_in_turn
from realsr_hpc.paths import code_root
from realsr_hpc.tracking import prepare_run, prepare_store, prepare_sweep, write_launch_tags
from realsr_hpc.tracking.delivery import brief
from realsr_hpc.tracking.store import PARENT_TAG, SWEEP_TAG


@dataclass(frozen=True)
class Submission:
    """What became of one recipe."""

    config: RunConfig
    run_dir: Path
    submitted: bool
    note: str = ""
    """Why it was not submitted, or what the user should know."""


def submit(
    configs: list[RunConfig], *, sweep: str = "", varied: list[str] | None = None, fresh: bool = False
) -> list[Submission]:
    """Submit every recipe that is neither done nor running; a Submission each, in order.

    `sweep` names the MLflow parent run, `varied` the keys in which the recipes differ.
    """
    folders = {run_folder(config, fresh=fresh): config for config in configs}  # equal recipes are one run
    return submit_into([(config, folder) for folder, config in folders.items()], sweep=sweep, varied=varied)


def submit_into(
    folders: list[tuple[RunConfig, Path]], *, sweep: str = "", varied: list[str] | None = None
) -> list[Submission]:
    """As `submit`, into folders that are already chosen."""
    queue = slurm_queue() if any(config.cluster.kind == "slurm" for config, _ in folders) else Queue({})
    if not queue.answered:
        raise ValueError(
            "cluster.kind: slurm: squeue does not answer; launch where Slurm's commands work, or cluster=local"
        )
    planned = [_look(config, run_dir, queue) for config, run_dir in folders]
    pending = [item for item in planned if item.submitted]
    if not pending:
        return planned
    note = _prepare_tracking(pending, sweep, varied or [])
    for group in _by_cluster(pending):
        _submit_together(group)
    return [_with_note(item, note) for item in planned]


def prepare(config: RunConfig, run_dir: Path) -> str:
    """Make a folder that plain sbatch can run: recipe, plan, packages, a snapshot of the code, the MLflow run.

    What the user should know of tracking, if anything. ValueError when the folder holds a run already.
    """
    if (run_dir / "recipe.yaml").exists():
        raise ValueError(
            f"prepare: {run_dir} holds a run; RUN_DIR={run_dir} sbatch goes on with it, or name a new folder"
        )
    note = _prepare_tracking([Submission(config, run_dir, True)], "", [])
    _link_code(run_dir, take_snapshot([config]))
    return note


def _look(config: RunConfig, run_dir: Path, queue: Queue) -> Submission:
    status = current_status(run_dir, queue)
    if status is not None and status.state in ALIVE:
        job = read_job(run_dir)
        return Submission(config, run_dir, False, f"already {status.state} as job {job.job_id if job else '?'}")
    if status is not None and status.state == "done":
        return Submission(config, run_dir, False, "already done; fresh=true starts it anew")
    return Submission(config, run_dir, True, "goes on from its last checkpoint" if status else "")


def _prepare_tracking(pending: list[Submission], sweep: str, varied: list[str]) -> str:
    """Database, experiment and parent run exist before any job starts; a server that is away stops nothing."""
    first = pending[0].config
    note, tags = "", code_version()
    installed = json.dumps(environment(), indent=1)
    try:
        prepare_store(first)
        if sweep:
            tags |= {SWEEP_TAG: sweep, PARENT_TAG: prepare_sweep(first, sweep)}
    except Exception as error:  # tracking never stops training
        note = f"MLflow is not reachable ({brief(error)}); tools/sync_tracking.py sends the events later"
    for item in pending:
        make_private(item.run_dir)
        values = flatten(item.config)
        named = {"realsr_hpc.varied": " ".join(f"{key}={values[key]}" for key in varied if key in values)}
        write_launch_tags(item.run_dir, tags | (named if varied else {}))
        config = item.config.model_copy(update={"output_root": str(output_root(item.config))})
        write_atomically(item.run_dir / "recipe.yaml", to_yaml(config))
        write_atomically(item.run_dir / "plan.txt", plan_text(item.config))
        write_atomically(item.run_dir / "environment.json", installed)
    if not sweep and not note:
        prepare_run(first, pending[0].run_dir)
    return note


def _by_cluster(pending: list[Submission]) -> list[list[Submission]]:
    """Runs that can share one array."""
    groups: dict[str, list[Submission]] = {}
    for item in pending:
        groups.setdefault(item.config.cluster.model_dump_json(), []).append(item)
    return list(groups.values())


def _submit_together(group: list[Submission]) -> None:
    if group[0].config.cluster.kind == "slurm":
        _submit_slurm(group)
    else:
        for item in group:
            _submit_local(item, len(group))


def _submit_slurm(group: list[Submission]) -> None:
    import submitit

    config = group[0].config
    code = take_snapshot([item.config for item in group])
    single = len(group) == 1
    folder = group[0].run_dir / "logs" / "job" if single else make_private(output_root(config) / "arrays") / "%A"
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=config.cluster.max_requeues)
    executor.update_parameters(**executor_parameters(config.cluster, config.name, setup_lines(config.cluster, code)))
    for item in group:
        _link_code(item.run_dir, code)
        set_state(item.run_dir, "submitted")
    folders = [item.run_dir for item in group]
    jobs = [executor.submit(node_job, folders[0])] if single else executor.map_array(node_job, folders)
    for item, job in zip(group, jobs, strict=True):
        write_job(item.run_dir, Job("slurm", job.job_id, "", str(job.paths.stdout)))


def _submit_local(item: Submission, num_runs: int) -> None:
    """At once when it is alone; runs of a sweep take turns."""
    import submitit

    cluster = item.config.cluster
    gpus = list(range(cluster.gpus_per_node))
    executor = submitit.LocalExecutor(folder=item.run_dir / "logs" / "job")
    executor.update_parameters(
        timeout_min=cluster.time_min * num_runs,
        signal_delay_s=cluster.signal_delay_s,
        stderr_to_stdout=True,
        tasks_per_node=1,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
    )
    set_state(item.run_dir, "submitted")
    with _outliving_the_terminal(item.run_dir / "logs" / "controller.log"):
        if num_runs == 1:
            job = executor.submit(node_job, item.run_dir)
        else:
            slots = output_root(item.config) / "slots"
            job = executor.submit(node_job_in_turn, item.run_dir, slots, cluster.runs_at_once, time.time_ns())
    write_job(item.run_dir, Job("local", job.job_id, os.uname().nodename, str(job.paths.stdout)))


@contextmanager
def _outliving_the_terminal(log: Path) -> Iterator[None]:
    """What is started here ignores Ctrl-C and hang-up, finds the project, and writes to `log`.

    With the terminal's own streams it would keep a pipe open that somebody reads (`launch.py ... follow=false | tee`).
    """
    numbers = (signal.SIGINT, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code_root()), path]))
    log.parent.mkdir(parents=True, exist_ok=True)
    streams = [os.dup(number) for number in (1, 2)]
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def _link_code(run_dir: Path, code: Path) -> None:
    link = run_dir / "code"
    link.unlink(missing_ok=True)
    link.symlink_to(code)


def _with_note(item: Submission, note: str) -> Submission:
    if not note or not item.submitted:
        return item
    return Submission(item.config, item.run_dir, True, f"{item.note}; {note}" if item.note else note)
