"""`realsr-hpc jobs report=true`: what every run used compared with its plan, to see where the plan is wrong."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from realsr_hpc import runfolder
from realsr_hpc.config.load import RecipeError
from realsr_hpc.launch.board import number
from realsr_hpc.launch.feed import Feed
from realsr_hpc.plan import plan
from realsr_hpc.tracking import recipe_of


def used_table(root: Path) -> Table:
    """Device-hours, step time and memory of the runs of an output root. Plans of time exist for GPUs alone."""
    found = Table("run", "device-hours", "planned", "step s", "planned", "memory GiB", "planned", box=None)
    found.title = "measured beside planned; a device is a GPU, or a process of a run without GPUs"
    for run_dir in runfolder.list_runs(root):
        feed = Feed(run_dir)
        feed.read()
        try:
            config = recipe_of(run_dir)
        except RecipeError:
            found.add_row(Text(run_dir.name), *["-"] * 6)  # of another version: nothing to hold it against
            continue
        estimate, gpus = plan(config), config.cluster.gpus_per_node
        memory = [value for name, value in feed.peak.items() if name.startswith("system/gpu") and "_memory" in name]
        used = max(memory) if memory else None if gpus else feed.peak.get("system/memory/gib")
        found.add_row(
            Text(run_dir.name),
            f"{feed.computed_s * estimate.world_size / 3600:.2f}",
            f"{estimate.gpu_hours:.2f}" if gpus else "-",
            number(feed.median_step_s, ".1f"),
            f"{estimate.step_s:.1f}" if gpus else "-",
            number(used, ".1f"),
            f"{estimate.total_gib:.1f}",
        )
    return found
