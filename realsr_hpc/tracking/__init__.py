"""Tracks runs in MLflow. Events are appended to a file in the run's folder first, so tracking never stops training."""

from realsr_hpc.tracking.place import Place, moved_to, read_place, recipe_of, write_place
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.tracking.store import (
    compare_command,
    prepare_run,
    prepare_store,
    prepare_sweep,
    read_bookmark,
    set_status,
    sweep_of,
    sweep_tags,
    tracking_uri,
    write_launch_tags,
)
from realsr_hpc.tracking.tracker import Progress, Tracker, read_progress, sync

__all__ = [
    "Place",
    "Progress",
    "Tracker",
    "compare_command",
    "metrics_by_step",
    "moved_to",
    "prepare_run",
    "prepare_store",
    "prepare_sweep",
    "read_bookmark",
    "read_place",
    "read_progress",
    "recipe_of",
    "set_status",
    "sweep_of",
    "sweep_tags",
    "sync",
    "tracking_uri",
    "write_launch_tags",
    "write_place",
]
