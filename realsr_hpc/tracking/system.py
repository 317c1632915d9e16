"""What a run takes of its machine, sampled at each step by the process that logs."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

GIB = 2**30


class SystemUse:
    """Processor, memory and disk of this process and its node; keys `system/quantity/unit`."""

    def __init__(self, run_dir: Path) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the measure
        self._run_dir = run_dir

    def sample(self) -> dict[str, float]:
        """Since the last call: processor use (100 is one core); now: memory of process and node, free disk."""
        with self._process.oneshot():
            processor, memory = self._process.cpu_percent(), self._process.memory_info().rss
        return {
            "system/cpu/percent": processor,
            "system/memory/gib": memory / GIB,
            "system/node_memory/percent": psutil.virtual_memory().percent,
            "system/disk_free/gib": shutil.disk_usage(self._run_dir).free / GIB,
        }
