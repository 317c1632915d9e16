"""Real jobs on a real Slurm: a sweep as one array on one node, faulty jobs, the plain batch file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from realsr_hpc import runfolder
from realsr_hpc.compare import connect, find_sweep
from realsr_hpc.config.load import compose
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import current_status, read_job, read_status, write_status
from realsr_hpc.paths import project_root
from tests.slurm.watching import log_of, steps_done, wait_for_end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_the_cluster_listens_on_loopback_alone(cluster):
    pids = [int(path.read_text()) for path in (Path(os.environ["SLURM_CONF"]).parent.parent / "run").glob("slurm*.pid")]
    heard = [psutil.Process(pid).net_connections() for pid in pids]
    assert len(pids) == 3 and all(heard)
    assert {place.laddr.ip for places in heard for place in places if place.status == "LISTEN"} == {"127.0.0.1"}


def test_a_sweep_is_one_array_on_one_node_under_one_parent_and_only_the_missing_is_submitted_again(launch, tmp_path):
    (site := tmp_path / "site").mkdir()
    (site / "site.sh").write_text(f"export HF_TOKEN=never-written-down\ntouch {site}/$SLURM_JOB_ID\n")
    sweep = (
        "-m", "cluster.nodes=1", "cluster.extra_sbatch={nodelist: n1}", "sft.num_steps=2", "sweep=seeds",
        f"cluster.environment_file={site}/site.sh",
    )  # fmt: skip
    runs = launch(tmp_path, *sweep, "seed=0,1")
    ids = {read_job(run).job_id.partition("_")[0] for run in runs}
    assert len(runs) == 2 and len(ids) == 1
    assert {wait_for_end(run) for run in runs} == {"done"}
    before = {run: (run / "job.json").read_text() for run in runs}
    write_status(runs[1], "failed", 1, launch=read_job(runs[1]).launch)
    assert launch(tmp_path, *sweep, "seed=0,1") != []
    assert (runs[0] / "job.json").read_text() == before[runs[0]]
    assert (runs[1] / "job.json").read_text() != before[runs[1]]
    assert wait_for_end(runs[1]) == "done"
    assert len(list(site.iterdir())) == 4  # each of the three jobs read the site's file
    mlflow = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    children = find_sweep(mlflow, "realsr_hpc", "seeds")
    assert sorted(child.data.params["seed"] for child in children) == ["0", "1"]
    kept = {file.path for file in mlflow.list_artifacts(children[0].info.run_id, "launch")}
    assert kept == {"launch/recipe.yaml", "launch/plan.txt", "launch/environment.json"}
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in (*runs, tmp_path / "arrays"))
    shutil.rmtree(site)
    found = subprocess.run(["grep", "--recursive", "never-written-down", tmp_path], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout


def test_a_sweep_of_60_is_two_arrays_where_slurm_takes_50_and_the_last_run_of_the_second_trains(launch, tmp_path):
    runs = launch(
        tmp_path / 'sixty "seeds"', "-m", "cluster.nodes=1", "cluster.extra_sbatch={hold: true}", "sft.num_steps=1",
        "seed=range(60)", "sweep=sixty",
    )  # fmt: skip
    jobs = {read_job(run).job_id: run for run in runs}
    arrays = Counter(job.partition("_")[0] for job in jobs)
    [large, small] = sorted(arrays, key=arrays.__getitem__, reverse=True)
    assert set(jobs) == {f"{large}_{task}" for task in range(50)} | {f"{small}_{task}" for task in range(10)}
    assert "cancelled" in cancel(jobs[f"{large}_7"])
    waiting = {job for job, run in jobs.items() if current_status(run).state == "submitted"}
    assert waiting == set(jobs) - {f"{large}_7"}  # the other runs of its array wait on
    last = jobs[f"{small}_9"]
    subprocess.run(["scontrol", "release", f"{small}_9"], check=True)
    assert wait_for_end(last) == "done" and steps_done(last) == 1, log_of(last)
    subprocess.run(["scancel", large, small], check=True)
    assert {wait_for_end(run) for run in runs if run != last} == {"stopped"}
    assert [run for run in runs if runfolder.progress(run).exists()] == [last]


def test_a_faulty_job_tells_why_and_updates_that_are_not_finite_are_skipped_kept_and_end_the_run(launch, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"of": "another kind"}')  # JSON, as launching looks for: what it lacks is seen in the job
    [faulty] = launch(tmp_path / "faulty", "cluster.nodes=1", "sft.num_steps=2", f"text_tokenizer.path={other}")
    [wild] = launch(
        tmp_path / "wild", "cluster.nodes=1", "sft.num_steps=9", "optim.lr=1e15", "optim.min_lr=1e15",
        "optim.max_skipped_in_a_row=2",
    )  # fmt: skip
    assert wait_for_end(faulty) == "failed"
    assert "other.json, which is not a tokenizer.json" in read_status(faulty).message
    assert f"{(faulty / 'code').resolve()}/realsr_hpc/train/sft.py" in read_status(faulty).message  # not the checkout's
    assert wait_for_end(wild) == "failed"
    assert "optim.max_skipped_in_a_row: 2" in read_status(wild).message
    assert len(list((wild / "skipped").glob("update-*/dp-0.safetensors"))) == 2


def test_the_plain_batch_file_runs_the_code_as_it_was_when_it_was_prepared(cluster, launch, tmp_path):
    """The lines of slurm/grpo_7b.sbatch, without its GPUs, on the small recipe."""
    script = (project_root() / "slurm" / "grpo_7b.sbatch").read_text()
    wanted = compose(["recipe=grpo_7b"]).cluster
    for line in (f"--nodes={wanted.nodes}", f"--gpus-per-node={wanted.gpus_per_node}", "--requeue", "--signal=USR2@"):
        assert f"#SBATCH {line}" in script
    [run_dir] = launch(tmp_path, "cluster.nodes=2", "sft.num_steps=2", f"prepare={tmp_path / 'plain'}")
    code, name = run_dir / "code", "realsr_hpc/train/sft.py"
    with (code / name).open("a") as copy:
        copy.write("\nprint('run from the copy')\n")
    lines = (code / "SHA256SUMS").read_text().splitlines()
    new = subprocess.run(["sha256sum", name], cwd=code, check=True, capture_output=True, text=True).stdout.strip()
    kept = [line for line in lines if not line.endswith(f"  {name}")]
    (code / "SHA256SUMS").write_text("\n".join([*kept, new, ""]))
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path / 'out'}", "--wait"]
    here = {**os.environ, "RUN_DIR": str(run_dir), "PYTHON": sys.executable}
    batch = str(project_root() / "slurm" / "grpo_7b.sbatch")
    subprocess.run(["sbatch", *options, batch], env=here, cwd=project_root(), check=True, capture_output=True)
    assert wait_for_end(run_dir) == "done" and steps_done(run_dir) == 2, log_of(run_dir)
    assert "run from the copy" in log_of(run_dir) and read_job(run_dir) is not None
    assert (run_dir / "environment.json").exists() and run_dir.stat().st_mode & 0o077 == 0
