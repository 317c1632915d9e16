"""A chain as dependent jobs on a real Slurm: cancelled in its first stage, it ends with the undisturbed one's bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from realsr_hpc.launch.rundir import current_status
from realsr_hpc.paths import project_root
from tests.slurm.conftest import SMALL
from tests.slurm.watching import steps_done, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

CHAIN = """
name: small
stages:
  first: {recipe: sft_tiny, set: {model.weights: null, sft.num_steps: STEPS, checkpoint.every_steps: 1}}
  second: {recipe: sft_tiny, set: {model.weights: "{first.export}", sft.num_steps: 1}}
  whole: {command: export_hf, set: {run: "{second.run}"}}
"""
RUN = [line for line in SMALL if not line.startswith(("recipe=", "model.weights"))]


def launch(root: Path, recipes: Path, image_tokenizer: Path) -> dict[str, Path]:
    """The chain's stages by name."""
    words = ["chain=small", f"output_root={root}", f"image_tokenizer.weights={image_tokenizer}", *RUN]
    command = [sys.executable, str(project_root() / "tools" / "launch.py"), *words]
    here = {**os.environ, "REALSR_HPC_RECIPES": str(recipes)}
    answer = subprocess.run(command, env=here, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    [folder] = (root / "chains").iterdir()
    return {path.name[3:]: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink()}


def states(stages: dict[str, Path]) -> dict[str, str]:
    found = {name: current_status(path) for name, path in stages.items()}
    return {name: status.state if status else "" for name, status in found.items()}


def test_a_chain_cancelled_in_its_first_stage_goes_on_to_the_undisturbed_end(cluster, image_tokenizer, tmp_path):
    recipes = tmp_path / "recipes"
    (recipes / "chains").mkdir(parents=True)
    for path in (project_root() / "recipes").iterdir():
        if path.name != "chains":
            (recipes / path.name).symlink_to(path)
    (recipes / "chains" / "small.yaml").write_text(CHAIN.replace("STEPS", "12"))
    calm = launch(tmp_path / "calm", recipes, image_tokenizer)
    disturbed = launch(tmp_path / "an odd one's root", recipes, image_tokenizer)
    assert list(disturbed) == ["first", "first.export", "second", "whole"]
    first = disturbed["first"]
    wait_for(lambda: steps_done(first) >= 2, first)
    subprocess.run([sys.executable, "tools/jobs.py", f"cancel={first}"], cwd=project_root(), check=True)
    # the jobs that waited for it leave the queue of themselves
    wait_for(lambda: states(disturbed) == dict.fromkeys(disturbed, "stopped"), first)
    before = steps_done(first)
    assert 2 <= before < 12
    assert launch(tmp_path / "an odd one's root", recipes, image_tokenizer) == disturbed
    for stages in (calm, disturbed):
        wait_for(lambda stages=stages: states(stages) == dict.fromkeys(stages, "done"), stages["second"])
    kinds = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in stages["whole"].glob("output/*.safetensors")
        }
        for stages in (calm, disturbed)
    ]
    assert kinds[0] and kinds[0] == kinds[1]
