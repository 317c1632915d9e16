"""One run through everything that ends jobs, against the same run left in peace: bitwise the same, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from realsr_hpc.checkpoint import manifest
from realsr_hpc.compare import connect
from realsr_hpc.launch.manage import cancel, resume
from realsr_hpc.launch.rundir import rank_log, read_job
from realsr_hpc.tracking import read_bookmark
from tests.slurm.watching import log_of, results, state_of, steps_done, wait_for, wait_for_end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
STEPS = 80
SEED = 20
RECIPE = ("cluster.nodes=2", f"sft.num_steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two nodes that nothing happens to."""
    [run_dir] = launch(tmp_path_factory.mktemp("undisturbed"), *RECIPE)
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    return run_dir


def test_two_nodes_train_together(undisturbed):
    assert list(results(undisturbed)) == list(range(1, STEPS + 1))
    assert rank_log(undisturbed, 1).exists()
    assert (undisturbed / "code").resolve().parent == undisturbed.parent / "code"
    bookmark = read_bookmark(undisturbed)
    assert connect(bookmark["uri"]).get_run(bookmark["run_id"]).info.status == "FINISHED"


def test_chaos_changes_nothing(undisturbed, launch, tmp_path):
    [run_dir] = launch(tmp_path, *RECIPE, "cluster.partition=preemptible", "checkpoint.async_save=true")
    first = None
    dice = random.Random(SEED)
    disturbances = [preempted, requeued, a_rank_killed, a_node_failed, a_shard_truncated]
    dice.shuffle(disturbances)
    for disturb in disturbances:
        wanted = steps_done(run_dir) + dice.randint(6, 9)
        wait_for(lambda: state_of(run_dir) == "running" and steps_done(run_dir) >= wanted, run_dir)  # noqa: B023
        first = first or read_bookmark(run_dir)
        attempts = log_of(run_dir).count("--- 20")
        disturb(run_dir, tmp_path, dice)
        wait_for(lambda: log_of(run_dir).count("--- 20") > attempts, run_dir)  # noqa: B023
        wait_for(lambda: state_of(run_dir) == "running", run_dir)
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    assert results(run_dir) == results(undisturbed)
    assert "rejected" in log_of(run_dir)
    assert read_bookmark(run_dir) == first
    history = connect(first["uri"]).get_metric_history(first["run_id"], "sft/loss/mean")
    expected = [(step, metrics["sft/loss/mean"]) for step, metrics in results(undisturbed).items()]
    assert sorted((point.step, point.value) for point in history) == expected


def test_a_run_goes_on_as_another_layout(undisturbed, launch, tmp_path):
    [run_dir] = launch(tmp_path, *RECIPE)
    wait_for(lambda: steps_done(run_dir) >= 6, run_dir)
    cancel(run_dir)
    queue = ["squeue", "--noheader", f"--jobs={read_job(run_dir).job_id}"]
    wait_for(lambda: not subprocess.run(queue, capture_output=True, text=True).stdout.strip(), run_dir)
    assert resume(run_dir, ["cluster.nodes=1", "cluster.tasks_per_node=2", "parallel.tp=2"]).submitted
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    ours, theirs = results(run_dir), results(undisturbed)
    assert list(ours) == list(theirs)
    assert ours[STEPS]["sft/loss/mean"] == pytest.approx(theirs[STEPS]["sft/loss/mean"], rel=1e-3)


def preempted(run_dir: Path, tmp_path: Path, dice: random.Random) -> None:
    """Another user's job of a better partition takes both nodes."""
    blocker = ["sbatch", "--nodes=2", "--exclusive", f"--output={tmp_path / 'blocker'}", "--wrap=sleep 1"]
    subprocess.run(blocker, check=True, capture_output=True)


def requeued(run_dir: Path, tmp_path: Path, dice: random.Random) -> None:
    """An operator requeues it."""
    subprocess.run(["scontrol", "requeue", read_job(run_dir).job_id], check=True)


def a_rank_killed(run_dir: Path, tmp_path: Path, dice: random.Random) -> None:
    """The kernel's memory killer takes one rank."""
    os.kill(dice.choice(ranks_of(run_dir)), signal.SIGKILL)


def a_node_failed(run_dir: Path, tmp_path: Path, dice: random.Random) -> None:
    """A node goes down and comes back."""
    update = ["scontrol", "update", f"NodeName=n{dice.randint(1, 2)}"]
    subprocess.run([*update, "State=DOWN", "Reason=chaos"], check=True)
    subprocess.run([*update, "State=RESUME"], check=True)


def a_shard_truncated(run_dir: Path, tmp_path: Path, dice: random.Random) -> None:
    """The newest checkpoint loses its end, and every rank is killed."""
    pids = ranks_of(run_dir)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # no newer checkpoint meanwhile
    shard = dice.choice(sorted(manifest.completed(run_dir / "checkpoints")[-1].glob("*.distcp")))
    os.truncate(shard, shard.stat().st_size // 2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def ranks_of(run_dir: Path) -> list[int]:
    """Process ids of the run's ranks on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, places = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if str(run_dir).encode() in words and b"realsr_hpc\0" in words and b"\0RANK=" in places:
            found.append(int(path.name))
    return sorted(found)
