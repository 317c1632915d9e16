"""Real jobs on a real Slurm: cancelling, a sweep as one array on one node, a faulty job, the plain batch file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from realsr_hpc.compare import connect, find_sweep
from realsr_hpc.config.load import compose, project_root
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import read_job
from tests.slurm.watching import log_of, steps_done, wait_for, wait_for_end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_cancelled_job_saves_and_is_not_requeued(launch, tmp_path):
    [run_dir] = launch(tmp_path, "cluster.nodes=1", "sft.num_steps=100000", "checkpoint.every_steps=100000")
    wait_for(lambda: steps_done(run_dir) >= 2, run_dir)
    assert "cancelled" in cancel(run_dir)
    queue = ["squeue", "--noheader", f"--jobs={read_job(run_dir).job_id}"]
    wait_for(lambda: not subprocess.run(queue, capture_output=True, text=True).stdout.strip(), run_dir)
    assert wait_for_end(run_dir) == "stopped"
    assert any((run_dir / "checkpoints").glob("step-*")), log_of(run_dir)


def test_a_sweep_is_one_array_on_one_node_under_one_parent_and_only_the_missing_is_submitted_again(launch, tmp_path):
    sweep = ("-m", "cluster.nodes=1", "cluster.extra_sbatch={nodelist: n1}", "sft.num_steps=2", "sweep=seeds")
    runs = launch(tmp_path, *sweep, "seed=0,1")
    ids = {read_job(run).job_id.partition("_")[0] for run in runs}
    assert len(runs) == 2 and len(ids) == 1
    assert {wait_for_end(run) for run in runs} == {"done"}
    before = {run: (run / "job.json").read_text() for run in runs}
    (runs[1] / "status.json").write_text(json.dumps({"state": "failed", "code": 1, "message": "", "time_s": 0.0}))
    assert launch(tmp_path, *sweep, "seed=0,1") != []
    assert (runs[0] / "job.json").read_text() == before[runs[0]]
    assert (runs[1] / "job.json").read_text() != before[runs[1]]
    assert wait_for_end(runs[1]) == "done"
    mlflow = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    children = find_sweep(mlflow, "realsr_hpc", "seeds")
    assert sorted(child.data.params["seed"] for child in children) == ["0", "1"]
    kept = {file.path for file in mlflow.list_artifacts(children[0].info.run_id, "launch")}
    assert kept == {"launch/recipe.yaml", "launch/plan.txt", "launch/environment.json"}


def test_a_faulty_job_tells_why(launch, tmp_path):
    [run_dir] = launch(tmp_path, "cluster.nodes=1", "sft.num_steps=2", "text_tokenizer.path=nowhere.json")
    assert wait_for_end(run_dir) == "failed"
    assert "nowhere.json" in json.loads((run_dir / "status.json").read_text())["message"]


def test_updates_that_are_not_finite_are_skipped_kept_and_end_the_run(launch, tmp_path):
    [run_dir] = launch(
        tmp_path, "cluster.nodes=1", "sft.num_steps=9", "optim.lr=1e30", "optim.min_lr=1e30",
        "optim.max_skipped_in_a_row=2",
    )  # fmt: skip
    assert wait_for_end(run_dir) == "failed"
    assert "optim.max_skipped_in_a_row: 2" in json.loads((run_dir / "status.json").read_text())["message"]
    assert len(list((run_dir / "skipped").glob("update-*/dp-0.safetensors"))) == 2
    assert (run_dir / "status.json").stat().st_mode and run_dir.stat().st_mode & 0o077 == 0


def test_the_plain_batch_file_trains(cluster, launch, image_tokenizer, tmp_path):
    """The same lines as slurm/grpo_7b.sbatch, without its GPUs, on a prepared recipe."""
    script = (project_root() / "slurm" / "grpo_7b.sbatch").read_text()
    wanted = compose(["recipe=grpo_7b"]).cluster
    for line in (f"--nodes={wanted.nodes}", f"--gpus-per-node={wanted.gpus_per_node}", "--requeue", "--signal=USR2@"):
        assert f"#SBATCH {line}" in script
    from realsr_hpc.config.load import to_yaml
    from tests.slurm.conftest import SMALL

    run_dir = Path(tmp_path / "plain")
    run_dir.mkdir()
    places = [f"output_root={tmp_path}", f"image_tokenizer.weights={image_tokenizer}", "cluster.nodes=2"]
    (run_dir / "recipe.yaml").write_text(to_yaml(compose([*SMALL, *places, "sft.num_steps=2"])))
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path / 'out'}", "--wait"]
    here = {**os.environ, "RUN_DIR": str(run_dir), "PYTHON": sys.executable}
    batch = str(project_root() / "slurm" / "grpo_7b.sbatch")
    subprocess.run(["sbatch", *options, batch], env=here, cwd=project_root(), check=True, capture_output=True)
    assert wait_for_end(run_dir) == "done" and steps_done(run_dir) == 2, log_of(run_dir)
