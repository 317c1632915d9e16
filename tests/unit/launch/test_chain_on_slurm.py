"""Chains as dependent jobs: launched twice at once, again after a cancel, and where a stage is alive elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from realsr_hpc.commands.launch import main
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import Job, make_private, read_job, write_job, write_status
from realsr_hpc.paths import project_root

COMMANDS = {
    "sbatch": """
        exec 9>"$QUEUE.lock"; flock 9; sleep 0.2
        n=$(($(wc -l < "$QUEUE") + 1)); echo "$n PENDING Dependency" >> "$QUEUE"; cp "$1" "$QUEUE.$n"
        echo "quota: job 3 of 9 counted"; echo "Submitted batch job $n" """,
    "squeue": 'cat "$QUEUE"',
    "scancel": 'sed -i "s/^${@: -1} .*/${@: -1} CANCELLED None/" "$QUEUE"',
    "scontrol": "",
    "srun": "",
}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a Slurm that starts no job: `ID STATE REASON` lines; the batch scripts lie beside it."""
    (folder := tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("QUEUE", str(path := tmp_path / "queue"))
    path.touch()
    return path


def waits_for(queue: Path) -> dict[str, list[str]]:
    """The jobs that each job still in the queue depends on."""
    alive = [line.split()[0] for line in queue.read_text().splitlines() if "PENDING" in line]
    found = {job: re.search(r"--dependency=afterok:(\S+)", Path(f"{queue}.{job}").read_text()) for job in alive}
    return {job: match[1].split(":") if match else [] for job, match in found.items()}


def test_a_chain_is_submitted_once_and_anew_from_the_stage_that_was_cancelled(queue, tmp_path, capsys):
    words = ["chain=tiny", "cluster.kind=slurm", f"output_root={tmp_path / 'runs'}"]
    door = [sys.executable, project_root() / "tools" / "launch.py", *words]
    both = [subprocess.Popen(door, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].count("alive ") for process in both)
    assert [process.returncode for process in both] == [0, 0] and said == [0, 5]
    assert waits_for(queue) == {"1": [], "2": ["1"], "3": ["2"], "4": ["3"], "5": ["3"]}

    stages = {path.name[3:]: path.resolve() for path in (tmp_path / "runs").glob("chains/*/*-*")}
    cancel(stages["sft"])  # Slurm drops what waits for it minutes later
    assert main(words) == 0
    assert waits_for(queue) == {"6": [], "7": ["6"], "8": ["7"], "9": ["8"], "10": ["8"]}
    queue.write_text(queue.read_text().replace("8 PENDING Dependency\n", "8 PENDING DependencyNeverSatisfied\n"))
    assert main(words) == 0
    assert waits_for(queue) == {"6": [], "7": ["6"], "11": ["7"], "12": ["11"], "13": ["11"]}

    capsys.readouterr()
    assert main([*words[::2]]) == 2  # on this machine, beside those jobs
    assert "sft: submitted as Slurm job 6; cancel it, or launch with cluster.kind=slurm" in capsys.readouterr().out
    export = make_private(stages["sft.export"])
    write_job(export, Job("local", "99", "elsewhere", "log", "a"))
    write_status(export, "running", launch="a")
    assert main(words) == 2 and "sft.export: running as local job 99 on elsewhere" in capsys.readouterr().out
    assert len(queue.read_text().splitlines()) == 13


def test_a_run_that_is_slurms_is_not_started_here_as_well(queue, tmp_path, capsys):
    words = ["recipe=sft_tiny", "data=bundled", f"output_root={tmp_path / 'runs'}"]
    assert main([*words, "cluster.kind=slurm", "follow=false"]) == 0
    [run_dir] = [path.parent for path in (tmp_path / "runs").glob("*/recipe.yaml")]
    write_status(run_dir, "running", launch=(job := read_job(run_dir)) and job.launch)
    status = run_dir / "status.json"
    status.write_text(re.sub(r'"time_s": [\d.]+', '"time_s": 1.0', status.read_text()))
    before = (run_dir / "recipe.yaml").read_text()
    capsys.readouterr()
    assert main([*words, "follow=false"]) == 0 and "already running as job 1\n" in capsys.readouterr().out
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert main([*words, "follow=false"]) == 0
    assert f"squeue does not answer here: if that job is over, remove {run_dir}/job.json" in capsys.readouterr().out
    assert (run_dir / "recipe.yaml").read_text() == before and read_job(run_dir) == job
