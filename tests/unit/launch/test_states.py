"""What is written follows what happened: refused submissions, two launchers, damaged files, unfit nodes."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from rich.console import Console

from realsr_hpc import runfolder
from realsr_hpc.config.load import RecipeError, compose
from realsr_hpc.launch.chain import Node
from realsr_hpc.launch.chain_command import _submit
from realsr_hpc.launch.chain_stage import submit_stage
from realsr_hpc.launch.command import main
from realsr_hpc.launch.environment import Placement
from realsr_hpc.launch.manage import cancel, resume, rows
from realsr_hpc.launch.refusals import refuse_what_is_missing, unchecked_manifests
from realsr_hpc.launch.requeue import exclude, requeue
from realsr_hpc.launch.rundir import Job, Status, current_status, make_private, run_folder, write_job
from realsr_hpc.launch.rundir import write_status as set_state
from realsr_hpc.launch.submit import submit
from realsr_hpc.launch.verdict import HEALTH_S, UNHEALTHY, Verdict, agree, count_requeue, tell_fit
from realsr_hpc.locks import LockRefused, hold, is_held
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import read_progress, sweep_tags

from .conftest import SLURM

HOLDER = (
    "import sys, time; from pathlib import Path; from realsr_hpc.locks import hold\n"
    "with hold(Path(sys.argv[1]), 'Slurm job 7'): print('held', flush=True); time.sleep(600)"
)


@contextmanager
def outliving(lock: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run's lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_refused_submission_says_slurms_words_and_leaves_the_run_launchable(tmp_path, slurm, capsys):
    overrides = [*SLURM, f"output_root={tmp_path / 'runs'}", "cluster.account=nobody", "follow=false"]
    slurm(sbatch="echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    for _ in range(2):  # the second time as the first: nothing wedges
        assert main(overrides) == 1
        shown = capsys.readouterr().out
        assert "not submitted" in shown and "Invalid account" in shown and "Traceback" not in shown
    [run_dir] = [path.parent for path in (tmp_path / "runs").glob("*/recipe.yaml")]
    assert current_status(run_dir) is None and not (run_dir / "job.json").exists()
    slurm(sbatch="echo Submitted batch job 12", squeue="echo 12 PENDING Resources")
    assert main(overrides) == 0
    assert (current_status(run_dir) or Status("lost")).state == "submitted"
    assert [(row.state, row.slurm) for row in rows(tmp_path / "runs")] == [("submitted", "pending: Resources")]
    assert main(overrides) == 0 and "already submitted as job 12" in capsys.readouterr().out


def test_a_run_that_waits_in_the_queue_is_followed_when_it_is_launched_again(tmp_path, slurm, monkeypatch, capsys):
    monkeypatch.setattr("realsr_hpc.launch.follow.POLL_SLURM_S", 0.1)
    slurm(sbatch="echo Submitted batch job 12", squeue="echo 12 PENDING Resources")
    overrides = [*SLURM, f"output_root={tmp_path / 'runs'}"]
    assert main([*overrides, "follow=false"]) == 0
    [run_dir] = [path.parent for path in (tmp_path / "runs").glob("*/recipe.yaml")]
    launch = json.loads((run_dir / "job.json").read_text())["launch"]
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(main, overrides)
        time.sleep(1)
        set_state(run_dir, "failed", 3, launch=launch)
        assert code.result(timeout=60) == 3
    shown = capsys.readouterr().out
    assert "already submitted as job 12" in shown and f"{run_dir.name}: failed" in shown


OTHERS = "echo quota: job 3 of 9; echo Your job 7 waits"


@pytest.mark.parametrize(
    ("sbatch", "said"),
    [("echo hello", '"hello"; if squeue --me lists'), ("exit 0", '""; if'), (OTHERS, '"quota: job 3 of 9 Your job 7')],
)
def test_an_sbatch_that_names_no_job_refuses_run_and_stage_in_one_line(sbatch, said, tmp_path, slurm, monkeypatch):
    config = compose([*SLURM, f"output_root={tmp_path / 'runs'}"])
    stage = Node("export", tmp_path / "runs" / "stages" / "export", config, (), "export_hf")
    slurm(sbatch=sbatch)
    [item] = submit([config])
    assert item.failed and item.note.startswith("Could not make sense of sbatch output") and said in item.note
    with pytest.raises(ValueError, match="export: Could not make sense of .*; launch the chain again to continue"):
        submit_stage(stage, ())
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", lambda executor: -1)  # no srun
    [item] = submit([config])
    assert item.failed and "srun" in item.note and not (item.run_dir / "job.json").exists()
    with pytest.raises(ValueError, match='export: Could not detect "srun"'):
        submit_stage(stage, ())


def test_a_refused_resume_keeps_the_recipe_that_was(tmp_path, slurm):
    slurm(sbatch="echo Submitted batch job 12", squeue="echo 12 PENDING Resources")
    [item] = submit([compose([*SLURM, f"output_root={tmp_path / 'runs'}"])], sweep="many", varied=["seed"])
    before = (item.run_dir / "recipe.yaml").read_text()
    set_state(item.run_dir, "failed", 1, launch=json.loads((item.run_dir / "job.json").read_text())["launch"])
    slurm(sbatch="echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1")
    refused = resume(item.run_dir, ["cluster.partition=nowhere"])
    assert refused.failed and "invalid partition specified: nowhere" in refused.note
    assert (item.run_dir / "recipe.yaml").read_text() == before
    assert (current_status(item.run_dir) or Status("lost")).state == "failed"
    assert sweep_tags(item.run_dir) == {"realsr_hpc.sweep": "many", "realsr_hpc.varied": "seed=0"}


def test_a_sweep_is_split_into_arrays_that_this_slurm_takes(tmp_path, slurm):
    slurm(
        scontrol="echo 'MaxArraySize            = 2'", squeue="",
        sbatch=f"n=$(ls {tmp_path}/taken* 2>/dev/null | wc -l); cp $1 {tmp_path}/taken$n; echo Submitted batch job $n",
    )  # fmt: skip
    configs = compose([*SLURM, f"output_root={tmp_path / 'runs'}", "seed=range(5)"], multirun=True)
    assert isinstance(configs, list)
    items = submit(configs, sweep="many", varied=["seed"])
    scripts = [path.read_text() for path in sorted(tmp_path.glob("taken*"))]
    assert [re.findall(r"--array='?([^'\n]*)", text) for text in scripts] == [["0-1%2"], ["0-1%2"], []]
    ids = [json.loads((item.run_dir / "job.json").read_text())["job_id"] for item in items]
    assert ids == ["0_0", "0_1", "1_0", "1_1", "2"] and all(item.submitted for item in items)


def test_launching_twice_at_once_submits_once_and_the_second_hears_of_it(tmp_path, slurm):
    slurm(sbatch=f"echo x >> {tmp_path}/calls; sleep 1; touch {tmp_path}/up; echo Submitted batch job 12",
          squeue=f"[ ! -e {tmp_path}/up ] || echo 12 PENDING Resources")  # fmt: skip
    command = [sys.executable, project_root() / "tools" / "launch.py", *SLURM, f"output_root={tmp_path / 'runs'}"]
    both = [subprocess.Popen([*command, "follow=false"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "calls").read_text() == "x\n"
    assert sorted("already submitted as job 12" in text for text in said) == [False, True]


def test_a_second_supervisor_of_a_folder_leaves_it_as_it_is_and_names_the_first(tmp_path):
    config = compose(["recipe=sft_tiny", f"output_root={tmp_path}"])
    from realsr_hpc.config.load import to_yaml

    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, runfolder.lock(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    before = sorted(path.name for path in tmp_path.iterdir())
    second = subprocess.run(
        [sys.executable, "-m", "realsr_hpc", tmp_path], capture_output=True, text=True, cwd=project_root()
    )
    assert second.returncode == 89 and f"process {holder.pid} on {os.uname().nodename}" in second.stderr
    assert "Slurm job 7" in second.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    set_state(tmp_path, "running")  # and job.json is gone: who holds the lock runs it
    assert (current_status(tmp_path) or Status("lost")).state == "running"
    holder.kill()
    holder.wait()
    assert not is_held(runfolder.lock(tmp_path))  # a lock dies with its holder
    assert (current_status(tmp_path) or Status("done")).state == "lost"
    holder.stdout.close()


def test_a_run_whose_process_outlives_its_job_is_running_until_that_has_ended(tmp_path, slurm):
    """The node's daemon was killed: Slurm gave the job up, and the process goes on."""
    slurm(squeue="echo 12 FAILED NonZeroExitCode", sbatch="echo Submitted batch job 13", scancel="exit 1")
    config = compose([*SLURM, f"output_root={tmp_path / 'runs'}"])
    run_dir = make_private(run_folder(config))
    write_job(run_dir, Job("slurm", "12", "", "the log", "a"))
    set_state(run_dir, "running", launch="a")
    lock = str(runfolder.lock(run_dir))
    with outliving(lock) as holder:
        status = current_status(run_dir) or Status("lost")
        said = f"job 12 is over, yet process {holder.pid} on {os.uname().nodename}"
        assert status.state == "running" and status.message.startswith(said)
        [left] = submit([config])
        assert not left.submitted and left.note == status.message
        with pytest.raises(ValueError, match=f"{said}.*: end that process yourself"):
            cancel(run_dir)
        node = Node("report", run_dir, config, (), "evaluate", ())
        with pytest.raises(ValueError, match=f"report: {said}.*then launch the chain again"):
            _submit([node], "chain", Console())
    assert (current_status(run_dir) or Status("done")).state == "lost"
    [again] = submit([config])
    assert again.submitted and json.loads((run_dir / "job.json").read_text())["job_id"] == "13"


def test_who_waits_too_long_for_a_lock_is_told_who_holds_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "a"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(LockRefused, match=rf"held by process {holder.pid} on .* since 20.* \(Slurm job 7\)"):
        with hold(tmp_path / "a", wait_s=0.2):
            pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with hold(tmp_path / "a"):
        assert is_held(tmp_path / "a")


DAMAGES = {"empty": b"", "garbage": b"\xff\x00{]", "null": b"null", "list": b"[1]", "zeros": bytes(40), "other": b"{}"}
SMALL_FILES = ("status.json", "job.json", "progress.json", "requeues.json", "mlflow.json", "tags.json", "place.json",
               "delivered.json", "recipe.yaml", "events.jsonl")  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), [*itertools.product(SMALL_FILES, DAMAGES)])
def test_a_damaged_small_file_hides_no_other_run_and_stops_nothing(tmp_path, name, damage):
    from realsr_hpc.tracking import metrics_by_step
    from realsr_hpc.tracking.place import recipe_of

    for run in ("good", "bad"):
        (folder := tmp_path / run).mkdir()
        (folder / "recipe.yaml").write_text("name: x\ntask: sft\n")
        write_job(folder, Job("local", "1", os.uname().nodename, "log"))
        set_state(folder, "failed", 1, "no such weights")
    (tmp_path / "bad" / name).write_bytes(DAMAGES[damage])
    found = {row.name: row for row in rows(tmp_path)}
    assert found["good"].state == "failed" and found["good"].message == "no such weights"
    assert set(found) == {"good", "bad"}
    bad = tmp_path / "bad"
    assert count_requeue(bad, 0) == 1 and read_progress(bad) is None and metrics_by_step(bad) == {}
    cancel(bad)
    if name == "recipe.yaml":
        with pytest.raises(RecipeError):
            recipe_of(bad)
    else:
        assert recipe_of(bad).name == "x"


def test_requeueing_is_asked_for_until_slurm_answers(tmp_path, slurm):
    slurm(scontrol=f"echo x >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -ge 4 ] || "
                   "{ echo 'slurm_requeue error: Unable to contact slurm controller' >&2; exit 1; }")  # fmt: skip
    pauses: list[float] = []
    assert requeue("7", sleep=pauses.append) and pauses == [1, 2, 4]
    slurm(scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    pauses.clear()
    assert not requeue("7", sleep=pauses.append) and 600 <= sum(pauses) < 700 and max(pauses) == 60
    slurm(scontrol="echo 'Invalid job id specified' >&2; exit 1")
    pauses.clear()
    assert not requeue("7", sleep=pauses.append) and pauses == []


def test_unfit_nodes_that_exclude_themselves_at_once_forget_none(tmp_path, slurm):
    (held := tmp_path / "held").write_text("n[7-8]")
    slurm(
        scontrol=f"""
        if [ $1 = show ]; then echo "JobId=7 ExcNodeList=$(cat {held}) NodeList=n1"; sleep 0.2
        else echo "${{3#ExcNodeList=}}" > {held}; fi"""
    )
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda nodes: exclude("7", nodes, tmp_path / "lock"), [("n1", "n2"), ("n3",), ("n2", "n4")]))
    listed = held.read_text().strip().split(",")
    assert listed[0] == "n[7-8]" and sorted(listed[1:]) == ["n1", "n2", "n3", "n4"]


def test_a_list_of_excluded_nodes_that_slurm_does_not_tell_is_not_replaced(tmp_path, slurm, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    slurm(scontrol=f"echo $* >> {tmp_path}/asked; [ $1 != show ]")
    exclude("7", ("n1",), tmp_path / "lock")
    assert "update" not in (tmp_path / "asked").read_text() and "n1 not excluded from job 7" in capsys.readouterr().out


def test_the_first_of_several_unfit_nodes_speaks_for_all(tmp_path):
    placements = [Placement(rank, 4, 1, "127.0.0.1", 1, "7", 0) for rank in range(4)]
    unfit = {rank: Verdict(rank, UNHEALTHY, f"node n{rank}: no GPU", unfit=(f"n{rank}",)) for rank in (1, 3)}

    def look(rank):
        time.sleep(0.1 * rank)
        if rank in unfit:
            return agree(tmp_path, placements[rank], unfit[rank], HEALTH_S)
        return tell_fit(tmp_path, placements[rank])

    with ThreadPoolExecutor(4) as pool:
        agreed = [verdict for verdict in pool.map(look, range(4)) if verdict]
    assert agreed[0] == agreed[1] and agreed[0].node == 1 and agreed[0].unfit == ("n1", "n3")
    assert agreed[0].message == "node n1: no GPU; node n3: no GPU"


def test_launching_compares_a_manifest_with_its_checksum_and_says_where_there_is_none(tmp_path, capsys):
    bundled = project_root() / "recipes/assets/photographs/manifest.parquet"
    manifest, beside = tmp_path / "manifest.parquet", tmp_path / "manifest.parquet.sha256"
    manifest.write_bytes(bundled.read_bytes())
    config = compose(["recipe=sft_tiny", f"data.manifest={manifest}", f"output_root={tmp_path / 'runs'}"])
    assert f"has no {beside.name} beside it" in unchecked_manifests([config])[0]
    refuse_what_is_missing([config])
    beside.write_bytes(bundled.with_name(beside.name).read_bytes())
    assert unchecked_manifests([config]) == []
    refuse_what_is_missing([config])
    for damage in (manifest.read_bytes()[:-1] + b"\0", b"", manifest.read_bytes()[:1000]):
        manifest.write_bytes(damage)
        launch = ["recipe=sft_tiny", f"data.manifest={manifest}", f"output_root={tmp_path / 'runs'}", "follow=false"]
        assert main(launch) == 2 and not (tmp_path / "runs").exists()
        assert f"data.manifest: {manifest} differs from {beside.name}; copy it again" in capsys.readouterr().out
    beside.write_text("")
    with pytest.raises(ValueError, match=re.escape(f"{beside} is damaged; copy it again, or remove it")):
        refuse_what_is_missing([config])


def test_an_open_run_folder_is_closed(tmp_path):
    (folder := tmp_path / "run").mkdir()
    folder.chmod(0o777)
    assert make_private(folder).stat().st_mode & 0o777 == 0o700
