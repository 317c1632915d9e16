"""Samples CPU, memory, disk and GPU use at each step, in the process that logs metrics."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import psutil

from realsr_hpc.files import GIB


class SystemUse:
    """Resource use of this process and its node; keys are `system/quantity/unit`."""

    def __init__(self, run_dir: Path) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the measurement
        self._run_dir = run_dir
        self._nvml = _nvml()

    def sample(self) -> dict[str, float]:
        """CPU use since the last call in percent (100 is one core); memory of process and node, free disk space and
        GPUs at present."""
        with self._process.oneshot():
            processor, memory = self._process.cpu_percent(), self._process.memory_info().rss
        return {
            "system/cpu/percent": processor,
            "system/memory/gib": memory / GIB,
            "system/node_memory/percent": psutil.virtual_memory().percent,
            "system/disk_free/gib": shutil.disk_usage(self._run_dir).free / GIB,
            **self._gpus(),
        }

    def _gpus(self) -> dict[str, float]:
        """Utilisation, memory and power of each GPU that is visible to this job."""
        nvml, values = self._nvml, dict[str, float]()
        if nvml is None:
            return values
        for number in range(nvml.nvmlDeviceGetCount()):
            gpu = nvml.nvmlDeviceGetHandleByIndex(number)
            values[f"system/gpu{number}/percent"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            values[f"system/gpu{number}_memory/gib"] = nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB
            values[f"system/gpu{number}_power/watt"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return values


def _nvml() -> ModuleType | None:
    """NVIDIA's management library if it is installed (extra `gpu`) and finds a driver, else None."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
