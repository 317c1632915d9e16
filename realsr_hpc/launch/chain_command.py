"""`realsr-hpc launch chain=NAME`: plan a chain, run it locally stage by stage, or submit all of it to Slurm.

Launching again runs the stages that are missing, failed or changed; a stopped run resumes from its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_flag, read_with_overrides, take_switch
from realsr_hpc.config.chain import read_chain
from realsr_hpc.config.load import RecipeError
from realsr_hpc.config.places import output_root
from realsr_hpc.files import writable_folder, write_atomically
from realsr_hpc.launch.chain import Node, Valid, chain_nodes, signature_of
from realsr_hpc.launch.chain_stage import prepare_stage, run_stage, stage_status, submit_stage
from realsr_hpc.launch.console import print_missing
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.refusals import missing, refuse_what_cannot_fit
from realsr_hpc.launch.rundir import (
    ALIVE,
    Job,
    Queue,
    Status,
    current_status,
    is_alive,
    is_slurm,
    make_private,
    queue_of,
    read_job,
    slurm_queue,
)
from realsr_hpc.launch.submit import LAUNCH_WAIT_S, submit_into
from realsr_hpc.locks import hold
from realsr_hpc.plan import plan

NOT_WITH_A_CHAIN = (
    "recipe", "fresh", "follow", "prepare", "resolve", "sampler", "axes", "sweep", "trials", "rungs", "keep",
)  # fmt: skip


def main(arguments: list[str], valid: Valid) -> int:
    """Run the command; returns 0 if done or submitted, 2 for an invalid chain or option, else the stage's code."""
    console = Console(markup=False, emoji=False)
    try:
        name, plan_only, overrides, multirun = _read(arguments)
        chain = read_chain(name)
        nodes = chain_nodes(chain, overrides, valid, multirun=multirun)
        if plan_only:
            _print_plan(chain.name, nodes, console)
            return 0
        _refuse(nodes)
        return _launch(chain.name, nodes, console)
    except ValueError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        _say("interrupted; launch the chain again to continue", console)
        return 130


def _launch(name: str, nodes: list[Node], console: Console) -> int:
    """Launch under a lock: a second process waits until the first has submitted, and then finds its jobs."""
    root = writable_folder(output_root(nodes[0].config), "output_root")
    with hold(root / f".launch-chain-{os.getuid()}.lock", f"launching chain {name}", LAUNCH_WAIT_S):
        folder = _folder(name, nodes)
        _say(f"chain: {folder}", console)
        if nodes[0].config.cluster.kind == "slurm":
            return _submit(nodes, folder.name, console)
    return _run_here(nodes, folder.name, console)


def _read(arguments: list[str]) -> tuple[str, bool, list[str], bool]:
    """Returns the chain's name, whether to plan only, the overrides of its stages, and whether it is a sweep."""
    multirun, rest = take_switch(arguments, "-m", "--multirun")
    for word in rest:
        if word.partition("=")[0] in NOT_WITH_A_CHAIN:
            raise RecipeError(f"{word}: not with chain=, which takes plan=true, -m and [STAGE:]section.field=value")
    given, overrides = read_with_overrides(rest, {"chain": "", "plan": "false"}, None)
    return given["chain"], read_flag(given, "plan"), overrides, multirun


def _refuse(nodes: list[Node]) -> None:
    """Raise ValueError for faults that are visible now; outputs of earlier stages need not exist yet."""
    refuse_what_cannot_fit([node.config for node in nodes if not node.command])
    if absent := _missing(nodes):
        raise ValueError("\n".join(absent))


def _missing(nodes: list[Node]) -> list[str]:
    runs = [node.config for node in nodes if not node.command]
    of_commands = [line for node in nodes for line in node.missing()]
    return of_commands + missing(runs, promised=[node.folder for node in nodes])


def _folder(name: str, nodes: list[Node]) -> Path:
    """Write OUTPUT_ROOT/chains/NAME-SIGNATURE with links to the stages' folders; returns it."""
    folder = output_root(nodes[0].config) / "chains" / f"{name}-{signature_of(nodes)}"
    make_private(folder.parent)
    make_private(folder)
    listed = []
    for number, node in enumerate(nodes, start=1):
        link = folder / f"{number:02d}-{node.stage}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(node.folder, folder))
        listed.append({"stage": node.stage, "folder": str(node.folder), "after": list(map(str, node.after))})
    write_atomically(folder / "chain.json", json.dumps(listed, indent=1))
    return folder


def _status(node: Node, queue: Queue) -> Status | None:
    return stage_status(node, queue) if node.command else current_status(node.folder, queue)


def _state(node: Node, queue: Queue) -> str:
    status = _status(node, queue)
    return status.state if status else "to do"


def _run_here(nodes: list[Node], parent: str, console: Console) -> int:
    """Run the stages one after the other from this process. A run that has started continues if this process ends."""
    for node in nodes:
        queue = queue_of([node.folder])
        state, job = _state(node, queue), read_job(node.folder)
        if state == "done":
            _say(f"{node.stage}: already done, {node.folder.name}", console)
            continue
        _refuse_surviving_process(node, job, queue)
        if state in ALIVE and is_slurm(job):
            raise ValueError(f"{node.stage}: {_alive(state, job)}; cancel it, or launch with cluster.kind=slurm")
        _say(f"{node.stage}: {node.folder.name}", console)
        if node.command:
            prepare_stage(node)
            runfolder.job(node.folder).unlink(missing_ok=True)  # left by an earlier attempt on Slurm
            code = run_stage(node.folder)
        else:
            _start(node, parent)
            code = follow(node.folder, console)
        status = _status(node, queue_of([node.folder]))
        note = f": {status.message}" if status and status.message else ""
        if status is None or status.state != "done":
            _say(f"the chain stops at {node.stage}{note}\nlaunch it again to continue", console)
            return code or 1
        if node.command:
            _say(f"{node.stage}: done, {node.output}{note}", console)
    return 0


def _submit(nodes: list[Node], parent: str, console: Console) -> int:
    """Submit all stages to Slurm. A job starts after those it depends on succeeded, and is dropped if one failed."""
    queue = slurm_queue()
    if not queue.answered:
        raise ValueError("cluster.kind: slurm: squeue does not answer; launch where Slurm's commands work")
    jobs: dict[Path, str] = {}
    new: set[Path] = set()
    """Folders of stages submitted now. A queued job that depends on an earlier job of one of them would never start."""
    for node in nodes:
        state, job = _state(node, queue), read_job(node.folder)
        if state == "done":
            _say(f"{'done':11}{node.stage}", console)
            continue
        _refuse_surviving_process(node, job, queue)
        if state in ALIVE and not is_slurm(job):
            raise ValueError(f"{node.stage}: {_alive(state, job)}; wait for its end, then launch the chain again")
        if state in ALIVE and job and _never_starts(job, queue, new.intersection(node.after)):
            cancel(node.folder)
            state = "stopped"
        after = [jobs[folder] for folder in node.after if folder in jobs]
        word = "alive" if state in ALIVE else "submitted"
        if word == "submitted":
            new.add(node.folder)
            _start(node, parent, after)
        if job := read_job(node.folder):
            jobs[node.folder] = job.job_id
        behind = f" after {', '.join(after)}" if after else ""
        _say(f"{word:11}{node.stage}  job {job.job_id if job else '?'}{behind}  {node.folder}", console)
    return 0


def _refuse_surviving_process(node: Node, job: Job | None, queue: Queue) -> None:
    """Raise ValueError if a process still runs although its job is over: a new job could not lock the folder."""
    status = _status(node, queue)
    if status and status.state in ALIVE and job and not is_alive(job, status, queue):
        raise ValueError(f"{node.stage}: {status.message}; then launch the chain again")


def _never_starts(job: Job, queue: Queue, renewed: Collection[Path]) -> bool:
    """Whether a queued job depends on one that failed or was cancelled; Slurm takes minutes to drop it."""
    waits = queue.states.get(job.job_id) == "PENDING"
    return waits and (bool(renewed) or queue.reasons.get(job.job_id) == "DependencyNeverSatisfied")


def _alive(state: str, job: Job | None) -> str:
    if job is None:
        return f"{state} in another process"
    return f"{state} as {'Slurm' if is_slurm(job) else 'local'} job {job.job_id}{job.host and f' on {job.host}'}"


def _start(node: Node, parent: str, after: Sequence[str] = ()) -> None:
    """Submit a run, or a command to Slurm; ValueError with sbatch's message if it is refused."""
    if node.command:
        submit_stage(node, after)
        return
    [submission] = submit_into([(node.config, node.folder)], sweep=parent, after=after)
    if submission.failed:
        raise ValueError(f"{node.stage}: {submission.note}; launch the chain again to continue")


def _print_plan(name: str, nodes: list[Node], console: Console) -> None:
    queue = queue_of(node.folder for node in nodes)
    table = Table("stage", "what", "after", "state", "GPUs", "hours", "GPU-hours", title=f"chain {name}")
    names, sums = {node.folder: node.stage for node in nodes}, [0.0, 0.0]
    for node in nodes:
        gpus = node.config.cluster.nodes * node.config.cluster.gpus_per_node
        hours = _hours(node, gpus)
        gpu_hours = (hours or 0.0) * gpus
        state = _state(node, queue)
        if state != "done":
            sums = [sums[0] + (hours or 0.0), sums[1] + gpu_hours]
        shown = "-" if hours is None else f"{hours:,.1f}{' (limit)' if node.command else ''}"
        after = ", ".join(names[folder] for folder in node.after)
        table.add_row(node.stage, node.folder.name, after, state, str(gpus), shown, f"{gpu_hours:,.0f}")
    table.add_section()
    table.add_row("to do", "", "", "", "", f"{sums[0]:,.1f}", f"{sums[1]:,.0f}")
    console.print(table)
    slurm = nodes[0].config.cluster.kind == "slurm"
    commands = "the time limit of their jobs (cluster.time_min)" if slurm else "not estimated, and without a time limit"
    _say(f"Hours of runs: as planned, without data; of commands: {commands}.", console)
    print_missing(_missing(nodes), console)
    _say("Nothing was submitted.", console)


def _hours(node: Node, gpus: int) -> float | None:
    """Planned hours of a run, or the time limit of a command's Slurm job; None if there is neither."""
    if node.command:
        return node.config.cluster.time_min / 60 if node.config.cluster.kind == "slurm" else None
    return plan(node.config).gpu_hours / gpus or None if gpus else None  # 0: no estimate for its task


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, soft_wrap=True)
