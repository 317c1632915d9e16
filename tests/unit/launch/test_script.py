"""What a job's script holds: set-up lines, the request for a killed supervisor, values and options that reach Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from realsr_hpc.config.load import compose
from realsr_hpc.launch.command import main
from realsr_hpc.launch.script import setup_lines
from realsr_hpc.launch.snapshot import take_snapshot
from realsr_hpc.launch.submit import prepare
from realsr_hpc.paths import project_root

from .conftest import SLURM


def run_setup(tmp_path: Path, config, code: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join(["#!/bin/bash", *setup_lines(config.cluster, code), *more, ""])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path,
                          env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"})  # fmt: skip


def test_set_up_lines_quote_and_end_the_job_where_they_fail(tmp_path, slurm):
    root = tmp_path / "it's $(touch X) root"
    config = compose([*SLURM, "output_root=" + json.dumps(str(root))])
    code = take_snapshot([config])
    shown = run_setup(tmp_path, config, code, 'echo "$PWD|$PYTHONPATH|$PYTHONSAFEPATH"')
    assert shown.stdout == f"{code}|{code}|1\n" and shown.returncode == 0, shown.stderr
    assert not list(tmp_path.rglob("X"))
    (tmp_path / "site.sh").write_text("export SITE=1\nfalse\n")
    for file in (tmp_path / "site.sh", tmp_path / "missing.sh"):
        site = compose([*SLURM, f"cluster.environment_file={file}"])
        ended = run_setup(tmp_path, site, code, "echo went on")
        assert ended.returncode != 0 and "went on" not in ended.stdout, file
    (code / "realsr_hpc" / "files.py").unlink()
    ended = run_setup(tmp_path, config, code, "echo went on")
    assert ended.returncode == 1 and "went on" not in ended.stdout and "is damaged" in ended.stderr


@pytest.mark.parametrize(("code", "state", "asked"), [(137, "RUNNING", True), (137, "CANCELLED", False),
                                                       (85, "RUNNING", False), (1, "RUNNING", False)])  # fmt: skip
def test_the_batch_script_asks_for_a_killed_supervisor_alone(tmp_path, slurm, code, state, asked):
    slurm(scontrol=f"echo $* >> {tmp_path}/asked; echo 'JobId=7 JobState={state} Reason=None'")
    config = compose([*SLURM, f"output_root={tmp_path / 'runs'}"])
    assert run_setup(tmp_path, config, take_snapshot([config]), f"(exit {code})").returncode == code
    calls = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("requeue 7" in calls) is asked


@pytest.mark.parametrize("code", [0, 1, 137])
def test_the_plain_batch_file_asks_for_a_killed_supervisor_too(tmp_path, slurm, code):
    run_dir, calls = tmp_path / "plain", tmp_path / "asked"
    prepare(compose([*SLURM, f"output_root={tmp_path / 'runs'}"]), run_dir)
    slurm(srun=f"exit {code}", scontrol=f"echo $1 >> {calls}; echo 'Id=7 JobState=RUNNING '")
    batch = ["bash", str(project_root() / "slurm" / "grpo_7b.sbatch")]
    named = {"RUN_DIR": str(run_dir), "PYTHON": sys.executable, "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    assert subprocess.run(batch, env=named, capture_output=True, check=False).returncode == code
    assert (calls.read_text().split() if calls.exists() else []) == (["show", "requeue"] if code == 137 else [])


def test_the_batch_script_asks_again_while_the_controller_is_away(tmp_path, slurm):
    away = "{ echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1; }"
    calls, slept = tmp_path / "asked", tmp_path / "slept"
    back = f"echo $1 >> {calls}; n=$(wc -l < {calls}); [ $n = 3 -o $n = 6 ] || {away}; echo 'Id=7 JobState=RUNNING '"
    slurm(scontrol=back, sleep=f"echo $1 >> {slept}")
    config = compose([*SLURM, f"output_root={tmp_path / 'runs'}"])
    code = take_snapshot([config])
    assert run_setup(tmp_path, config, code, "(exit 137)").returncode == 137
    assert calls.read_text().split() == ["show"] * 3 + ["requeue"] * 3
    assert slept.read_text().split() == ["1", "2", "1", "2"]
    slept.unlink()
    slurm(scontrol=away, sleep=f"echo $1 >> {slept}")
    assert run_setup(tmp_path, config, code, "(exit 137)").returncode == 137
    assert 600 <= sum(map(int, slept.read_text().split())) < 700
    slept.unlink()
    refused = "echo 'Id=7 JobState=RUNNING '; [ $1 = show ] || { echo 'Operation is presently disabled' >&2; exit 1; }"
    slurm(scontrol=refused, sleep=f"echo $1 >> {slept}")
    ended = run_setup(tmp_path, config, code, "(exit 137)")
    assert "presently disabled" in ended.stderr and not slept.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name='two\nlines'", "name: "),
        ("name='a b'", "name: "),
        ("name='#SBATCH'", "name: "),
        ("output_root='/tmp/100%'", "Slurm's file names"),
        ("output_root='/tmp/a:b'", "PYTHONPATH"),
        ("output_root='/tmp/\"it\\'s\"'", "both kinds of quotation marks"),
        ("cluster.partition='a\n#SBATCH --uid=0'", "cluster.partition: "),
        ("cluster.extra_sbatch={array: 0-9}", "launching gives --array itself"),
        ("cluster.extra_sbatch={Mail: END}", "not an option of sbatch"),
        ("tracking.uri='http://host:5000/?password=x'", "tracking.uri: holds a password"),
        ("tracking.uri='postgresql://me:x@host/db'", "tracking.uri: holds a password"),
        ("tracking.uri='http://host:5000/?%70assword=x'", "tracking.uri: holds a password"),
        ("tracking.uri='http://host:5000/#token=x'", "tracking.uri: holds a password"),
        ("tracking.uri='http://host:5000/?a=b&sig=x'", "tracking.uri: holds a password"),
        ("cluster.environment_file=nowhere.sh", "cluster.environment_file: "),
        ("output_root=~nobody-of-that-name/runs", "no such user"),
        ("tracking.uri=runs/mlflow", "tracking.uri: 'runs/mlflow': not an address"),
        ("tracking.uri=http://", "tracking.uri: 'http://': not an address"),
        ("tracking.experiment=''", "tracking.experiment: "),
        ("image_tokenizer.weights=recipes", "image_tokenizer.weights: "),
        ("image_tokenizer.weights=''", "is a folder; name a file"),
        ("text_tokenizer.path=pyproject.toml", "is not a kind of file that is read there"),
        ("model.weights=''", "holds no weights"),
        ("model.lora={rank: 4, weights: nowhere}", "model.lora.weights: "),
        ("trials=3", "trials: goes with sampler="),
    ],
)
def test_what_no_script_or_search_can_hold_is_refused_before_anything_is_written(tmp_path, capsys, override, said):
    assert main([*SLURM, f"output_root={tmp_path / 'runs'}", override]) == 2
    shown = capsys.readouterr().out
    assert said in shown and "=x" not in shown and ":x@" not in shown
    assert not (tmp_path / "runs").exists()


def test_options_of_sbatch_keep_their_types(tmp_path, capsys):
    extra = "cluster.extra_sbatch={exclusive: true, mail_type: END, nice: 5, contiguous: false}"
    assert main([*SLURM, f"output_root={tmp_path}", extra, "plan=true"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"#SBATCH --exclusive", "#SBATCH --mail-type=END", "#SBATCH --nice=5"} <= set(shown)
    assert not any("contiguous" in line for line in shown)
