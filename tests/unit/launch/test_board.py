"""The board of many runs reads what is new, asks Slurm once, and works in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from realsr_hpc import runfolder
from realsr_hpc.commands.jobs import main
from realsr_hpc.commands.launch import main as launch
from realsr_hpc.config.load import compose_one, to_yaml, written
from realsr_hpc.launch.board import Board, sparkline
from realsr_hpc.launch.feed import Feed
from realsr_hpc.launch.manage import cancel
from realsr_hpc.launch.rundir import Job, current_status, write_job, write_status
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import read_progress, write_launch_tags
from realsr_hpc.tracking.spool import Spool
from tests.slurm.conftest import SMALL

SMALL_RUN = [line for line in SMALL if "cluster.kind" not in line]
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
    metrics = {"rewards/total/mean": float(step), "heldout/total/mean": float(step), "system/memory/gib": 0.5}
    metrics |= {"rollout/tokens_per_s/mean": 123.0, "rollout/mismatch_kl": 2e-8, "optim/skipped_updates/count": 0.0}
    append(run_dir, {"kind": "metrics", "step": step, "time_ms": 3000 * step, "metrics": metrics})
    saving = {"time/checkpoint/s": 1.0}
    append(run_dir, {"kind": "metrics", "step": step, "time_ms": 3000 * step + 1000, "metrics": saving})


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
    assert feed.computed_s == 12.0 and feed.median_step_s == 3.0  # nobody knows how long an attempt's first step took


@pytest.mark.parametrize("content", ["", "[1", '[{"stage": 1}]', '{"a": 1}'])
def test_a_damaged_list_of_a_chains_stages_hides_no_run(content, tmp_path):
    make_run(tmp_path, 1)
    (tmp_path / "chains" / "x-1").mkdir(parents=True)
    (tmp_path / "chains" / "x-1" / "chain.json").write_text(content)
    assert [line.folder for line in Board(tmp_path).refresh() if line.folder] == [tmp_path / "run's 001"]


def test_a_sparkline_spans_its_values():
    assert sparkline([0.0, 1.0]) == "▁█" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == "" and len(sparkline(range(100))) == 16


def test_what_was_used_stands_beside_what_was_planned(tmp_path, capsys):
    make_run(tmp_path, 1, steps=9)
    assert main([f"root={tmp_path}", "report=true"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "run's 001" in line)
    assert row.split()[2:6] == ["0.01", "-", "3.0", "-"]  # 24 s on 2 processes
    assert main([f"root={tmp_path}", "watch=true"]) == 0
    assert "on its way" in capsys.readouterr().out


def test_chains_are_trees_and_sweeps_show_their_best(tmp_path):
    single, *swept, stage = [make_run(tmp_path, number, steps=number + 1) for number in range(4)]
    for run_dir in swept:
        write_launch_tags(run_dir, {"realsr_hpc.sweep": "it's a sweep"})
    write_launch_tags(stage, {"realsr_hpc.sweep": "small-1a2b"})
    write_status(swept[0], "done")
    command = tmp_path / "stages" / "export_hf-3c4d"
    moved = Path("/somewhere/else")  # the output root, since the chain was launched
    listed = [
        {"stage": "first", "folder": str(moved / stage.name), "after": []},
        {"stage": "whole", "folder": str(moved / "stages" / command.name), "after": [str(moved / stage.name)]},
    ]
    (tmp_path / "chains" / "small-1a2b").mkdir(parents=True)
    (tmp_path / "chains" / "small-1a2b" / "chain.json").write_text(json.dumps(listed))
    command.mkdir(parents=True)
    write_status(command, "failed", 1, "no room")
    lines = Board(tmp_path).refresh()
    assert [line.label for line in lines] == [
        "chain small-1a2b", "└ first: run's 003", "  └ whole: export_hf-3c4d",
        "run's 000", "sweep it's a sweep", "└ run's 001", "└ run's 002",
    ]  # fmt: skip
    assert lines[0].state == "1 to do, 1 failed" and lines[2].cells[-1] == "no room"
    assert lines[4].state == "1 done, 1 to do"
    assert lines[4].cells[1] == "3.000" and lines[4].cells[-1] == "best by heldout/total/mean: run's 002"
    assert [line.folder for line in lines] == [None, stage, command, single, None, *swept]


@pytest.mark.timeout(900)
def test_the_board_in_a_terminal_loses_no_key_cancels_and_leaves(tmp_path):
    for number in range(4):
        write_status(make_run(tmp_path, number), "done")
    child, terminal = board_in_a_terminal(tmp_path)
    wait_for(terminal, b"4 runs, 0 alive")
    os.write(terminal, b"j\x1b[Bjkjc")  # in one go, an arrow among them: down, down, down, up, down
    assert b"run's 003 is done" in wait_for(terminal, b"nothing to cancel")
    os.write(terminal, b"\x1b[Acq")  # q waits behind c
    assert b"run's 002 is done" in wait_for(terminal, b"nothing to cancel", until_closed=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.timeout(900)
def test_the_boards_keys_cancel_resume_and_follow_a_run(tmp_path, image_tokenizer):
    root = tmp_path / 'a "root"'
    places = [f"output_root={written(str(root))}", f"image_tokenizer.weights={image_tokenizer}", "follow=false"]
    assert launch([*SMALL_RUN, *places, "sft.num_steps=3000", "checkpoint.every_steps=3000"]) == 0
    [run_dir] = runfolder.list_runs(root)
    child, terminal = board_in_a_terminal(root)
    try:
        wait_until(terminal, lambda: read_progress(run_dir) and read_progress(run_dir).step >= 2)
        wait_for(terminal, b"/3000")
        os.write(terminal, b"c")
        wait_for(terminal, b"stopped with a checkpoint")
        stopped = read_progress(run_dir).step
        os.write(terminal, b"r")
        wait_for(terminal, b"submitted")
        wait_until(terminal, lambda: read_progress(run_dir).step > stopped)
        os.write(terminal, b"f")
        wait_for(terminal, b"/3000\x1b[0m \x1b[33m0:00:")  # the bar of whoever follows a run; the board has another
        os.write(terminal, b"\x03")  # leaves the run alone
        wait_for(terminal, b"The run continues")
        wait_for(terminal, b"1 alive")
        os.write(terminal, b"cq")
        wait_for(terminal, b"", until_closed=True)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        cancel(run_dir)
    assert current_status(run_dir).state == "stopped" and read_progress(run_dir).step > stopped


def board_in_a_terminal(root):
    """Process id of the board, and its terminal's other end."""
    child, terminal = pty.fork()
    if child == 0:  # what runs in the terminal
        os.environ.update(TERM="xterm", COLUMNS="200", LINES="30")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background work, such as these tests, deaf to it
        command = [sys.executable, str(project_root() / "tools" / "jobs.py"), f"root={root}", "watch=true"]
        os.execv(command[0], command)
    return child, terminal


def wait_until(terminal, holds, patience_s=300):
    """Look at the terminal, which would be full otherwise, until something holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.2)[0]:
            os.read(terminal, 65536)


def wait_for(terminal, text, patience_s=300, *, until_closed=False):
    """What the terminal shows until `text` is in it, or until the program has left."""
    shown, deadline = b"", time.monotonic() + patience_s
    while until_closed or text not in shown:
        assert time.monotonic() < deadline, shown[-2000:]
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # Linux says so of a terminal that nobody has open any more
            break
    return shown
