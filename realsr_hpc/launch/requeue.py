"""Asking Slurm for another attempt, for as long as it takes to answer, and keeping that away from an unfit node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable

PATIENCE_S = 600.0
"""How long a controller that does not answer is asked again: a restart or a failover takes minutes."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
CALL_S = 120.0
FINAL = ("invalid job id", "access/permission denied", "operation is presently disabled", "not requeueable")
"""Answers that asking again does not change."""
OURS = ("pending", "completing")
"""Answers of a Slurm that was faster than we were: it requeues the job already."""


def requeue(job_id: str, patience_s: float = PATIENCE_S, sleep: Callable[[float], None] = time.sleep) -> bool:
    """True when Slurm requeues the job, by this call or already of itself; False when it refuses or stays silent."""
    if shutil.which("scontrol") is None:
        print(f"requeue {job_id}: this node has no scontrol", flush=True)
        return False
    waited, pause = 0.0, FIRST_PAUSE_S
    while True:
        code, text = _scontrol("requeue", job_id)
        print(f"requeue {job_id}: {code} {text.strip()}", flush=True)
        # A negative code: Slurm's own requeue killed the call.
        if code <= 0 or any(word in text for word in OURS):
            return True
        if any(word in text for word in FINAL) or waited >= patience_s:
            return False
        sleep(pause)
        waited, pause = waited + pause, min(2 * pause, LAST_PAUSE_S)


def exclude_this_node(job_id: str) -> None:
    """Keep the requeued job away from here. Slurm refuses that of a running job, and takes it once it was requeued:
    then it is pending, and not started again before its processes here, this one among them, have ended."""
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    shown = ""
    for _ in range(20):
        code, shown = _scontrol("show", "job", "--oneliner", job_id, lower=False)
        if code == 0:
            break
    found = re.search(r"\bExcNodeList=(\S+)", shown)
    before = "" if found is None or found[1] == "(null)" else f"{found[1]},"
    for _ in range(20):
        code, text = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={before}{node}")
        if code == 0:  # a negative one: the SIGTERM of our own requeue ended the call
            print(f"{node} is excluded from job {job_id}", flush=True)
            return
        time.sleep(0.25)
    print(f"{node} could not be excluded from job {job_id}: {text.strip()}", flush=True)


def _scontrol(*words: str, lower: bool = True) -> tuple[int, str]:
    try:
        answer = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=CALL_S)
    except (OSError, subprocess.SubprocessError) as error:
        return 1, str(error)
    text = answer.stdout + answer.stderr
    return answer.returncode, text.lower() if lower else text
