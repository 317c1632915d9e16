"""A queue for local runs of sweeps: at most `cluster.array_parallelism` run at once, in the order of launching.

A waiting or running process holds a lock on a file, which the system releases when the process ends, so nothing needs
cleaning up after a crash.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from realsr_hpc.launch.job import node_job

POLL_S = 0.5


def node_job_in_turn(run_dir: Path, folder: Path, num_slots: int, place: int, launch: str) -> int:
    """Wait for a slot in `folder` (see `turn`), then call `node_job`."""
    with turn(folder, num_slots, place):
        return node_job(run_dir, launch)


@contextmanager
def turn(folder: Path, num_slots: int, place: int) -> Iterator[int]:
    """Wait for one of `num_slots` slots in `folder` and hold it; the waiting process with the lowest `place` is next.

    Yields the slot's number, from 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ticket = folder / f"waiting-{place:020d}"
    with ExitStack() as stack:
        places = [folder / f"slot-{number}" for number in range(num_slots)]
        slots = [stack.enter_context(path.open("a", encoding="utf-8")) for path in places]
        with ticket.with_name(f"new-{ticket.name}").open("a", encoding="utf-8") as waiting:
            _try(waiting)
            os.rename(waiting.name, ticket)  # others see the ticket only once its lock is held
            while (held := _free(slots) if _is_first(ticket) else None) is None:
                time.sleep(POLL_S)
            ticket.unlink(missing_ok=True)
        yield held


def _free(slots: Sequence[IO[str]]) -> int | None:
    return next((number for number, file in enumerate(slots) if _try(file)), None)


def _is_first(ticket: Path) -> bool:
    """Whether no running process holds an earlier ticket; removes tickets of processes that have ended."""
    for other in sorted(ticket.parent.glob("waiting-*")):
        if other >= ticket:
            return True
        try:
            with other.open("a", encoding="utf-8") as file:
                if not _try(file):
                    return False
        except FileNotFoundError:
            continue
        other.unlink(missing_ok=True)
    return True


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
