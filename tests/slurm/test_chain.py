"""A chain as dependent jobs on a real Slurm: each stage killed once, another way each, it ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from realsr_hpc.commands.launch import main
from realsr_hpc.config.load import written
from realsr_hpc.launch.rundir import ALIVE, current_status, read_job
from realsr_hpc.locks import holder_of
from realsr_hpc.paths import project_root
from tests.slurm.conftest import SMALL
from tests.slurm.test_survival import ranks_of
from tests.slurm.watching import results, state_of, steps_done, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

CHAIN = """
name: small
stages:
  first: {recipe: sft_tiny, set: {model.weights: null, sft.num_steps: 8, checkpoint.every_steps: 1}}
  second: {recipe: sft_tiny, set: {model.weights: "{first.export}", sft.num_steps: 8, checkpoint.every_steps: 1}}
"""
RUN = [line for line in SMALL if not line.startswith(("recipe=", "model.weights"))]


@pytest.fixture
def launch_chain(cluster, image_tokenizer, tmp_path, monkeypatch):
    """A function of an output root that launches the chain there; its stages by name."""
    recipes = tmp_path / "recipes"
    (recipes / "chains").mkdir(parents=True)
    for path in (project_root() / "recipes").iterdir():
        if path.name != "chains":
            (recipes / path.name).symlink_to(path)
    (recipes / "chains" / "small.yaml").write_text(CHAIN)
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(recipes))

    def launch(root: Path) -> dict[str, Path]:
        notify = f"""tracking.notify={written(f'cat >> "{root}/what it said"')}"""
        assert (
            main(["chain=small", f"output_root={root}", f"image_tokenizer.weights={image_tokenizer}", notify, *RUN])
            == 0
        )
        [folder] = (root / "chains").iterdir()
        return {path.name[3:]: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink()}

    return launch


def test_a_chain_of_which_each_stage_is_killed_once_ends_with_the_undisturbed_ones_bits(launch_chain, tmp_path):
    root = tmp_path / "an odd one's root"
    disturbed, calm = launch_chain(root), launch_chain(tmp_path / "calm")
    first, export, second = disturbed.values()
    assert list(disturbed) == ["first", "first.export", "second"]

    wait_for(lambda: steps_done(first) >= 2, first)
    os.kill(holder_of(first / "run.lock").pid, signal.SIGKILL)  # the supervisor: the job requeues itself
    assert steps_done(first) < 8
    wait_for(lambda: state_of(export) == "running", first)
    subprocess.run(["scancel", read_job(export).job_id], check=True)
    # the job that waited for it leaves the queue of itself
    wait_for(lambda: not {state_of(export), state_of(second)} & {*ALIVE}, first)
    assert state_of(first) == "done" and not {state_of(export), state_of(second)} & {"done"}

    assert launch_chain(root) == disturbed
    wait_for(lambda: steps_done(second) >= 2, second)
    os.kill(ranks_of(second)[0], signal.SIGKILL)  # it starts again in its allocation
    assert steps_done(second) < 8

    for stages in (calm, disturbed):
        wait_for(lambda stages=stages: {current_status(path).state for path in stages.values()} == {"done"}, second)
    for name in ("first", "second"):
        assert results(disturbed[name]) == results(calm[name]) and list(results(calm[name])) == [*range(1, 9)]
    assert [checksums(path) for path in disturbed.values()] == [checksums(path) for path in calm.values()]
    assert all(checksums(path) for path in calm.values())
    said = root / "what it said"  # a run is done a moment before its end is told
    wait_for(lambda: len(said.read_text().splitlines()) >= 6, second)
    told = [json.loads(line) for line in said.read_text().splitlines()]
    assert Counter(line["event"] for line in told) == {"start": 4, "end": 2}  # each run began twice
    assert {line["folder"] for line in told} == {str(first), str(second)}


def checksums(stage: Path) -> dict[str, str]:
    """Of the weights that a stage left: its last checkpoint, or its export."""
    paths = [*stage.glob("checkpoints/step-*08/*.distcp"), *stage.glob("output/*.safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
