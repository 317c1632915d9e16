"""The layer contracts can fail: a sibling import, a vendor in a pure room and a new room each break them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from realsr_hpc.paths import project_root

VIOLATIONS = {
    "sibling": ("grpo/violation.py", "from realsr_hpc import rollout\n", "Rooms import only"),
    "upward": ("config/violation.py", "from realsr_hpc import train\n", "Rooms import only"),
    "vendor": ("grpo/violation.py", "import mlflow\n", "MLflow lives in tracking"),
    "torch in launch": ("launch/violation.py", "import torch\n", "Launching never imports torch"),
    "new room": ("utils.py", "", "utils"),
}


def lint(root) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c()"
    return subprocess.run([sys.executable, "-c", program, "--no-cache"], cwd=root, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    root = project_root()
    shutil.copytree(root / "realsr_hpc", tmp_path / "realsr_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found(copy, name):
    path, code, contract = VIOLATIONS[name]
    (copy / "realsr_hpc" / path).write_text(code)
    answer = lint(copy)
    assert answer.returncode != 0
    assert contract in answer.stdout + answer.stderr


def test_the_tree_keeps_its_contracts(copy):
    answer = lint(copy)
    assert answer.returncode == 0, answer.stdout
