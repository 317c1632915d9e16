"""Prints plans and submissions."""

from __future__ import annotations

import io
import shlex

from rich.console import Console
from rich.table import Table

from realsr_hpc import runfolder
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import MIB
from realsr_hpc.launch.refusals import missing
from realsr_hpc.launch.script import sbatch_script
from realsr_hpc.launch.start import Submission
from realsr_hpc.plan import Plan, plan
from realsr_hpc.plan.tables import comparison, knob_table
from realsr_hpc.tracking import tracking_uri

PLAN_WIDTH = 120


def print_plan(configs: list[RunConfig], console: Console) -> None:
    """Print sbatch script, memory, pipeline bubble and GPU-hours of the first recipe, and a comparison of all."""
    _print_one(configs[0], console, len(configs))
    if len(configs) > 1:
        hours = sum(plan(config).gpu_hours for config in configs)
        console.print(comparison(configs, f"{len(configs)} runs, {hours:,.0f} GPU-hours in all"))
    print_missing(missing(configs), console)
    console.print("Nothing was submitted.")


def print_missing(faults: list[str], console: Console) -> None:
    """Print why launching from this machine would be refused. A plan alone needs none of these files."""
    if faults:
        console.print("From this machine, launching would be refused:", style="yellow")
        console.print("\n".join(f"  {fault}" for fault in faults), highlight=False, soft_wrap=True)


def plan_text(config: RunConfig) -> str:
    """The plan of one recipe as plain text, as the run's folder and MLflow store it."""
    text = io.StringIO()
    _print_one(config, Console(file=text, width=PLAN_WIDTH, markup=False, emoji=False), 1)
    return text.getvalue()


def _print_one(config: RunConfig, console: Console, num_runs: int) -> None:
    estimate = plan(config)
    if config.cluster.kind == "slurm":
        console.print(sbatch_script(config, num_runs), highlight=False, soft_wrap=True)
    if estimate.memory_gib:
        console.print(_memory_table(estimate, config))
        console.print(_facts_table(estimate, config))
    if estimate.fits is False:
        console.print(knob_table(config))


def print_submissions(submissions: list[Submission], console: Console) -> None:
    """Print name, folder, log and tracking of a single run, or one line for each of several."""
    if len(submissions) == 1:
        item = submissions[0]
        rows = {
            "run": item.run_dir.name,
            "state": "submitted" if item.submitted else "not submitted",
            "note": item.note,
            "folder": str(item.run_dir),
            "log": str(runfolder.rank_log(item.run_dir, 0)),
            "tracking": f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri(item.config))}",
        }
        for name, value in rows.items():
            if value:
                console.print(f"{name:9}{value}", highlight=False, soft_wrap=True)
        return
    for item in submissions:
        note = f"  ({item.note})" if item.note else ""
        state = "submitted" if item.submitted else "REFUSED" if item.failed else "left alone"
        console.print(f"{state:11}{item.run_dir.name}{note}", highlight=False, soft_wrap=True)


def _memory_table(estimate: Plan, config: RunConfig) -> Table:
    where = "GPU" if config.cluster.gpus_per_node else "process"
    table = Table("term", "GiB", title=f"{config.name}: memory of the fullest {where}")
    table.columns[1].justify = "right"
    for name, gib in estimate.memory_gib.items():
        if gib:
            table.add_row(name, f"{gib:.2f}")
    table.add_section()
    limit = "" if estimate.limit_gib is None else f" of {estimate.limit_gib:.0f}"
    verdict = {None: "", True: ": fits", False: ": does NOT fit"}[estimate.fits]
    table.add_row(f"total{verdict}", f"{estimate.total_gib:.2f}{limit}")
    return table


def _facts_table(estimate: Plan, config: RunConfig) -> Table:
    parallel = config.parallel
    layout = f"TP {parallel.tp} x PP {parallel.pp} x DP {estimate.dp} = {estimate.world_size} processes"
    rows = {
        "parameters": f"{estimate.parameters:,}",
        "layout": layout,
        "tokens a sequence": f"{estimate.prompt_tokens} prompt + {estimate.response_tokens} response",
        "microbatches per rank": str(estimate.microbatches),
        "pipeline bubble": f"{estimate.bubble:.1%} of a training pass",
    }
    if estimate.memory.host:
        rows["host memory"] = f"{estimate.memory.host:.1f} GiB per process, offloaded"
    if rewards := _rewards(estimate, config):
        rows["rewards"] = rewards
    if config.cluster.gpus_per_node:
        sent = estimate.traffic
        rows["a step"] = (
            f"{estimate.rollout_s:.1f} s rollout + {estimate.rewards_s:.1f} s rewards + "
            f"{estimate.training_s:.1f} s training + {estimate.communication_s:.1f} s communication, "
            "if none of it is hidden"
        )
        rows["a GPU sends"] = f"{sent.tp:.0f} GB over tp, {sent.pp:.1f} over pp, {sent.dp:.1f} over dp a step"
        counted = f"{estimate.steps} steps ({estimate.device}; data not counted)"
        rows["GPU-hours"] = f"{estimate.gpu_hours:,.0f} for {counted}"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _rewards(estimate: Plan, config: RunConfig) -> str:
    """Where the rewards are computed, the memory of their networks, and which of them the plan does not count."""
    if config.task != "grpo":
        return ""
    experts, wanted = estimate.rewards, config.rewards
    where = "in host memory" if wanted.device == "cpu" or not config.cluster.gpus_per_node else "on the GPU"
    where += ", in host memory between" if wanted.offload and where == "on the GPU" else ""
    parts = [f"{experts.weight_bytes / MIB:.0f} MiB of networks {where}, {wanted.batch_size} rollout(s) at once"]
    if experts.elsewhere:
        parts.append(f"another process computes {', '.join(experts.elsewhere)}")
    if experts.unknown:
        parts.append(f"NOT counted, size unknown: {', '.join(experts.unknown)}")
    return "; ".join(parts)
