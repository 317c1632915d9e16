"""One run through everything that ends jobs, against the same run left in peace: bitwise the same, nothing twice."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from realsr_hpc import runfolder
from realsr_hpc.checkpoint import integrity
from realsr_hpc.compare import connect
from realsr_hpc.launch.manage import cancel, resume
from realsr_hpc.launch.rundir import current_status, make_private, read_job, saved_step
from realsr_hpc.launch.verdict import HUNG
from realsr_hpc.paths import project_root
from realsr_hpc.runfolder import rank_log
from realsr_hpc.tracking import read_bookmark
from tests.mlflow_server import running
from tests.slurm.watching import log_of, results, state_of, steps_done, wait_for, wait_for_end

pytestmark = [pytest.mark.slurm(cluster="both nodes"), pytest.mark.timeout(1500)]
STEPS = 48
SEED = 20
DISK_MIB = 64
RECIPE = (
    "cluster.nodes=2", f"sft.num_steps={STEPS}", "checkpoint.every_steps=3", "checkpoint.keep_last=3",
    "checkpoint.async_save=true",
)  # fmt: skip


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
    run = connect(bookmark["uri"]).get_run(bookmark["run_id"])
    assert run.info.status == "FINISHED"
    assert {"system/cpu/percent", "system/memory/gib"} <= run.data.metrics.keys()
    assert {"mlflow.source.git.commit", "realsr_hpc.uncommitted"} <= run.data.tags.keys()


@pytest.mark.postgresql
def test_chaos_changes_nothing(undisturbed, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir = make_private(tmp_path / undisturbed.name)
    with running(tmp_path / "mlflow") as mlflow_server, small_disk(run_dir / "checkpoints") as mounted:
        arguments = (
            *RECIPE, "cluster.partition=preemptible", f"cluster.hang_limit_s={max(60, 2 * start_s(undisturbed))}",
            f"tracking.uri={mlflow_server.uri}",
        )  # fmt: skip
        chaos = Chaos(run_dir, tmp_path, random.Random(SEED), lambda: launch(tmp_path, *arguments))
        chaos.launch()
        first = read_bookmark(run_dir)
        disturbances = [preempted, requeued, a_rank_hangs, a_node_failed, a_rank_killed_and_a_shard_truncated]
        disturbances += [the_disk_full] if mounted else []
        chaos.dice.shuffle(disturbances)
        for number, disturb in enumerate(disturbances):
            wanted = steps_done(run_dir) + chaos.dice.randint(2, 4)
            wait_for(lambda: state_of(run_dir) == "running" and steps_done(run_dir) >= wanted, run_dir)  # noqa: B023
            wait_for(lambda: len(integrity.completed(run_dir / "checkpoints")) > 1, run_dir)  # one may be truncated
            if number in (1, 4):  # it stays away for one disturbance, then for good
                time.sleep(chaos.dice.random() / 2)
                mlflow_server.kill()
            attempts = log_of(run_dir).count("--- 20")
            disturb(chaos)
            if number == 1:
                mlflow_server.up()
            wait_for(lambda: log_of(run_dir).count("--- 20") > attempts, run_dir)  # noqa: B023
            wait_for(lambda: state_of(run_dir) == "running", run_dir)
        assert wait_for_end(run_dir) == "done", log_of(run_dir)
        assert results(run_dir) == results(undisturbed)
        assert read_bookmark(run_dir) == first
        mlflow_server.up()
        sync = [sys.executable, project_root() / "tools" / "sync_tracking.py", f"root={tmp_path}"]
        subprocess.run(sync, check=True, capture_output=True)
        everything_arrived_once(run_dir, results(undisturbed))


def start_s(run_dir: Path) -> int:
    """From submission to the first step: on a machine that does much else a start must not be taken for a hang."""
    lines = map(json.loads, runfolder.events(run_dir).read_text().splitlines())
    first = next(line["time_ms"] / 1000 for line in lines if line["kind"] == "metrics")
    return round(first - read_job(run_dir).time_s)


def everything_arrived_once(run_dir: Path, expected: dict[int, dict[str, float]]) -> None:
    """MLflow's history of every metric: the undisturbed run's values, one per step; its status: finished."""
    bookmark = read_bookmark(run_dir)
    mlflow = connect(bookmark["uri"])
    run = mlflow.get_run(bookmark["run_id"])
    assert run.info.status == "FINISHED"
    keys = {key for metrics in expected.values() for key in metrics}
    assert keys <= run.data.metrics.keys()
    for key in keys:
        history = [(point.step, point.value) for point in mlflow.get_metric_history(bookmark["run_id"], key)]
        assert sorted(history) == [(step, metrics[key]) for step, metrics in expected.items() if key in metrics], key


def test_a_cancelled_run_saves_is_not_requeued_and_goes_on_as_another_layout(undisturbed, launch, tmp_path):
    [run_dir] = launch(tmp_path, *RECIPE[:-1])  # without the asynchronous saves
    wait_for(lambda: steps_done(run_dir) >= 3, run_dir)
    assert "cancelled" in cancel(run_dir)
    queue = ["squeue", "--noheader", f"--jobs={read_job(run_dir).job_id}"]
    wait_for(lambda: not subprocess.run(queue, capture_output=True, text=True).stdout.strip(), run_dir)
    assert wait_for_end(run_dir) == "stopped" and saved_step(run_dir) == steps_done(run_dir), log_of(run_dir)
    assert resume(run_dir, ["cluster.nodes=1", "cluster.tasks_per_node=2", "parallel.tp=2"]).submitted
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    ours, theirs = results(run_dir), results(undisturbed)
    assert list(ours) == list(theirs)
    assert ours[STEPS]["sft/loss/mean"] == pytest.approx(theirs[STEPS]["sft/loss/mean"], rel=1e-3)


@dataclass
class Chaos:
    """The run that is disturbed."""

    run_dir: Path
    tmp_path: Path
    dice: random.Random
    launch: Callable[[], object]


def preempted(chaos: Chaos) -> None:
    """Another user's job of a better partition takes both nodes."""
    blocker = ["sbatch", "--nodes=2", "--exclusive", f"--output={chaos.tmp_path / 'blocker'}", "--wrap=sleep 1"]
    with frozen(chaos.run_dir):
        subprocess.run(blocker, check=True, capture_output=True)
        wait_for(lambda: state_of(chaos.run_dir) != "running", chaos.run_dir)


def requeued(chaos: Chaos) -> None:
    """An operator requeues it."""
    with frozen(chaos.run_dir):
        subprocess.run(["scontrol", "requeue", read_job(chaos.run_dir).job_id], check=True)
        wait_for(lambda: state_of(chaos.run_dir) != "running", chaos.run_dir)


def a_rank_hangs(chaos: Chaos) -> None:
    """One rank stands still, the other waits for it: both leave their stacks, and the job says why it ended."""
    os.kill(chaos.dice.choice(ranks_of(chaos.run_dir)), signal.SIGSTOP)
    time.sleep(1.0)
    for path in (runfolder.progress(chaos.run_dir), runfolder.events(chaos.run_dir)):
        os.utime(path, (0, 0))  # the last step long ago: what is left to wait for is a start's time
    verdicts = chaos.run_dir / "logs" / "verdicts"

    def hung() -> bool:
        codes = [json.loads(path.read_text())["code"] for path in verdicts.glob("*/node-*.json")]
        return HUNG in codes

    wait_for(hung, chaos.run_dir)
    for rank in (0, 1):
        assert "most recent call first" in rank_log(chaos.run_dir, rank).read_text()


def a_node_failed(chaos: Chaos) -> None:
    """A node goes down, and comes back when nothing of the job is left on it: Slurm drains it otherwise."""
    node = f"n{chaos.dice.randint(1, 2)}"
    update = ["scontrol", "update", f"NodeName={node}"]
    with frozen(chaos.run_dir):
        subprocess.run([*update, "State=DOWN", "Reason=chaos"], check=True)
    wait_for(lambda: not processes_naming(chaos.run_dir), chaos.run_dir)

    def is_back() -> bool:
        shown = subprocess.run(
            ["sinfo", "--noheader", f"--nodes={node}", "--format=%T"], capture_output=True, text=True
        )
        if not any(word in shown.stdout for word in ("down", "drain")):
            return True  # Slurm refuses to resume a node that came back by itself
        subprocess.run([*update, "State=RESUME"], capture_output=True)
        return False

    wait_for(is_back, chaos.run_dir)


def a_rank_killed_and_a_shard_truncated(chaos: Chaos) -> None:
    """The kernel's memory killer takes one rank; the newest checkpoint loses its end, so the one before it is used."""
    with frozen(chaos.run_dir) as pids:
        newest = integrity.completed(chaos.run_dir / "checkpoints")[-1]
        shard = chaos.dice.choice(sorted(newest.glob("*.distcp")))
        os.truncate(shard, shard.stat().st_size // 2)
        os.kill(chaos.dice.choice(pids), signal.SIGKILL)
    wait_for(lambda: f"{newest} rejected" in log_of(chaos.run_dir), chaos.run_dir)


def the_disk_full(chaos: Chaos) -> None:
    """Somebody fills the checkpoints' disk: three attempts to save, then the end, with all older checkpoints whole."""
    filler = chaos.run_dir / "checkpoints" / "filler"
    with frozen(chaos.run_dir):
        before = integrity.completed(chaos.run_dir / "checkpoints")
        fill(filler)
    wait_for(lambda: state_of(chaos.run_dir) == "failed", chaos.run_dir)
    assert os.strerror(errno.ENOSPC) in current_status(chaos.run_dir).message
    assert "training continues (2 failed in a row, 3 end the run)" in log_of(chaos.run_dir)
    left = integrity.completed(chaos.run_dir / "checkpoints")
    assert left[-1] >= before[-1] and not any(integrity.fault(folder) for folder in left)
    filler.unlink()
    chaos.launch()


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of DISK_MIB at `folder`; False where nobody may mount one: then the disk is never full."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def frozen(run_dir: Path) -> Iterator[list[int]]:
    """The ranks stand still meanwhile, so that no step is done that the disturbance should have prevented."""
    pids = ranks_of(run_dir)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def processes_naming(run_dir: Path) -> dict[int, bytes]:
    """Command lines of this machine that name the run's folder, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes()
            if str(run_dir).encode() in words:
                found[int(path.name)] = words
    return found


def ranks_of(run_dir: Path) -> list[int]:
    """Process ids of the run's ranks on this machine."""
    ranks = []
    for pid, words in processes_naming(run_dir).items():
        with suppress(OSError):
            if b"realsr_hpc\0" in words and b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                ranks.append(pid)
    return sorted(ranks)
