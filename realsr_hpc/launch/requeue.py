"""Ask Slurm to requeue a job, retrying while the controller does not answer, and exclude unfit nodes from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from realsr_hpc.locks import LockRefused, hold

PATIENCE_S = 600.0
"""How long the call is repeated while the controller does not answer: a restart or failover takes minutes."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
CALL_S = 120.0
LOCK_S = 30.0
SAME_JOB_WAIT_S = 180.0
"""How long a requeued job waits for its lock: its first attempt may still run on a node that Slurm cannot reach."""
FINAL = ("invalid job id", "access/permission denied", "operation is presently disabled", "not requeueable")
"""Errors that do not go away by trying again."""
ALREADY_REQUEUED = ("pending", "completing")
"""Errors which mean that Slurm is already requeueing the job."""


def requeue(job_id: str, patience_s: float = PATIENCE_S, sleep: Callable[[float], None] = time.sleep) -> bool:
    """True if Slurm requeues the job, through this call or on its own; False if it refuses or never answers."""
    if shutil.which("scontrol") is None:
        print(f"requeue {job_id}: this node has no scontrol", flush=True)
        return False
    for pause in [*pauses(patience_s), None]:
        code, text = _scontrol("requeue", job_id)
        print(f"requeue {job_id}: {code} {text.strip()}", flush=True)
        # A negative code: scontrol was killed by a signal, because the requeue it asked for already ends this job.
        if code <= 0 or any(word in text for word in ALREADY_REQUEUED):
            return True
        if pause is None or any(word in text for word in FINAL):
            break
        sleep(pause)
    return False


def pauses(patience_s: float) -> Iterator[float]:
    """Seconds to wait between attempts: they double up to LAST_PAUSE_S, until they sum to the patience."""
    waited, pause = 0.0, FIRST_PAUSE_S
    while waited < patience_s:
        yield pause
        waited, pause = waited + pause, min(2 * pause, LAST_PAUSE_S)


def this_node() -> str:
    """This node's name in Slurm."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


def exclude(job_id: str, nodes: Sequence[str], lock: Path) -> None:
    """Add these nodes to the requeued job's list of excluded nodes.

    Slurm refuses this for a running job and accepts it after the requeue: the job is then pending, and Slurm starts it
    again only after its processes, including this one, have ended. scontrol can only replace the whole list, so two
    nodes that add themselves at the same time would overwrite each other; `lock` lets one do so at a time.
    """
    with ExitStack() as stack:
        with suppress(LockRefused, OSError):  # excluding without the lock is better than not excluding
            stack.enter_context(hold(lock, f"excluding {', '.join(nodes)}", LOCK_S))
        before = _retried(lambda: _excluded(job_id))
        if before is None:
            print(f"{', '.join(nodes)} not excluded from job {job_id}: scontrol show job does not answer", flush=True)
            return
        listed = ",".join(dict.fromkeys([*filter(None, before.split(",")), *nodes]))
        said = _retried(lambda: _update(job_id, listed))
    print(said or f"{', '.join(nodes)} could not be excluded from job {job_id}", flush=True)


def _excluded(job_id: str) -> str | None:
    """The job's excluded nodes, separated by commas; empty if there are none, None if scontrol fails."""
    code, shown = _scontrol("show", "job", "--oneliner", job_id, lower=False)
    if code != 0:
        return None
    found = re.search(r"\bExcNodeList=(\S+)", shown)
    return "" if found is None or found[1] == "(null)" else found[1]


def _update(job_id: str, listed: str) -> str | None:
    code, text = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={listed}")
    if code == 0:  # negative: the SIGTERM of our own requeue ended the call
        return f"excluded from job {job_id}: {listed}"
    print(f"exclude {listed}: {code} {text.strip()}", flush=True)
    return None


def _retried(call: Callable[[], str | None]) -> str | None:
    """The call's first result that is not None, within about five seconds."""
    for _ in range(20):
        if (answer := call()) is not None:
            return answer
        time.sleep(0.25)
    return None


def _scontrol(*words: str, lower: bool = True) -> tuple[int, str]:
    try:
        answer = subprocess.run(
            ["scontrol", *words], capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=CALL_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return 1, str(error)
    text = answer.stdout + answer.stderr
    return answer.returncode, text.lower() if lower else text
