"""Local runs of one sweep in turn: at most `cluster.array_parallelism` at once, as Slurm does with an array."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realsr_hpc.launch.job import node_job

POLL_S = 0.5


def node_job_in_turn(run_dir: Path, folder: Path, num_slots: int) -> int:
    """`node_job` once one of the slots in `folder` is free."""
    with turn(folder, num_slots):
        return node_job(run_dir)


@contextmanager
def turn(folder: Path, num_slots: int) -> Iterator[int]:
    """Hold one of `num_slots` locks in `folder`, waiting for it; the system frees that of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"slot-{number}").open("a") for number in range(num_slots)]
    try:
        while (held := next((number for number, file in enumerate(files) if _try(file)), None)) is None:
            time.sleep(POLL_S)
        yield held
    finally:
        for file in files:
            file.close()


def _try(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
