"""jobs: cancelling asks first; the list as JSON; snapshots that nobody needs."""

from __future__ import annotations

import json
import os
import time

import pytest

from realsr_hpc.commands.jobs import main
from realsr_hpc.config.load import compose_one
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.prune import link_code
from realsr_hpc.launch.rundir import Job, Queue, Status, read_status, write_job
from realsr_hpc.launch.rundir import write_status as set_state
from realsr_hpc.launch.submit import _look
from realsr_hpc.tracking.tracker import Progress


def make_run(root, name, state="running", kind="slurm"):
    (folder := root / name).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\ntask: sft\n")
    write_job(folder, Job(kind, "12", os.uname().nodename, "log", "a", time.time()))
    set_state(folder, state, launch="a")
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (bin_dir := tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)

    def say(**commands):
        for name, body in commands.items():
            (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
            (bin_dir / name).chmod(0o755)

    return say


@pytest.mark.parametrize("saves", [True, False])
def test_cancelling_signals_waits_for_the_checkpoint_and_ends_the_job_only_then(tmp_path, slurm, saves):
    run_dir = make_run(tmp_path / "runs", "run")
    stopped = json.dumps({"state": "stopped", "code": 85, "message": "", "time_s": 1.0, "launch": "a"})
    leave = f"echo '{stopped}' > {run_dir}/status.json" if saves else ":"
    slurm(squeue="echo 12 RUNNING None", scancel=f"echo $* >> {tmp_path}/calls; {leave}")
    said = cancel(run_dir, wait_s=2)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "--signal=TERM 12"
    assert calls[1:] == ([] if saves else ["12"])
    assert ("stopped with a checkpoint" if saves else "without a checkpoint, after 2 s") in said


def test_a_job_that_waits_is_cancelled_at_once(tmp_path, slurm):
    run_dir = make_run(tmp_path / "runs", "run", "submitted")
    slurm(squeue="echo 12 PENDING Priority", scancel=f"echo $* >> {tmp_path}/calls")
    cancel(run_dir)
    assert (tmp_path / "calls").read_text() == "12\n"
    status = read_status(run_dir)
    assert status is not None and (status.state, status.launch) == ("stopped", "a")


def test_cancelling_knows_what_the_job_is_doing(tmp_path, slurm):
    """Slurm is silent; the job begins at this very moment; it leaves without a word, or done; it is a command."""
    runs, calls = tmp_path / "runs", tmp_path / "calls"
    scancel = f"echo $* >> {calls}; touch {tmp_path}/asked"
    slurm(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", scancel=scancel)
    silent = make_run(runs, "silent")
    with pytest.raises(ValueError, match="job 12: squeue does not answer; nothing was cancelled, ask again"):
        cancel(silent)
    assert not calls.exists() and (read_status(silent) or Status("lost")).state == "running"
    begins = f"if [ -e {tmp_path}/asked ]; then echo 12 RUNNING None; else echo 12 PENDING Priority; fi"
    slurm(squeue=begins, scancel=scancel)
    assert "without a checkpoint, after 1 s" in cancel(make_run(runs, "begins", "submitted"), wait_s=1)
    assert calls.read_text().splitlines() == ["12", "--signal=TERM 12", "12"]
    (tmp_path / "asked").unlink()
    slurm(squeue=f"[ -e {tmp_path}/asked ] || echo 12 RUNNING None", scancel=scancel)
    assert "job 12 ended without reporting a state; see log" in cancel(make_run(runs, "silently"))
    (tmp_path / "asked").unlink()
    done = make_run(runs, "done")
    last = json.dumps({"state": "done", "code": 0, "message": "", "time_s": 1.0, "launch": "a"})
    slurm(squeue="echo 12 RUNNING None", scancel=f"echo '{last}' > {done}/status.json")
    assert "came to its end, all steps done" in cancel(done)
    (command := make_run(runs, "command") / "recipe.yaml").unlink()
    calls.unlink()
    slurm(squeue="echo 12 RUNNING None", scancel=scancel)
    assert "launch its chain again" in cancel(command.parent) and calls.read_text() == "12\n"
    slurm(scancel="echo 'scancel: error: Invalid user id' >&2; exit 1")
    with pytest.raises(ValueError, match="scancel --signal=TERM 12: scancel: error: Invalid user id"):
        cancel(make_run(runs, "foreign"))


def test_the_list_as_json_tells_states_reasons_and_steps(tmp_path, slurm, capsys):
    slurm(squeue="echo '12 PENDING (QOSMaxJobsPerUserLimit)'")
    run_dir = make_run(tmp_path / "runs", "waits", "submitted")
    (run_dir / "progress.json").write_text(json.dumps(vars(Progress(3, 30, "x"))))
    make_run(tmp_path / "runs", "failed", "failed", kind="local")
    assert main([f"root={tmp_path / 'runs'}", "json=true"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["state"], first["slurm"]) == ("waits", "submitted", "pending: QOSMaxJobsPerUserLimit")
    assert (first["step"], first["total"], first["job"]) == (3, 30, "slurm 12")
    assert (second["state"], second["step"]) == ("failed", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cancel=a resume=b", "cancel and resume exclude each other"),
        ("watch=true report=true", "watch and report exclude each other"),
        ("resume=a json=true", "resume and json exclude each other"),
        ("yes=true", "yes=true goes with prune"),
        ("wait_s=5 resume=a", "wait_s=5 goes with cancel"),
    ],
)
def test_nothing_that_was_asked_for_is_passed_over(words, said, tmp_path, capsys):
    make_run(tmp_path, "a")
    assert main([f"root={tmp_path}", *words.split()]) == 2
    assert said in capsys.readouterr().out


def test_folders_whose_names_look_like_marks_of_a_text_are_shown_as_they_are(tmp_path, slurm, capsys):
    """Brackets would be taken for a style, `[/` for its end, `:dog:` for a picture."""
    root = tmp_path / "[old]" / "[" / "b]:dog:"
    run_dir = make_run(root, "run")
    (root / "code" / "[unused]").mkdir(parents=True)
    assert main([f"root={root}"]) == 0 and main([f"root={root}", "prune=true"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert str(run_dir / "logs" / "rank-0.log") in shown and str(root / "code" / "[unused]") in shown


def test_snapshots_that_no_run_refers_to_go_when_asked_twice(tmp_path, capsys):
    root = tmp_path / "runs"
    snapshots = {name: root / "code" / name for name in ("used", "elsewhere", "unused", ".old.damaged.1")}
    for path in snapshots.values():
        path.mkdir(parents=True)
        (path / "file.py").write_text("x")
    link_code(make_run(root, "run"), snapshots["used"])
    link_code(make_run(tmp_path / "mine", "prepared"), snapshots["elsewhere"])
    assert main([f"root={root}", "prune=true"]) == 0
    shown = capsys.readouterr().out
    assert "unused" in shown and "damaged" in shown and all(path.exists() for path in snapshots.values())
    assert main([f"root={root}", "prune=true", "yes=true"]) == 0
    assert {name for name, path in snapshots.items() if path.exists()} == {"used", "elsewhere"}


def test_no_snapshot_goes_while_a_run_elsewhere_cannot_be_looked_at(tmp_path):
    root = tmp_path / "runs"
    (snapshot := root / "code" / "needed").mkdir(parents=True)
    (root / "code" / ".users").write_text(f"{tmp_path / ('x' * 300)}\n")  # no name that a file can have
    link_code(make_run(tmp_path / "mine", "prepared"), snapshot)
    with pytest.raises(OSError, match="File name too long"):
        main([f"root={root}", "prune=true", "yes=true"])
    assert snapshot.exists()


@pytest.mark.parametrize(
    "damage",
    [{"step": -1}, {"step": 10**15 + 1}, {"total": -1}, {"total": 10**400}, {"time_ms": 10**300}, {"step": 1.5}],
)
def test_progress_beyond_what_a_run_can_reach_counts_as_none(damage, tmp_path, slurm, capsys):
    slurm(squeue="echo 12 RUNNING None")
    run_dir = make_run(tmp_path / "runs", "run")
    (run_dir / "progress.json").write_text(json.dumps(vars(Progress(3, 30, "x")) | damage))
    assert main([f"root={tmp_path / 'runs'}", "json=true"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["total"]) == ("running", None, None)


@pytest.mark.parametrize("words", [["prune=true", "yes=maybe"], ["json=2"], ["report=nope"], ["root=/nowhere"]])
def test_a_switch_is_true_or_false_and_a_root_is_there(words, capsys):
    assert main(words) == 2
    assert words[-1].split("=")[0] in capsys.readouterr().out


def test_launching_again_says_where_it_goes_on(tmp_path):
    config = compose_one(["recipe=sft_tiny", f"output_root={tmp_path}"])
    run_dir = make_run(tmp_path, "a", "failed", "local")
    assert _look(config, run_dir, Queue({})).note == "starts again: it had saved no checkpoint"
    (step := run_dir / "checkpoints" / "step-000004").mkdir(parents=True)
    assert _look(config, run_dir, Queue({})).note == "starts again: it had saved no checkpoint"  # never completed
    (step / "manifest.json").touch()
    assert _look(config, run_dir, Queue({})).note == "continues from step 4"
    assert _look(config, tmp_path / "new", Queue({})).note == ""
