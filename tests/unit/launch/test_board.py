"""The board of many runs reads what is new, asks Slurm once, and works in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import sys
import time

import pytest

from realsr_hpc.commands.jobs import main
from realsr_hpc.config.load import compose_one, to_yaml
from realsr_hpc.launch.board import Board, sparkline
from realsr_hpc.launch.feed import Feed
from realsr_hpc.launch.rundir import Job, write_job, write_status
from realsr_hpc.paths import project_root
from realsr_hpc.tracking.spool import Spool

RECIPE = to_yaml(compose_one(["recipe=grpo_tiny"]))


def make_run(root, number, steps=3):
    run_dir = root / f"run's {number:03d}"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(RECIPE)
    (run_dir / "progress.json").write_text(json.dumps({"step": steps, "total": 10, "text": "on its way", "time_ms": 0}))
    for step in range(1, steps + 1):
        log(run_dir, step)
    return run_dir


def log(run_dir, step):
    metrics = {"rewards/total/mean": float(step), "time/rollout/s": 2.0, "time/update/s": 1.0, "system/memory/gib": 0.5}
    metrics |= {"rollout/tokens_per_s/mean": 123.0, "rollout/mismatch_kl": 2e-8, "optim/skipped_updates/count": 0.0}
    append(run_dir, {"kind": "metrics", "step": step, "time_ms": 0, "metrics": metrics})


def append(run_dir, event):
    spool = Spool(run_dir)
    spool.append(event)
    spool.close()


def test_256_runs_are_read_once_and_then_only_what_is_new_with_one_squeue_a_refresh(tmp_path, monkeypatch):
    root, calls = tmp_path / "it's a root", tmp_path / "calls"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho called >> '{calls}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    runs = [make_run(root, number) for number in range(256)]
    for number, run_dir in enumerate(runs):
        write_status(run_dir, "running")
        write_job(run_dir, Job("slurm", str(1000 + number), "", "log"))
    board = Board(root)
    lines = board.refresh()
    assert len(lines) == 256 and calls.read_text().count("called") == 1
    assert lines[0].cells[:6] == ("3/10", "3.000", "▁▅█", "123", "21 s", "2.0e-08")
    assert lines[0].cells[6:] == ("0", "on its way")
    before = {run: feed.offset for run, feed in board.feeds.items()}
    log(runs[7], 4)
    board.refresh()
    grown = {run for run, feed in board.feeds.items() if feed.offset != before[run]}
    assert grown == {runs[7]} and calls.read_text().count("called") == 2
    assert board.feeds[runs[7]].read() == 0


def test_steps_that_a_resume_took_back_leave_the_history_and_a_torn_line_waits(tmp_path):
    run_dir = make_run(tmp_path, 0, steps=5)
    append(run_dir, {"kind": "truncate", "step": 2})
    log(run_dir, 3)
    with (run_dir / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')
    feed = Feed(run_dir)
    feed.read()
    assert [step for step, _ in feed.history] == [1, 2, 3] and feed.step == 3
    assert feed.computed_s == 18.0 and feed.median_step_s == 3.0


def test_a_sparkline_spans_its_values():
    assert sparkline([0.0, 1.0]) == "▁█" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == "" and len(sparkline(range(100))) == 16


def test_what_was_used_stands_beside_what_was_planned(tmp_path, capsys):
    make_run(tmp_path, 1, steps=4)
    assert main([f"root={tmp_path}", "report=true"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "run's 001" in line)
    assert row.split()[2:6] == ["0.01", "-", "3.0", "-"]  # 4 steps of 3 s on 2 processes
    assert main([f"root={tmp_path}", "watch=true"]) == 0
    assert "on its way" in capsys.readouterr().out


@pytest.mark.timeout(900)
def test_the_board_in_a_terminal_moves_cancels_and_leaves(tmp_path):
    for number in range(2):
        write_status(make_run(tmp_path, number), "done")
    child, terminal = pty.fork()
    if child == 0:  # what runs in the terminal
        os.environ.update(TERM="xterm", COLUMNS="160", LINES="30")
        command = [sys.executable, str(project_root() / "tools" / "jobs.py"), f"root={tmp_path}", "watch=true"]
        os.execv(command[0], command)
    shown = wait_for(terminal, b"2 runs, 0 alive")
    os.write(terminal, b"jc")
    shown += wait_for(terminal, b"nothing to cancel")
    assert b"run's 001 is done" in shown
    os.write(terminal, b"q")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def wait_for(terminal, text, patience_s=300):
    """What the terminal shows until `text` is in it."""
    shown, deadline = b"", time.monotonic() + patience_s
    while text not in shown:
        assert time.monotonic() < deadline, shown[-2000:]
        shown += os.read(terminal, 65536)
    return shown
