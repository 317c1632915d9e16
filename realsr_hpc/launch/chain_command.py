"""`realsr-hpc launch chain=NAME`: plan a chain, run it locally stage by stage, or submit all of it to Slurm.

Launching again runs the stages that are missing, failed or changed; a stopped run resumes from its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_flag, read_with_overrides, take_switch
from realsr_hpc.config.chain import read_chain
from realsr_hpc.config.load import RecipeError, output_root
from realsr_hpc.files import write_atomically
from realsr_hpc.launch.chain import Node, Valid, chain_nodes, signature_of
from realsr_hpc.launch.chain_stage import prepare_stage, run_stage, stage_status, submit_stage
from realsr_hpc.launch.console import print_missing
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.refusals import missing, refuse_what_cannot_fit
from realsr_hpc.launch.rundir import ALIVE, Queue, Status, current_status, make_private, read_job, slurm_queue
from realsr_hpc.launch.submit import submit_into
from realsr_hpc.plan import plan

NOT_WITH_A_CHAIN = ("recipe", "fresh", "follow", "prepare", "resolve", "sampler", "axes")


def main(arguments: list[str], valid: Valid) -> int:
    """Exit code: 0 done or submitted, 2 a faulty chain or option, else that of the stage at which it stopped."""
    console = Console()
    try:
        name, plan_only, overrides, multirun = _read(arguments)
        chain = read_chain(name)
        nodes = chain_nodes(chain, overrides, valid, multirun=multirun)
        if plan_only:
            _print_plan(chain.name, nodes, console)
            return 0
        _refuse(nodes)
        folder = _folder(chain.name, nodes)
        _say(f"chain: {folder}", console)
        if nodes[0].config.cluster.kind == "slurm":
            return _submit(nodes, folder.name, console)
        return _run_here(nodes, folder.name, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _read(arguments: list[str]) -> tuple[str, bool, list[str], bool]:
    """The chain's name, whether only to plan it, the overrides of its stages, and whether it is a sweep."""
    multirun, rest = take_switch(arguments, "-m", "--multirun")
    given, overrides = read_with_overrides(rest, {"chain": "", "plan": "false"}, None)
    for override in overrides:
        if override.partition("=")[0] in NOT_WITH_A_CHAIN:
            raise RecipeError(f"{override}: not with chain=, which takes plan=true, -m and [STAGE:]section.field=value")
    return given["chain"], read_flag(given, "plan"), overrides, multirun


def _refuse(nodes: list[Node]) -> None:
    """Refuse now what a job would only find out hours later; outputs of earlier stages need not exist yet."""
    refuse_what_cannot_fit([node.config for node in nodes if not node.command])
    if absent := _missing(nodes):
        raise ValueError("\n".join(absent))


def _missing(nodes: list[Node]) -> list[str]:
    runs = [node.config for node in nodes if not node.command]
    of_commands = [line for node in nodes for line in node.missing()]
    return of_commands + missing(runs, promised=[node.folder for node in nodes])


def _folder(name: str, nodes: list[Node]) -> Path:
    """OUTPUT_ROOT/chains/NAME-SIGNATURE with links to the stages' folders."""
    root = output_root(nodes[0].config)
    folder = root / "chains" / f"{name}-{signature_of(nodes)}"
    root.mkdir(parents=True, exist_ok=True)
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
    """Run the stages one after the other from this process; a run that it has started survives it."""
    for node in nodes:
        if _state(node, Queue({})) == "done":
            _say(f"{node.stage}: already done, {node.folder.name}", console)
            continue
        _say(f"{node.stage}: {node.folder.name}", console)
        if node.command:
            prepare_stage(node)
            runfolder.job(node.folder).unlink(missing_ok=True)  # of an attempt on Slurm
            code = run_stage(node.folder)
        else:
            _start(node, parent)
            code = follow(node.folder, console)
        status = _status(node, Queue({}))
        if status is None or status.state != "done":
            said = f": {status.message}" if status and status.message else ""
            _say(f"the chain stops at {node.stage}{said}\nlaunch it again to go on", console)
            return code or 1
    return 0


def _submit(nodes: list[Node], parent: str, console: Console) -> int:
    """Submit all stages: each job starts when those it depends on have succeeded, and is dropped if one cannot."""
    queue = slurm_queue()
    if not queue.answered:
        raise ValueError("cluster.kind: slurm: squeue does not answer; launch where Slurm's commands work")
    jobs: dict[Path, str] = {}
    for node in nodes:
        state = _state(node, queue)
        if state == "done":
            _say(f"{'done':11}{node.stage}", console)
            continue
        after = [jobs[folder] for folder in node.after if folder in jobs]
        if state in ALIVE:
            word = "alive"
        elif node.command:
            word, _ = "submitted", submit_stage(node, after)
        else:
            word = "submitted"
            _start(node, parent, after)
        if job := read_job(node.folder):
            jobs[node.folder] = job.job_id
        behind = f" after {', '.join(after)}" if after else ""
        _say(f"{word:11}{node.stage}  job {job.job_id if job else '?'}{behind}  {node.folder}", console)
    return 0


def _start(node: Node, parent: str, after: Sequence[str] = ()) -> None:
    """Submit a run; ValueError with the words that refused it."""
    [submission] = submit_into([(node.config, node.folder)], sweep=parent, after=after)
    if submission.failed:
        raise ValueError(f"{node.stage}: {submission.note}; launch the chain again to go on")


def _print_plan(name: str, nodes: list[Node], console: Console) -> None:
    queue = slurm_queue() if nodes[0].config.cluster.kind == "slurm" else Queue({})
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
    """A run's as planned; a command's time limit, which only Slurm sets. None: nobody knows."""
    if node.command:
        return node.config.cluster.time_min / 60 if node.config.cluster.kind == "slurm" else None
    return plan(node.config).gpu_hours / gpus or None if gpus else None  # 0: no estimate for its task


def _say(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
