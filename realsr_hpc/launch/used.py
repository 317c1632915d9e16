"""`realsr-hpc jobs report=true`: compares the time and memory of every run with its plan."""

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
    """Device-hours, seconds per step and memory of the runs of an output root. Time is planned only for GPUs."""
    found = Table("run", "device-hours", "planned", "step s", "planned", "memory GiB", "planned", box=None)
    found.title = "measured beside planned; a device is a GPU, or a process of a run without GPUs"
    for run_dir in runfolder.list_runs(root):
        feed = Feed(run_dir)
        feed.read()
        try:
            config = recipe_of(run_dir)
        except RecipeError:
            found.add_row(Text(run_dir.name), *["-"] * 6)  # a recipe of another version cannot be planned
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
