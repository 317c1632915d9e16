"""Real jobs on a real Slurm: two nodes, preemption, cancelling, an array; the small SFT recipe trains in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from realsr_hpc.compare import connect, find_sweep
from realsr_hpc.config.load import compose, project_root
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import ALIVE, current_status, list_runs, rank_log, read_job
from realsr_hpc.tracking import metrics_by_step, read_bookmark, read_progress

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
PATIENCE_S = 400
SMALL = [
    "recipe=sft_tiny",
    "cluster.kind=slurm",
    "cluster.tasks_per_node=1",
    "cluster.cpus_per_task=1",
    "model.weights=null",
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=32",
    "vlcot.max_text_tokens=6",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "sft.batch_size=2",
    "sft.heldout_every_steps=100000",
    "sft.sample_every_steps=0",
    "checkpoint.every_steps=100000",
    "optim.warmup_steps=0",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """Two nodes of four processors, stopped afterwards by their process ids."""
    script = project_root() / "slurm" / "dev_cluster.sh"
    settings = {"SLURM_ROOT": str(tmp_path_factory.mktemp("slurm")), "PORT": "29100", "NODES": "2"}
    environment = {**os.environ, **settings}
    up = subprocess.run([script, "up"], env=environment, capture_output=True, text=True, check=True)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = up.stdout.strip().splitlines()[-1].partition("SLURM_CONF=")[2]
    yield
    subprocess.run([script, "down"], env=environment, check=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory) -> Path:
    """Random weights are enough to train on."""
    import torch

    from realsr_hpc.tokenizer.image import ImageTokenizer, save_image_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "image_tokenizer.safetensors"
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(compose(["recipe=sft_tiny"]).image_tokenizer), path)
    return path


@pytest.fixture
def launch(cluster, image_tokenizer, tmp_path) -> Callable[..., list[Path]]:
    """tools/launch.py with the small recipe; the folders of its runs."""

    def run(*arguments: str) -> list[Path]:
        places = [f"output_root={tmp_path}", f"image_tokenizer.weights={image_tokenizer}", "follow=false"]
        command = [sys.executable, str(project_root() / "tools" / "launch.py"), *arguments, *SMALL, *places]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return list_runs(tmp_path)

    return run


def wait_for(what: Callable[[], bool], run_dir: Path) -> None:
    deadline = time.time() + PATIENCE_S
    while not what():
        assert time.time() < deadline, f"{current_status(run_dir)}\n{_log(run_dir)}"
        time.sleep(0.5)


def wait_for_end(run_dir: Path) -> str:
    wait_for(lambda: (current_status(run_dir) or pytest.fail("never launched")).state not in ALIVE, run_dir)
    return current_status(run_dir).state


def steps_done(run_dir: Path) -> int:
    return (read_progress(run_dir) or {"step": 0})["step"]


def _log(run_dir: Path) -> str:
    log = rank_log(run_dir, 0)
    return log.read_text()[-3000:] if log.exists() else "no log"


def test_two_nodes_train_together(launch):
    [run_dir] = launch("cluster.nodes=2", "sft.num_steps=3")
    assert wait_for_end(run_dir) == "done", _log(run_dir)
    assert list(metrics_by_step(run_dir)) == [1, 2, 3]
    assert rank_log(run_dir, 1).exists()
    assert (run_dir / "code").resolve().parent == run_dir.parent / "code"
    bookmark = read_bookmark(run_dir)
    assert connect(bookmark["uri"]).get_run(bookmark["run_id"]).info.status == "FINISHED"


def test_a_preempted_job_goes_on_where_it_stopped_in_the_same_mlflow_run(launch, tmp_path):
    [run_dir] = launch("cluster.nodes=2", "cluster.partition=scavenge", "sft.num_steps=150")
    wait_for(lambda: steps_done(run_dir) >= 3, run_dir)
    first = read_bookmark(run_dir)
    blocker = ["sbatch", "--parsable", "--nodes=2", "--exclusive", f"--output={tmp_path / 'blocker'}", "--wrap=sleep 1"]
    subprocess.run(blocker, check=True, capture_output=True)
    assert wait_for_end(run_dir) == "done", _log(run_dir)
    log = _log(run_dir) if rank_log(run_dir, 0).stat().st_size < 3000 else rank_log(run_dir, 0).read_text()
    assert log.count("--- 20") == 2 and "resumed from" in log
    assert list(metrics_by_step(run_dir)) == list(range(1, 151))
    assert read_bookmark(run_dir) == first
    history = connect(first["uri"]).get_metric_history(first["run_id"], "sft/loss/mean")
    steps = [point.step for point in history]
    assert len(steps) == len(set(steps)) and set(steps) == set(range(1, 151))


def test_a_cancelled_job_saves_and_is_not_requeued(launch):
    [run_dir] = launch("cluster.nodes=1", "sft.num_steps=100000")
    wait_for(lambda: steps_done(run_dir) >= 2, run_dir)
    assert "cancelled" in cancel(run_dir)
    job = read_job(run_dir)
    queue = ["squeue", "--noheader", f"--jobs={job.job_id}"]
    wait_for(lambda: not subprocess.run(queue, capture_output=True, text=True).stdout.strip(), run_dir)
    assert wait_for_end(run_dir) == "stopped"
    assert any((run_dir / "checkpoints").glob("step-*")), _log(run_dir)


def test_a_sweep_is_one_array_under_one_parent_run_and_is_not_submitted_twice(launch, tmp_path):
    sweep = ("-m", "cluster.nodes=1", "sft.num_steps=2", "seed=0,1", "sweep=seeds")
    runs = launch(*sweep)
    ids = {read_job(run).job_id.partition("_")[0] for run in runs}
    assert len(runs) == 2 and len(ids) == 1
    assert {wait_for_end(run) for run in runs} == {"done"}
    before = [(run / "job.json").read_text() for run in runs]
    assert launch(*sweep) == runs and [(run / "job.json").read_text() for run in runs] == before
    children = find_sweep(connect(f"sqlite:///{tmp_path / 'mlflow.db'}"), "realsr_hpc", "seeds")
    assert sorted(child.data.tags["realsr_hpc.varied"] for child in children) == ["seed=0", "seed=1"]


def test_a_faulty_job_tells_why(launch):
    [run_dir] = launch("cluster.nodes=1", "sft.num_steps=2", "text_tokenizer.path=nowhere.json")
    assert wait_for_end(run_dir) == "failed"
    assert "nowhere.json" in json.loads((run_dir / "status.json").read_text())["message"]


def test_the_plain_batch_file_is_one_that_slurm_takes():
    script = (project_root() / "slurm" / "grpo_7b.sbatch").read_text()
    cluster = compose(["recipe=grpo_7b"]).cluster
    for line in (f"--nodes={cluster.nodes}", f"--gpus-per-node={cluster.gpus_per_node}", "--requeue", "USR2@"):
        assert f"#SBATCH {line}" in script.replace("--signal=USR2@", "USR2@")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
