"""What can go wrong around one node's job on a real Slurm, and what must come of it: nothing lost, nothing twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import read_job, read_status
from realsr_hpc.locks import holder_of
from realsr_hpc.paths import project_root
from tests.slurm.conftest import SMALL
from tests.slurm.test_survival import ranks_of
from tests.slurm.watching import log_of, results, state_of, steps_done, wait_for, wait_for_end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 24
ONE_NODE = ("cluster.nodes=1", f"sft.num_steps={STEPS}", "checkpoint.every_steps=2")
N1_HAS_NO_DISK = (
    "import os, shutil\n"
    "if os.environ.get('SLURMD_NODENAME') == 'n1':\n"
    "    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)\n"
)


def shown(run_dir: Path) -> dict[str, str]:
    """What Slurm says of a run's job."""
    command = ["scontrol", "show", "job", "--oneliner", read_job(run_dir).job_id]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", answer))


def supervisor_of(run_dir: Path) -> int:
    """Process id of the supervisor, as its lock names it."""
    return holder_of(run_dir / "run.lock").pid


def test_an_unfit_node_is_left_killed_ranks_start_in_place_and_a_killed_supervisor_is_requeued(launch, tmp_path):
    (root := tmp_path / "it's a $(touch X) root").mkdir()
    (tmp_path / "sitecustomize.py").write_text(N1_HAS_NO_DISK)
    (tmp_path / "site.sh").write_text(f"export PYTHONPATH={tmp_path}\n")
    site = (f"cluster.environment_file={tmp_path / 'site.sh'}", "cluster.max_requeues=2")
    [run_dir] = launch(root, *ONE_NODE, *site)
    wait_for(lambda: state_of(run_dir) == "running" and steps_done(run_dir) >= 3, run_dir)
    facts = shown(run_dir)
    assert (facts["ExcNodeList"], facts["NodeList"], facts["Restarts"]) == ("n1", "n2", "1")
    os.kill(ranks_of(run_dir)[0], signal.SIGKILL)
    wait_for(lambda: log_of(run_dir).count("--- 20") == 2, run_dir)
    wait_for(lambda: steps_done(run_dir) >= 6, run_dir)
    assert shown(run_dir)["Restarts"] == "1" and "resumed from" in log_of(run_dir)
    os.kill(supervisor_of(run_dir), signal.SIGKILL)
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    assert shown(run_dir)["Restarts"] == "2" and list(results(run_dir)) == list(range(1, STEPS + 1))
    assert not list(tmp_path.rglob("X")) and not (project_root() / "X").exists()


def test_what_sbatch_refuses_can_be_launched_again_and_a_folder_is_run_by_one_job(launch, store, tmp_path):
    shutil.copy(store, tmp_path / "mlflow.db")
    command = [sys.executable, project_root() / "tools" / "launch.py", *SMALL, *ONE_NODE, f"output_root={tmp_path}"]
    weights = "image_tokenizer.weights=recipes/assets/tiny/image_tokenizer.safetensors"
    wrong = [*command, "data=bundled", "cluster.partition=nowhere", "follow=false", weights]
    refused = subprocess.run(wrong, capture_output=True, text=True)
    assert refused.returncode == 1 and "invalid partition specified: nowhere" in refused.stdout, refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr
    [run_dir] = launch(tmp_path / "plain", *ONE_NODE, f"prepare={tmp_path / 'plain' / 'run'}")
    here = {**os.environ, "RUN_DIR": str(run_dir), "PYTHON": sys.executable}
    batch = str(project_root() / "slurm" / "grpo_7b.sbatch")
    options = ["--parsable", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/%j.out"]
    sbatch, kept = ["sbatch", *options, batch], {"check": True, "capture_output": True, "text": True}
    submitted = [subprocess.run(sbatch, env=here, cwd=project_root(), **kept) for _ in range(2)]
    ids = [answer.stdout.strip() for answer in submitted]
    wait_for(lambda: any((tmp_path / f"{job}.out").exists() and "already being run" in
                         (tmp_path / f"{job}.out").read_text() for job in ids), run_dir)  # fmt: skip
    wait_for(lambda: steps_done(run_dir) >= 3, run_dir)
    assert log_of(run_dir).count("--- 20") == 1 and read_job(run_dir).job_id in ids
    assert "stopped with a checkpoint" in cancel(run_dir)
    assert read_status(run_dir).state == "stopped" and len(results(run_dir)) == steps_done(run_dir)


def test_a_controller_that_is_away_is_asked_again(launch, tmp_path):
    [run_dir] = launch(tmp_path, *ONE_NODE, "cluster.restarts_in_place=0")
    wait_for(lambda: state_of(run_dir) == "running" and steps_done(run_dir) >= 3, run_dir)
    place = Path(os.environ["SLURM_CONF"]).parent.parent / "run" / "slurmctld.pid"
    controller = int(place.read_text())
    os.kill(controller, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{controller}").exists(), run_dir)
    try:
        os.kill(ranks_of(run_dir)[0], signal.SIGKILL)
        wait_for(lambda: (read_status(run_dir) or pytest.fail("no status")).state == "requeued", run_dir)
        time.sleep(3)
    finally:
        subprocess.run(["slurmctld", "-i"], check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
    assert wait_for_end(run_dir) == "done", log_of(run_dir)
    assert list(results(run_dir)) == list(range(1, STEPS + 1))
