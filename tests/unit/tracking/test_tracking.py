"""Tracking: everything logged arrives once, whatever dies in between. Real MLflow on sqlite."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from realsr_hpc import runfolder
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import Tracker, metrics_by_step, prepare_run, read_bookmark, sync
from realsr_hpc.tracking.database import client
from realsr_hpc.tracking.spool import Spool, read_events


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def make_run(root, name: str, **tracking):
    config = RunConfig.model_validate({"name": name, "task": "grpo", "output_root": str(root), "tracking": tracking})
    run_dir = root / name
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return config, run_dir


def history(run_dir, key: str) -> list[tuple[int, float]]:
    bookmark = read_bookmark(run_dir)
    points = client(bookmark["uri"]).get_metric_history(bookmark["run_id"], key)
    return sorted((point.step, point.value) for point in points)


def test_metrics_params_artifacts_and_status_arrive(root):
    config, run_dir = make_run(root, "arrives", description="why", tags={"site": "here"})
    tracker = Tracker.open(config, run_dir, writer=True)
    for step in range(1, 6):
        tracker.log_metrics(step, {"rewards/total/mean": step / 4})
    (run_dir / "note.txt").write_text("seen")
    tracker.log_artifact(run_dir / "note.txt", "notes")
    tracker.close()
    assert history(run_dir, "rewards/total/mean") == [(step, step / 4) for step in range(1, 6)]
    run = client(read_bookmark(run_dir)["uri"]).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["grpo.kl_beta"] == "0.01"
    assert run.data.tags["site"] == "here" and len(run.data.tags["realsr_hpc.signature"]) == 12
    files = client(read_bookmark(run_dir)["uri"]).list_artifacts(tracker.run_id, "notes")
    assert [file.path for file in files] == ["notes/note.txt"]


def test_a_resumed_run_continues_the_same_mlflow_run_without_doubled_steps(root):
    config, run_dir = make_run(root, "resumed")
    first = Tracker.open(config, run_dir, writer=True)
    for step in range(1, 5):
        first.log_metrics(step, {"loss": float(step)})
    first.close("SCHEDULED")
    second = Tracker.open(config, run_dir, writer=True)
    second.truncate(2)
    for step in range(3, 7):
        second.log_metrics(step, {"loss": float(step)})
    second.close()
    assert second.run_id == first.run_id
    assert history(run_dir, "loss") == [(step, float(step)) for step in range(1, 7)]
    assert list(metrics_by_step(run_dir)) == [1, 2, 3, 4, 5, 6]


def test_truncated_steps_that_never_arrived_are_not_sent(root):
    config, run_dir = make_run(root, "truncated")
    spool = Spool(run_dir)
    for step in (1, 2, 3):
        spool.append({"kind": "metrics", "step": step, "time_ms": step, "metrics": {"loss": float(step)}})
    spool.append({"kind": "truncate", "step": 1})
    spool.append({"kind": "metrics", "step": 2, "time_ms": 9, "metrics": {"loss": 20.0}})
    spool.close()
    assert sync(run_dir) == 2
    assert history(run_dir, "loss") == [(1, 1.0), (2, 20.0)]
    assert metrics_by_step(run_dir) == {1: {"loss": 1.0}, 2: {"loss": 20.0}}


def test_a_kill_between_delivery_and_bookkeeping_doubles_nothing_also_when_the_run_then_goes_back(root):
    config, run_dir = make_run(root, "killed")
    spool = Spool(run_dir)
    for step in (1, 2, 3):
        spool.append({"kind": "metrics", "step": step, "time_ms": step, "metrics": {"loss": float(step)}})
    sync(run_dir)
    end = runfolder.events(run_dir).stat().st_size
    (runfolder.delivered(run_dir)).write_text(json.dumps({"offset": 0, "sending": end}))
    spool.append({"kind": "truncate", "step": 1})
    for step in (2, 3, 4):
        spool.append({"kind": "metrics", "step": step, "time_ms": step + 10, "metrics": {"loss": float(step)}})
    spool.close()
    sync(run_dir)
    assert history(run_dir, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert sync(run_dir) == 0


def test_a_full_disk_delays_events_and_loses_none(tmp_path):
    """A file-size limit stands for a quota: the kernel refuses to write more, in the middle of a line."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from realsr_hpc.tracking.spool import Spool\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); spool = Spool(Path(sys.argv[1]))\n"
        "event = lambda step: {'kind': 'metrics', 'step': step, 'time_ms': 1, 'metrics': {'loss': float(step)}}\n"
        "spool.append(event(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))\n"
        "spool.append(event(2)); spool.append(event(3)); resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "print(Path(sys.argv[1], 'events.jsonl').read_bytes().count(b'step')); spool.append(event(4))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=project_root()
    )
    assert answer.stdout.strip() == "1" and "bytes wait" in answer.stderr
    assert metrics_by_step(tmp_path) == {step: {"loss": float(step)} for step in (1, 2, 3, 4)}


def test_a_long_parameter_is_logged_in_parts(root):
    instruction = "<|image|>" + "x" * 13_000
    config, run_dir = make_run(root, "long")
    config = config.model_copy(update={"vlcot": config.vlcot.model_copy(update={"instruction": instruction})})
    run_id = prepare_run(config, run_dir)
    params = client(read_bookmark(run_dir)["uri"]).get_run(run_id).data.params
    assert "".join(params[f"vlcot.instruction.{part}"] for part in (1, 2, 3)) == instruction


def test_a_torn_line_is_cut_off_and_the_rest_kept(tmp_path):
    spool = Spool(tmp_path)
    spool.append({"kind": "metrics", "step": 1, "time_ms": 1, "metrics": {"loss": 1.0}})
    spool.close()
    with (runfolder.events(tmp_path)).open("ab") as file:
        file.write(b'{"kind": "metr')
    assert [event["step"] for event, _ in read_events(runfolder.events(tmp_path))] == [1]
    again = Spool(tmp_path)
    again.append({"kind": "metrics", "step": 2, "time_ms": 2, "metrics": {"loss": 2.0}})
    again.close()
    assert list(metrics_by_step(tmp_path)) == [1, 2]


def test_events_are_read_with_all_their_bits_and_names(tmp_path):
    values = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.pi, math.inf, -math.inf, math.nan, 3, 2**70]
    metrics = {f"m{number}": value for number, value in enumerate(values)}
    numbers = {"kind": "metrics", "step": 1, "time_ms": 1, "metrics": metrics}
    file = {"kind": "artifact", "path": os.fsdecode(b"caf\xe9.png"), "folder": "rollouts"}
    switch = {"kind": "metrics", "step": 1, "time_ms": 1, "metrics": {"loss": True}}
    spool = Spool(tmp_path)
    for event in (numbers, switch, file):
        spool.append(event)
    spool.close()
    with runfolder.events(tmp_path).open("ab") as stream:
        stream.write(b'{"kind": "artifact", "path": "a", "folder": "b"}}\n[' + b"[" * 100_000 + b"\n")
    found = [event for event, _ in read_events(runfolder.events(tmp_path))]
    assert repr(found) == repr([numbers, file]) and os.fsencode(found[1]["path"]) == b"caf\xe9.png"


def test_a_dead_server_stops_nothing_and_sync_sends_later(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, run_dir = make_run(root, "offline", uri="http://127.0.0.1:9")
    tracker = Tracker.open(config, run_dir, writer=True)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.progress(1, 2, "training")
    tracker.close()
    assert tracker.run_id == ""
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": None})})
    (run_dir / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert sync(run_dir) == 2  # the recipe and the metrics
    assert history(run_dir, "loss") == [(1, 1.0)]


def test_other_ranks_write_nothing(root):
    config, run_dir = make_run(root, "reader")
    tracker = Tracker.open(config, run_dir, writer=False)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.progress(1, 2, "training")
    tracker.close()
    assert {path.name for path in run_dir.iterdir()} == {"recipe.yaml"}


def test_preparing_twice_gives_one_run(root):
    config, run_dir = make_run(root, "twice")
    first = prepare_run(config, run_dir)
    (run_dir / "mlflow.json").unlink()
    assert prepare_run(config, run_dir) == first


def test_a_moved_run_without_its_bookmark_keeps_the_parameters_it_was_logged_with(root):
    config, run_dir = make_run(root, "moved", uri=f"sqlite:///{root}/mlflow.db")
    first = prepare_run(config, run_dir)
    (run_dir / "mlflow.json").unlink()
    assert prepare_run(config.model_copy(update={"output_root": "/elsewhere"}), run_dir) == first
    assert client(config.tracking.uri).get_run(first).data.params["output_root"] == config.output_root
