"""Checks this node before the ranks connect, because one faulty node makes all the others hang."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import GIB

MIN_FREE_GIB = 1.0
SMI_TIMEOUT_S = 60


def node_faults(config: RunConfig, run_dir: Path) -> list[str]:
    """Faults of this node, as sentences; empty if it can run the job."""
    faults = []
    free_gib = shutil.disk_usage(run_dir).free / GIB
    if free_gib < MIN_FREE_GIB:
        faults.append(f"{free_gib:.1f} GiB free in {run_dir}, {MIN_FREE_GIB} needed")
    wanted = config.cluster.gpus_per_node
    if wanted and (found := _count_gpus()) < wanted:
        faults.append(f"{found} working GPUs, {wanted} needed (cluster.gpus_per_node)")
    return faults


def _count_gpus() -> int:
    """Number of GPUs that nvidia-smi lists; 0 if the driver hangs."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU-") for line in answer.stdout.splitlines())
