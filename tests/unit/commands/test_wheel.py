"""The wheel in an environment of its own, away from any checkout, trains the small recipe with one command."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from realsr_hpc.paths import project_root

SMALL = """
defaults: [grpo_tiny, _self_]
name: mine
vlcot: {image_sizes_px: [32, 64, 96], lq_size_px: 32, max_text_tokens: 4, text_slots: null}
model: {weights: null, num_layers: 1, hidden_size: 32, num_heads: 2, ffn_hidden_size: 48}
grpo: {num_steps: 1, prompts_per_step: 1, group_size: 2, heldout_every_steps: 0}
optim: {warmup_steps: 0}
cluster: {tasks_per_node: 1}
checkpoint: {every_steps: 1}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build, str(project_root())], check=True, timeout=300)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an empty environment with the wheel; other people's packages are this environment's."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    [packages] = home.glob("lib/python*/site-packages")
    # A path alone: files of it that would lead to the checkout (an editable install) are not followed.
    (packages / "shared.pth").write_text(f"{Path(torch.__file__).parent.parent}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(home / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=300)
    return home / "bin"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "REALSR_HPC_RECIPES")}
    command = [str(installed / "realsr-hpc"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_ships_recipes_and_their_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    root = project_root()
    needed = [path for path in (root / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"realsr_hpc/{path.relative_to(root).as_posix()}" for path in needed} <= names
    assert "realsr_hpc/slurm/grpo_7b.sbatch" in names and not any(name.startswith("tests") for name in names)


def test_an_installed_wheel_trains_the_small_recipe_in_a_users_folder(installed, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(SMALL, encoding="utf-8")  # extends a recipe of the wheel
    listed = run(installed, tmp_path, "launch", "--help").stdout
    assert "mine" in listed and "grpo_7b_paper" in listed
    answer = run(installed, tmp_path, "launch", "recipe=mine")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    [run_dir] = (tmp_path / "runs").glob("mine-*")
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))["model"]["hidden_size"] == 32
    assert (run_dir / "checkpoints" / "step-000001").is_dir()
    assert "done" in run(installed, tmp_path, "jobs").stdout


def test_a_wheels_snapshot_has_the_form_of_a_checkout(installed, tmp_path):
    program = (
        "from pathlib import Path; from realsr_hpc.config.load import compose; from realsr_hpc.launch import snapshot\n"
        "print(snapshot.take_snapshot([compose(['recipe=grpo_tiny'])]), snapshot.code_version())"
    )
    python = str(installed / "python")
    answer = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    code, said = answer.stdout.strip().split(" ", 1)
    assert {path.name for path in Path(code).iterdir()} == {"SHA256SUMS", "realsr_hpc", "recipes", "slurm"}
    assert said == "{}"
    assert not (Path(code) / "realsr_hpc" / "recipes").exists()
    asked = "from realsr_hpc import paths; print(paths.project_root(), paths.is_checkout())"
    answer = subprocess.run([python, "-c", asked], cwd=code, capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == f"{code} True"
