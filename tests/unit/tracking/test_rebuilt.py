"""A run's folder is the truth: moved, or with its store deleted or changed, everything is in MLflow again, once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import (
    Place,
    Tracker,
    prepare_run,
    prepare_sweep,
    read_bookmark,
    recipe_of,
    set_status,
    sync,
    write_place,
)
from realsr_hpc.tracking.database import client
from realsr_hpc.tracking.results import log_results
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.tracking.store import PARENT_TAG, SWEEP_TAG, prepare_store, quoted, write_launch_tags

EXPECTED = [(step, step / 2) for step in range(1, 5)]


def make_run(root: Path, name: str = "run", sweep: str = "") -> Path:
    """A finished run with metrics, an artifact and, perhaps, a sweep."""
    config = RunConfig.model_validate({"name": "x", "task": "grpo", "output_root": str(root)})
    (run_dir := root / name).mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(to_yaml(config))
    write_place(run_dir, Place(str(run_dir), str(root)))
    write_launch_tags(run_dir, {SWEEP_TAG: sweep} if sweep else {})
    tracker = Tracker.open(config, run_dir, writer=True)
    for step, value in EXPECTED:
        tracker.log_metrics(step, {"loss": value})
    (run_dir / "note.txt").write_text("seen")
    tracker.log_artifact(run_dir / "note.txt", "notes")
    tracker.close()
    return run_dir


def everything_is_there_once(run_dir: Path) -> None:
    bookmark = read_bookmark(run_dir)
    assert bookmark is not None
    mlflow = client(bookmark["uri"])
    points = mlflow.get_metric_history(bookmark["run_id"], "loss")
    assert sorted((point.step, point.value) for point in points) == EXPECTED
    assert {file.path for file in mlflow.list_artifacts(bookmark["run_id"])} == {"launch", "notes"}
    assert mlflow.get_run(bookmark["run_id"]).info.lifecycle_stage == "active"
    runs = mlflow.search_runs([mlflow.get_run(bookmark["run_id"]).info.experiment_id])
    assert [run.info.run_id for run in runs] == [bookmark["run_id"]]


def afresh(function, *arguments) -> None:
    """In a process that has not seen the store before: MLflow caches connections and places of artifacts."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_moved_output_root_goes_on_where_it_is(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    (tmp_path / "runs").rename(moved := tmp_path / "B's")
    afresh(go_on_after_the_move, moved / run_dir.name, (read_bookmark(moved / run_dir.name) or {})["run_id"])
    assert not (tmp_path / "runs").exists()


def go_on_after_the_move(run_dir: Path, run_id: str) -> None:
    assert recipe_of(run_dir).output_root == str(run_dir.parent)
    assert sync(run_dir) == 0
    everything_is_there_once(run_dir)
    assert (read_bookmark(run_dir) or {})["run_id"] == run_id
    (run_dir / "more.txt").write_text("seen")
    tracker = Tracker.open(recipe_of(run_dir), run_dir, writer=True)
    tracker.log_artifact(run_dir / "more.txt", "notes")
    tracker.close()
    found = client((read_bookmark(run_dir) or {})["uri"]).list_artifacts(run_id, "notes")
    assert {file.path for file in found} == {"notes/note.txt", "notes/more.txt"}


def test_a_run_moved_into_another_root_is_made_again_there(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    (tmp_path / "B").mkdir()
    run_dir = run_dir.rename(tmp_path / "B" / "run")
    assert sync(run_dir) == len(EXPECTED) + 2  # the values, the recipe, the note
    everything_is_there_once(run_dir)
    assert (read_bookmark(run_dir) or {})["uri"] == f"sqlite:///{tmp_path / 'B' / 'mlflow.db'}"
    assert sync(run_dir) == 0


def test_a_deleted_database_is_made_again_private_and_with_its_sweep(tmp_path):
    runs = [make_run(tmp_path, name, sweep="seeds") for name in ("a", "b")]
    (tmp_path / "mlflow.db").unlink()
    shutil.rmtree(tmp_path / "mlartifacts")
    afresh(sync_all, tmp_path, runs)


def sync_all(root: Path, runs: list[Path]) -> None:
    for run_dir in runs:
        sync(run_dir)
    mlflow = client(f"sqlite:///{root / 'mlflow.db'}")
    parent = prepare_sweep(recipe_of(runs[0]), "seeds")
    for run_dir in runs:
        run_id = (read_bookmark(run_dir) or {})["run_id"]
        points = mlflow.get_metric_history(run_id, "loss")
        assert sorted((point.step, point.value) for point in points) == EXPECTED
        assert mlflow.get_run(run_id).data.tags[PARENT_TAG] == parent
    assert all((root / name).stat().st_mode & 0o077 == 0 for name in ("mlflow.db", "mlartifacts"))


def test_what_somebody_deleted_in_mlflow_comes_back(tmp_path):
    run_dir = make_run(tmp_path)
    bookmark = read_bookmark(run_dir)
    assert bookmark is not None
    mlflow = client(bookmark["uri"])
    experiment = mlflow.get_run(bookmark["run_id"]).info.experiment_id
    mlflow.delete_run(bookmark["run_id"])
    sync(run_dir)
    everything_is_there_once(run_dir)
    mlflow.delete_experiment(experiment)
    prepare_store(recipe_of(run_dir))  # launching another recipe into it
    sync(run_dir)
    everything_is_there_once(run_dir)


def test_another_store_gets_everything_and_the_first_nothing_twice(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    config = recipe_of(run_dir)
    for uri in (f"sqlite:///{tmp_path / 'other.db'}", None):
        changed = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
        (run_dir / "recipe.yaml").write_text(to_yaml(changed))
        sync(run_dir)
        everything_is_there_once(run_dir)
    assert (read_bookmark(run_dir) or {})["uri"].endswith("/runs/mlflow.db")


def change(run_dir: Path, **tracking) -> None:
    """What `jobs resume=RUN tracking.field=value` writes, and the job's first delivery after it."""
    config = recipe_of(run_dir)
    changed = config.model_copy(update={"tracking": config.tracking.model_copy(update=tracking)})
    (run_dir / "recipe.yaml").write_text(to_yaml(changed))
    sync(run_dir)


def test_another_experiment_gets_the_whole_run_and_the_first_says_where_it_goes_on(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    first = read_bookmark(run_dir) or {}
    mlflow = client(first["uri"])
    change(run_dir, experiment="it's another")
    everything_is_there_once(run_dir)
    second = read_bookmark(run_dir) or {}
    run = mlflow.get_run(second["run_id"])
    assert mlflow.get_experiment(run.info.experiment_id).name == "it's another" and second["run_id"] != first["run_id"]
    told = mlflow.get_run(first["run_id"]).data.tags["realsr_hpc.goes_on_in"]
    assert told == f"experiment it's another, run {second['run_id']}"
    mlflow.rename_experiment(run.info.experiment_id, "renamed in MLflow")
    sync(run_dir)
    assert (read_bookmark(run_dir) or {})["run_id"] == second["run_id"]


def test_description_and_tags_follow_the_recipe_and_what_people_wrote_stays(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    bookmark = read_bookmark(run_dir) or {}
    mlflow, run_id = client(bookmark["uri"]), bookmark["run_id"]
    change(run_dir, description="mine", tags={"a": "1", "b": "2"})
    tags = mlflow.get_run(run_id).data.tags
    assert (tags["mlflow.note.content"], tags["a"], tags["b"]) == ("mine", "1", "2")
    mlflow.set_tag(run_id, "mlflow.note.content", "by hand")
    change(run_dir, tags={"a": "3"})
    tags = mlflow.get_run(run_id).data.tags
    assert (tags["mlflow.note.content"], tags["a"], "b" in tags) == ("by hand", "3", False)
    bookmark["told"] = "damaged"
    (run_dir / "mlflow.json").write_text(json.dumps(bookmark))
    change(run_dir, tags={"a": "4"})
    assert mlflow.get_run(run_id).data.tags["a"] == "4"


def open_store(root: Path, name: str) -> None:
    """In a process of its own, as two launchers."""
    config = RunConfig.model_validate({"name": name, "task": "grpo", "output_root": str(root)})
    prepare_store(config)
    (root / name).mkdir()
    prepare_run(config, root / name)


def test_launchers_that_open_a_fresh_root_at_once_make_one_whole_database(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=open_store, args=(tmp_path, name)) for name in ("a", "b", "c")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (3,)
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()


def test_a_damaged_database_is_named_with_its_remedy(tmp_path):
    run_dir = make_run(tmp_path)
    (tmp_path / "other.db").write_bytes(b"no database" * 1000)
    config = recipe_of(run_dir)
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    damaged = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    with pytest.raises(ValueError, match="other.db cannot be opened.*sync-tracking"):
        prepare_run(damaged, run_dir)


def test_a_moved_store_is_not_made_again_where_it_was(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    (tmp_path / "runs").rename(moved := tmp_path / "moved")
    with pytest.raises(ValueError, match=r"runs/mlflow\.db is gone; realsr-hpc sync-tracking"):
        set_status(moved / run_dir.name, "KILLED")
    assert not (tmp_path / "runs").exists()


def test_numbers_and_ids_that_no_store_takes_cost_their_events_alone(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    good = {"kind": "metrics", "step": 5, "time_ms": 5, "metrics": {"loss": 2.5}}
    huge = 10**30
    changes = ({"step": huge}, {"time_ms": -huge}, {"metrics": {"loss": 10**400}}, {})
    with (run_dir / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({**good, **change}) + "\n" for change in changes)
    bookmark = read_bookmark(run_dir) or {}
    (run_dir / "mlflow.json").write_text(json.dumps({**bookmark, "run_id": "no id of MLflow's " * 9}))
    assert sync(run_dir) == 1
    assert (read_bookmark(run_dir) or {})["run_id"] == bookmark["run_id"]  # found again by its tag
    points = client(bookmark["uri"]).get_metric_history(bookmark["run_id"], "loss")
    assert sorted((point.step, point.value) for point in points) == [*EXPECTED, (5, 2.5)]
    assert max(metrics_by_step(run_dir)) == 5


def test_text_that_is_not_utf_8_reaches_the_store(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    run_dir = make_run(tmp_path / "runs")
    change(run_dir, description=odd, tags={"who": odd})
    bookmark = read_bookmark(run_dir) or {}
    tags = client(bookmark["uri"]).get_run(bookmark["run_id"]).data.tags
    assert tags["who"] == tags["mlflow.note.content"] == "caf\\xe9"
    (run_dir / "mlflow.json").unlink()
    client(bookmark["uri"]).delete_run(bookmark["run_id"])
    (tmp_path / "runs" / "mlflow.db").unlink()
    afresh(goes_to_a_new_store_with_its_text, run_dir)


def goes_to_a_new_store_with_its_text(run_dir: Path) -> None:
    assert sync(run_dir) > 0
    bookmark = read_bookmark(run_dir) or {}
    run = client(bookmark["uri"]).get_run(bookmark["run_id"])
    assert run.data.tags["who"] == run.data.params["tracking.description"] == "caf\\xe9"


def test_what_mlflow_refuses_and_files_that_nobody_can_send_hold_nothing_up(tmp_path, caplog):
    run_dir = make_run(tmp_path / "runs")
    (run_dir / "folder").mkdir()
    lines = [
        {"kind": "metrics", "step": 5, "time_ms": 5, "metrics": {"lo\x7fss": 1.0, "loss": 2.5, "x" * 999: 1.0}},
        {"kind": "artifact", "path": str(run_dir / "note.txt"), "folder": "../outside"},
        {"kind": "artifact", "path": str(run_dir / "folder"), "folder": "notes"},
        {"kind": "artifact", "path": "a\0b", "folder": "notes"},
        {"kind": "metrics", "step": 6, "time_ms": 6, "metrics": {"loss": 3.0}},
    ]
    with (run_dir / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    sync(run_dir)
    assert sync(run_dir) == 0
    bookmark = read_bookmark(run_dir) or {}
    points = client(bookmark["uri"]).get_metric_history(bookmark["run_id"], "loss")
    assert sorted((point.step, point.value) for point in points) == [*EXPECTED, (5, 2.5), (6, 3.0)]
    said = caplog.text
    assert "'lo\\x7fss' is left out" in said and "note.txt is not sent" in said and "folder is not sent" in said
    assert log_results(run_dir, 6, {"evaluate/a/b/c": 1.0, "?": 2.0}, [run_dir / "folder"], "evaluation/a") == ""


def test_damaged_lines_of_the_spool_cost_their_events_alone(tmp_path):
    run_dir = make_run(tmp_path)
    lines = (run_dir / "events.jsonl").read_bytes().splitlines(keepends=True)
    numbers = [index for index, line in enumerate(lines) if b'"metrics"' in line]
    for index, damage in zip(numbers, (b"\xff\x00\n", b"null\n"), strict=False):
        lines[index] = damage
    (run_dir / "events.jsonl").write_bytes(b"".join(lines))
    (run_dir / "delivered.json").write_bytes(b"")
    (tmp_path / "second").mkdir()
    moved = run_dir.rename(tmp_path / "second" / "run")
    sync(moved)
    bookmark = read_bookmark(moved)
    assert bookmark is not None
    points = client(bookmark["uri"]).get_metric_history(bookmark["run_id"], "loss")
    assert sorted((point.step, point.value) for point in points) == EXPECTED[2:]


def test_names_are_searched_for_as_they_are():
    assert quoted("it's") == '"it\'s"' and quoted('a "b"') == "'a \"b\"'"
    with pytest.raises(ValueError, match="both kinds"):
        quoted('it\'s "b"')
    assert json.loads(json.dumps(quoted("plain"))) == "'plain'"


def test_an_evaluations_numbers_follow_the_run_to_another_store(tmp_path):
    run_dir = make_run(tmp_path / "runs")
    (report := run_dir / "evaluation").mkdir()
    (report / "metrics.md").write_text("seen")
    for step in (2, 4):
        assert log_results(run_dir, step, {"psnr_y": step / 4}, [report / "metrics.md"], "evaluation/x") == ""
    with (run_dir / "results.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "metr')  # killed
    (tmp_path / "B").mkdir()
    run_dir = run_dir.rename(tmp_path / "B" / "run")
    assert sync(run_dir) == len(EXPECTED) + 2 + 4
    assert sync(run_dir) == 0 and log_results(run_dir, 6, {"psnr_y": 1.5}, [], "evaluation/x") == ""
    bookmark = read_bookmark(run_dir) or {}
    mlflow = client(bookmark["uri"])
    points = mlflow.get_metric_history(bookmark["run_id"], "psnr_y")
    assert sorted((point.step, point.value) for point in points) == [(2, 0.5), (4, 1.0), (6, 1.5)]
    assert [file.path for file in mlflow.list_artifacts(bookmark["run_id"], "evaluation/x")] == [
        "evaluation/x/metrics.md"
    ]
