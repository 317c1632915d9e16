"""Tests that need a machine of their own are left out, and said to be, where that machine is not there."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NEEDS = {
    "slurm": (("slurmctld", "slurmd", "munged", "sbatch"), "Debian's slurmctld, slurmd, slurm-client and munge"),
    "postgresql": (("pg_ctlcluster",), "Debian's postgresql"),
    "gpu": (("nvidia-smi",), "a CUDA device"),
}


def absent(marker: str) -> bool:
    """Whether a program that `marker`'s tests need is missing."""
    return any(shutil.which(program, path=SEARCH_PATH) is None for program in NEEDS[marker][0])


def pytest_report_header() -> list[str]:
    return [
        f"left out: tests marked {marker}, they need {what}" for marker, (_, what) in NEEDS.items() if absent(marker)
    ]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)  # what waits longest starts first
    workers = config.pluginmanager.hasplugin("xdist")
    for item in items if workers else []:  # a worker takes whole files, or all tests of one of its own Slurms
        slurm = item.get_closest_marker("slurm")
        group = f"slurm {slurm.kwargs.get('cluster', 'first')}" if slurm else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    left_out = [item for item in items if any(item.get_closest_marker(marker) and absent(marker) for marker in NEEDS)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def copied_stores(tmp_path_factory: pytest.TempPathFactory) -> None:
    """MLflow's database is made once (tests/stores.py)."""
    os.environ["REALSR_HPC_TEST_STORE"] = str(tmp_path_factory.mktemp("store") / "mlflow.db")
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", GIT_PYTHON_REFRESH="quiet")
    importlib.import_module("tests.stores")


@pytest.fixture
def store(copied_stores: None) -> Path:
    """MLflow's database before the first run, to copy into the output root of a command that a test starts."""
    from tests.stores import first_made

    return first_made()
