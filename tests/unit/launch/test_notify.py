"""What a user's command is told, and that no command holds a run up."""

from __future__ import annotations

import json
import os
import time

import pytest

from realsr_hpc.config.load import compose_one, to_yaml
from realsr_hpc.launch import job, notify


@pytest.fixture
def run_dir(tmp_path):
    """Makes the folder of a run whose command is given."""

    def make(command: str):
        folder = tmp_path / "it's a run"
        (folder / "logs").mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"step": 3, "total": 9, "text": "", "time_ms": 0}))
        tracking = compose_one(["recipe=grpo_tiny"]).tracking.model_copy(update={"notify": command})
        config = compose_one(["recipe=grpo_tiny"]).model_copy(update={"tracking": tracking})
        (folder / "recipe.yaml").write_text(to_yaml(config))
        return folder

    return make


def told(folder):
    return json.loads((folder / "notified.json").read_text())


def test_every_end_is_one_line_and_what_is_no_event_is_none(run_dir, tmp_path):
    folder = run_dir(f"cat >> '{tmp_path}/told'")
    (folder / "notified.json").write_text("[1")  # a damaged file costs its counts, not the run
    for state, code, message in [("stopping", None, ""), ("requeued", 88, "x" * 9000), ("failed", 1, 'a "b"\nc')]:
        job._set_state(folder, state, code, message)
    lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["requeue", "failure"]
    assert lines[1]["message"] == 'a "b"\nc' and lines[1]["step"] == 3 and lines[1]["folder"] == str(folder)
    assert len(lines[0]["message"]) == 2000 and told(folder) == {"told": 2, "failed": 0, "last_fault": ""}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("exit 3", "ended with code 3"),
        ("sleep 60", "took longer than 1 s"),
        ("nowhere", "code 127"),
        ("yes", "wrote more than"),
    ],
)
def test_a_command_that_fails_or_hangs_is_counted(command, said, run_dir, monkeypatch, capfd):
    monkeypatch.setattr(notify, "END_TIMEOUT_S", 1.0)
    folder = run_dir(command)
    job._set_state(folder, "done", 0)
    assert (told(folder)["told"], told(folder)["failed"]) == (0, 1) and said in told(folder)["last_fault"]
    assert (folder / "logs" / "notify.log").stat().st_size <= notify.LOG_BYTES
    assert said in capfd.readouterr().err and json.loads((folder / "status.json").read_text())["state"] == "done"


def test_a_start_waits_for_nobody(run_dir, tmp_path):
    os.mkfifo(tmp_path / "gate")
    folder = run_dir(f"cat '{tmp_path}/gate' > /dev/null")  # until somebody writes into the gate
    job._set_state(folder, "running")
    assert not (folder / "notified.json").exists()
    (tmp_path / "gate").write_text("open")
    while not (folder / "notified.json").exists():
        time.sleep(0.05)
    assert told(folder)["told"] == 1
