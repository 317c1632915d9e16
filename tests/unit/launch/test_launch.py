"""Launching: arguments, plans, folders, and a real local job through submitit."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from realsr_hpc.commands.compare import OPTIONS
from realsr_hpc.config.arguments import ArgumentError, read_arguments
from realsr_hpc.config.identity import signature
from realsr_hpc.config.load import compose, written
from realsr_hpc.launch.command import Options, main, read_command_line
from realsr_hpc.launch.console import print_submissions
from realsr_hpc.launch.rundir import (
    Job,
    Status,
    current_status,
    make_private,
    read_status,
    run_folder,
    write_job,
    write_status,
)
from realsr_hpc.launch.script import sbatch_script
from realsr_hpc.launch.snapshot import take_snapshot
from realsr_hpc.launch.start import Submission
from realsr_hpc.launch.submit import submit
from realsr_hpc.paths import CHECKOUT_VARIABLE, project_root
from realsr_hpc.runfolder import find_run
from realsr_hpc.tracking import compare_command, tracking_uri

LAUNCH = [sys.executable, str(project_root() / "tools" / "launch.py")]


def test_options_stand_apart_from_overrides():
    options, multirun, overrides = read_command_line(["-m", "recipe=grpo_tiny", "plan=true", "seed=1,2", "sweep=mine"])
    assert options == Options(plan=True, sweep="mine") and multirun and overrides == ["recipe=grpo_tiny", "seed=1,2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plan=perhaps", "neither true nor false"),
        ("--plan", "write key=value"),
        ("plan", "write key=value"),
        ("prepare=", "key 'prepare' is empty"),
        ("sweep=a sweep=b", "key 'sweep' is given twice"),
    ],
)
def test_wrong_options_are_refused(words, said):
    with pytest.raises(ArgumentError, match=said):
        read_command_line(["recipe=grpo_tiny", *words.split()])


def test_a_wrong_key_exits_with_2_and_no_traceback(capsys):
    assert main(["recipe=grpo_tiny", "grpo.kl_btea=1"]) == 2
    shown = capsys.readouterr().out
    assert "did you mean 'kl_beta'" in shown and "Traceback" not in shown


def test_a_file_that_is_not_there_is_named_before_anything_is_submitted(tmp_path, capsys):
    root = tmp_path / "runs"
    overrides = ["recipe=grpo_tiny", f"output_root={root}", "data.manifest=nowhere.parquet", "model.weights=absent"]
    assert main(overrides) == 2
    shown = capsys.readouterr().out
    assert "data.manifest: " in shown and "nowhere.parquet is not there" in shown and "model.weights: " in shown
    assert main(["recipe=sft_tiny", f"prepare={root / 'run'}", "sft.traces=nowhere", "data=bundled"]) == 2
    assert "sft.traces: " in capsys.readouterr().out
    assert not root.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train_split=trian", "data.train_split: 'trian': no photograph of"),
        ("data.heldout_split=test", "there are heldout, train"),
        ("data.mode=paired", "data.mode: paired: 372 of 372 photographs"),
        ("data.manifest=pyproject.toml", "no manifest"),
    ],
)
def test_what_a_manifest_lacks_is_named_before_anything_is_submitted(override, said, tmp_path, capsys):
    root = tmp_path / "runs"
    assert main(["recipe=grpo_tiny", f"output_root={root}", override]) == 2
    assert said in capsys.readouterr().out and not root.exists()


def test_learning_from_photographs_without_captions_is_refused(tmp_path, capsys):
    table = pq.read_table("recipes/assets/photographs/manifest.parquet")
    untold = table.set_column(table.schema.get_field_index("caption_final"), "caption_final", [[""] * len(table)])
    pq.write_table(untold, tmp_path / "untold.parquet")
    overrides = [f"data.manifest={tmp_path / 'untold.parquet'}", f"output_root={tmp_path / 'runs'}"]
    assert main(["recipe=sft_tiny", *overrides]) == 2
    assert "data.train_split: 'train': no photograph of" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_planning_submits_nothing_and_shows_script_memory_and_hours(tmp_path, capsys):
    assert main(["recipe=grpo_7b", "plan=true", f"output_root={tmp_path / 'runs'}", "cluster.account=mine"]) == 0
    shown = capsys.readouterr().out
    for expected in ("#SBATCH --account=mine", "#SBATCH --nodes=2", "USR2@120", "7,013,158,912", "GPU-hours", "fits"):
        assert expected in shown
    assert not (tmp_path / "runs").exists()


def test_a_planned_sweep_is_one_array(tmp_path, capsys):
    main(["-m", "recipe=grpo_7b", "plan=true", "seed=range(8)", f"output_root={tmp_path}"])
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-7%8" in shown and "8 runs" in shown


def test_the_batch_script_carries_the_site(tmp_path):
    config = compose([
        "recipe=grpo_7b", f"output_root={tmp_path}", "cluster.partition=gpu", "cluster.qos=high",
        "cluster.constraint=h100", "cluster.memory_gib=400", "cluster.container_image=site.sqsh",
        "cluster.environment_file=slurm/site.sh", "cluster.extra_sbatch={exclusive: user}",
    ])  # fmt: skip
    script = sbatch_script(config)
    resources = ("--partition=gpu", "--qos=high", "--constraint=h100", "--mem=409600M", "--exclusive=user")
    site = ("--requeue", "--container-image=site.sqsh", "slurm/site.sh", "--kill-on-bad-exit=1")
    for expected in (*resources, *site):
        assert expected in script


def test_launching_never_imports_torch():
    code = (
        "import sys; from realsr_hpc.launch.command import main; main(['recipe=grpo_7b', 'plan=true']); "
        "print([name for name in ('torch', 'mlflow', 'megatron', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root(), check=True
    )
    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_run_folder_is_named_by_the_signature_and_fresh_is_numbered(tmp_path):
    config = compose(["recipe=grpo_tiny", f"output_root={tmp_path}"])
    folder = run_folder(config)
    assert folder == tmp_path / f"grpo_tiny-{signature(config)}" == run_folder(config, fresh=True)
    folder.mkdir()
    assert run_folder(config, fresh=True).name == f"{folder.name}-2"


def test_a_run_whose_job_is_gone_is_lost(tmp_path):
    write_status(tmp_path, "running")
    write_job(tmp_path, Job("local", str(os.getpid()), os.uname().nodename, "the log"))
    status = current_status(tmp_path)
    assert status is not None and status.state == "lost" and "the log" in status.message
    write_status(tmp_path, "done", 0)
    assert (current_status(tmp_path) or Status("lost")).state == "done"


def test_nothing_is_lost_or_submitted_twice_while_slurm_is_silent(tmp_path, monkeypatch):
    config = compose(["recipe=grpo_7b", f"output_root={tmp_path / 'runs'}"])
    (squeue := tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folder = make_private(run_folder(config))
    write_status(folder, "running")
    write_job(folder, Job("slurm", "12", "", "the log"))
    old = json.loads((folder / "status.json").read_text()) | {"time_s": 0.0}
    (folder / "status.json").write_text(json.dumps(old))
    assert (current_status(folder) or Status("lost")).state == "running"
    with pytest.raises(ValueError, match="squeue does not answer"):
        submit([config])
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("said", "began", "slurm", "state", "words"),
    [
        ("running", True, "12 RUNNING", "running", ""),
        ("running", True, "", "lost", "from step 30"),
        ("running", True, "12 OUT_OF_MEMORY", "lost", "(OUT_OF_MEMORY)"),
        ("running", True, "12 CANCELLED", "stopped", "was cancelled"),
        ("stopping", True, "12 COMPLETING", "stopping", ""),
        ("stopping", True, "", "stopped", "ended before it could save; launch it again to continue from step 30"),
        ("submitted", False, "", "stopped", "was cancelled"),
        ("submitted", True, "12 FAILED", "lost", "the log"),
        ("stopped", True, "12 PENDING", "requeued", ""),
        ("failed", True, "", "failed", ""),
    ],
)
def test_the_true_state_comes_from_the_queue_and_the_folder(tmp_path, monkeypatch, said, began, slurm, state, words):
    (squeue := tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{slurm}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (log := tmp_path / "the log").touch() if began else (log := tmp_path / "none")
    for step in (8, 30):
        (folder := tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (folder / "manifest.json").touch()
    write_job(tmp_path, Job("slurm", "12", "", str(log)))
    (tmp_path / "status.json").write_text(json.dumps({"state": said, "code": None, "message": "", "time_s": 0.0}))
    status = current_status(tmp_path)
    assert status is not None and status.state == state and words in status.message


def test_runs_are_found_by_a_unique_beginning(tmp_path):
    for name in ("alpha-1", "alpha-2", "beta-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
    assert find_run(tmp_path, "beta").name == "beta-1"
    with pytest.raises(ValueError, match="several names begin with it"):
        find_run(tmp_path, "alpha")
    with pytest.raises(ValueError, match="no run of this name"):
        find_run(tmp_path, "gamma")


def test_a_snapshot_is_shared_by_equal_code_and_importable(tmp_path):
    config = compose(["recipe=grpo_tiny", f"output_root={tmp_path}", "text_tokenizer.path=README.md"])
    code = take_snapshot([config])
    assert take_snapshot([config]) == code
    assert [path.name for path in (tmp_path / "code").iterdir()] == [code.name]
    # README.md is no code, but a recipe may name it: the job finds it where its launcher did
    program = (
        "import realsr_hpc; from realsr_hpc.paths import resolve; "
        "print(realsr_hpc.__file__, resolve('README.md'), resolve('recipes'))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(code), CHECKOUT_VARIABLE: str(project_root())},
    )  # fmt: skip
    module, readme, recipes = answer.stdout.split()
    assert module.startswith(str(code)) and readme == str(project_root() / "README.md")
    assert recipes == str(code / "recipes")


def test_a_local_job_reports_its_failure_and_does_not_hang(tmp_path, monkeypatch):
    other = tmp_path / "another checkout"
    for module in ("realsr_hpc", "submitit"):  # what lies where the launcher was called is not what runs
        (other / module).mkdir(parents=True)
        (other / module / "__init__.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(other)
    overrides = ["recipe=sft_tiny", f"output_root={tmp_path}", "text_tokenizer.path=nowhere.json"]
    submissions = submit([compose(overrides)])
    run_dir = submissions[0].run_dir
    deadline = time.time() + 280
    while (status := current_status(run_dir)) is None or status.state in ("submitted", "running"):
        assert time.time() < deadline, "the job neither ended nor failed"
        time.sleep(0.2)
    assert status.state == "failed" and status.code == 1
    assert "nowhere.json" in status.message
    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    settled = read_status(run_dir)
    assert settled is not None and settled.state == "failed"


def test_the_commands_that_are_told_are_what_a_shell_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project_root())
    for root in ("runs", str(tmp_path / "it's a root")):
        config = compose(["recipe=grpo_tiny", f"output_root={written(root)}"])
        print_submissions([Submission(config, run_folder(config), True)], Console(width=80))
        [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracking")]
        assert shlex.split(told)[-1] == tracking_uri(config)
        words = read_arguments(shlex.split(compare_command(config, "mine"))[2:], OPTIONS, None)
        assert (words["sweep"], Path(words["root"]).resolve()) == ("mine", Path(root).resolve())
    assert compare_command(compose(["recipe=grpo_tiny"]), "mine") == "realsr-hpc compare sweep=mine"
    elsewhere = compose(["recipe=grpo_tiny", "tracking.uri=http://host:5000", "tracking.experiment='a b'"])
    assert compare_command(elsewhere, "mine").endswith(" sweep=mine uri=http://host:5000 'experiment=a b'")
