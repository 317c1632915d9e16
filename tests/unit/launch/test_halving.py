"""Successive halving: what it decides, what it refuses, and a real sweep whose launcher is killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest

from realsr_hpc.commands.launch import main
from realsr_hpc.config.load import RecipeError, compose, compose_one
from realsr_hpc.launch.command import choose, read_command_line
from realsr_hpc.launch.halving import Move, Trial, even_rungs, next_move
from realsr_hpc.launch.proposals import refuse_another_space
from realsr_hpc.launch.rundir import current_status, read_job, run_folder
from realsr_hpc.launch.submit import SlurmAway, submit_patiently
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import metrics_by_step
from tests.slurm.conftest import SMALL
from tests.slurm.watching import results

RUNGS = (4, 12, 36)
SMALL_RUN = [line for line in SMALL if "cluster.kind" not in line and "heldout_every" not in line]


@pytest.mark.parametrize("places", [1, 4, 27])
@pytest.mark.parametrize("seed", range(20))
def test_a_sweep_of_27_finds_the_best_with_a_fraction_of_the_steps(places, seed):
    """Places free up at random; a run's value at a rung is near its last one, so ranks change on the way."""
    chance = random.Random(seed)
    final = [chance.random() for _ in range(27)]
    best = min(range(27), key=final.__getitem__)
    trials: list[Trial] = []
    steps = 0
    while True:
        while sum(trial.busy for trial in trials) < places:
            move = next_move(trials, len(RUNGS), 3, highest=False, may_propose=len(trials) < 27)
            if move is None:
                break
            if move.trial is None:
                trials.append(Trial(0, busy=True))
            else:
                assert trials[move.trial].waits_at(move.rung - 1)
                trials[move.trial] = replace(trials[move.trial], target=move.rung, busy=True)
            steps += RUNGS[move.rung] - (RUNGS[move.rung - 1] if move.rung else 0)
        busy = [number for number, trial in enumerate(trials) if trial.busy]
        if not busy:
            break
        number = chance.choice(busy)
        value = final[number] + 0.02 * chance.random() / (1 + trials[number].target)
        trials[number] = replace(trials[number], values=(*trials[number].values, value), busy=False)
    assert len(trials) == 27 and all(trial.values for trial in trials)
    assert len(trials[best].values) == 3
    # a third of the runs and a ninth go on; the best of a rung may be one more
    assert steps <= 27 * RUNGS[0] + 10 * (RUNGS[1] - RUNGS[0]) + 4 * (RUNGS[2] - RUNGS[1]) <= 0.3 * 27 * RUNGS[2]


def trials(*values: tuple[float, ...], busy: tuple[int, ...] = ()) -> list[Trial]:
    return [Trial(max(len(row) - 1, 0) + (n in busy), row, n in busy) for n, row in enumerate(values)]


@pytest.mark.parametrize(
    ("seen", "highest", "may_propose", "expected"),
    [
        (trials(), False, True, Move(None, 0)),
        (trials((3.0,), (2.0,)), False, True, Move(None, 0)),  # two of three: too few to promote one
        (trials((3.0,), (2.0,), (1.0,)), False, True, Move(2, 1)),
        (trials((3.0,), (2.0,), (1.0,)), True, True, Move(0, 1)),
        (trials((3.0,), (nan,), (nan,)), False, True, Move(0, 1)),  # what cannot be measured is worst
        (trials((nan,), (nan,), (nan,)), False, False, None),
        (trials((3.0,), (2.0,), (1.0,), busy=(2,)), False, True, Move(None, 0)),  # the best is on its way already
        (trials((3.0,), (2.0,), (1.0, 1.0)), False, False, Move(2, 2)),  # nobody would reach the end
        (
            trials((2.0,), (3.0, 3.0, 3.0), (4.0,), (1.0,)),
            False,
            False,
            Move(3, 1),
        ),  # came late
        (trials((2.0,), (3.0, 3.0), (4.0,), (1.0,)), False, True, Move(None, 0)),
        (trials((3.0,), (2.0,), (1.0, 1.0), busy=(0,)), False, False, None),
        (trials((3.0,), (2.0,), (1.0, 1.0, 1.0)), False, False, None),
        (trials((4.0,), (2.0, 2.0), (1.0, 3.0), (3.0, 1.0), (5.0,), (6.0,)), False, True, Move(3, 2)),
    ],
)
def test_what_a_free_place_does(seen, highest, may_propose, expected):
    assert next_move(seen, 3, 3, highest=highest, may_propose=may_propose) == expected


def test_rungs_lie_where_the_metric_is_measured():
    assert even_rungs(36, 3, 1) == (4, 12, 36)
    assert even_rungs(880, 3, 100) == (100, 300, 880)
    assert even_rungs(10, 3, 10) == (10,)


LEFT = ["optim.lr=1e-3,1e-4", "seed=1,2"]
ASHA = ["-m", "recipe=sft_tiny", "sampler=asha", "sft.num_steps=9", "sft.heldout_every_steps=1", "optim.warmup_steps=0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "sampler: asha: nothing to choose"),
        (["seed=1,2", "keep=1"], "keep=1 is below 2; give 2 or more"),
        (["seed=1,2", "rungs=3,x"], "rungs: '3,x': write steps from 1 to 9"),
        (["seed=1,2", "rungs=10"], "rungs: '10': write steps from 1 to 9"),
        (["seed=1,2", "rungs=3", "sft.heldout_every_steps=2"], "rungs: 3: heldout/loss/mean is measured every 2 steps"),
        (["seed=1,2", "sft.heldout_every_steps=9"], "rungs: 9: runs of 9 steps leave no rung before their end"),
        (["tracking.description=a,b"], "tracking.description varies nothing that makes another run"),
        (["sft.num_steps=9,12"], "the number of steps and the measuring interval may not vary"),
        (["seed=1,2", "fresh=true"], "fresh: not with sampler=asha"),
        (["seed=1,2", "rungs=3", "sampler=all"], "rungs: goes with sampler=asha"),
    ],
)
def test_options_that_do_not_fit_are_named_and_nothing_is_written(words, said, tmp_path, capsys):
    asha = [word for word in ASHA if word != "sampler=asha" or "sampler=all" not in words]
    assert main([*asha, f"output_root={tmp_path / 'runs'}", *words]) == 2
    assert said in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_a_grid_is_tried_once_each_and_intervals_are_drawn(tmp_path):
    grid = [
        *ASHA,
        f"output_root={tmp_path}",
        "optim.lr=1e-4,1e-3,1e-2",
        "vlcot.instruction='a <|image|>','it\\'s \"<|image|>\"'",
    ]
    found, whole = choose(*read_command_line(grid)), [word for word in grid if word != "sampler=asha"]
    everything = compose(whole[1:], multirun=True)
    assert isinstance(everything, list) and sorted(map(repr, found)) == sorted(map(repr, everything))
    assert found != everything and found == choose(*read_command_line(grid))  # in an order of its own, always the same
    drawn = choose(
        *read_command_line([*ASHA, "optim.lr=tag(log,interval(1e-5,1e-2))", "seed=1,2", "optim.min_lr=0", "trials=5"])
    )
    assert len({config.optim.lr for config in drawn}) == 5 and {config.seed for config in drawn} <= {1, 2}


@pytest.mark.parametrize(
    ("fixed", "varied", "said"),
    [
        (["cluster.array_parallelism=5", "tracking.description=x", "sft.num_steps=90"], LEFT, ""),
        (["sft.num_steps=80"], LEFT[::-1], "launched with sft.num_steps=90, now 80; choose another sweep="),
        (["sft.num_steps=90"], ["optim.lr=1e-3,1e-5", "seed=1,2"], "optim.lr=1e-3,1e-4, now optim.lr=1e-3,1e-5"),
        (["sft.num_steps=90"], ["optim.lr=1e-3,1e-4"], "seed=1,2, now seed fixed"),
        (["sft.num_steps=90", "parallel.tp=2"], LEFT, "parallel.tp=1, now 2"),
        (["sft.num_steps=90", "cluster.tasks_per_node=1"], LEFT, "cluster.nodes x cluster.tasks_per_node=2, now 1"),
        (["sft.num_steps=90", "vlcot.instruction='it\\'s <|image|>'"], LEFT, "now 'it\\'s <|image|>'"),
    ],
)
def test_a_sweep_launched_again_names_what_decides_its_results_and_differs(fixed, varied, said):
    first = {"fixed": ["recipe=sft_tiny", "sft.num_steps=90"], "varied": LEFT}
    now = {"fixed": ["recipe=sft_tiny", *fixed], "varied": varied}
    if not said:
        return refuse_another_space("rates", first, now)
    with pytest.raises(RecipeError) as error:
        refuse_another_space("rates", first, now)
    told = str(error.value)
    assert told.startswith("sweep: rates: was launched with ") and said in told and told.count("=") < 8


def test_a_followed_sweep_outlives_a_controller_that_is_away(tmp_path, slurm):
    """Of the sweep's own queue: first squeue finds it away, then sbatch."""
    config = compose_one(["recipe=sft_tiny", "cluster.kind=slurm", f"output_root={tmp_path / 'runs'}"])
    away = "{ echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1; }"
    said, pauses = [], []
    asked = f"echo x >> {tmp_path}/$(basename $0); [ $(wc -l < {tmp_path}/$(basename $0)) -ge 2 ] || {away}"
    slurm(squeue=asked, sbatch=f"{asked}; echo Submitted batch job 12")
    [found] = submit_patiently([(config, run_folder(config))], said.append, sleep=pauses.append)
    assert found.submitted and not found.failed and pauses == [1, 2]
    assert "squeue does not answer" in said[0] and "Unable to contact slurm controller" in said[1]
    job = read_job(run_folder(config))
    assert job is not None and job.job_id == "12"
    slurm(sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1")
    other = compose_one(["recipe=sft_tiny", "seed=1", "cluster.kind=slurm", f"output_root={tmp_path / 'runs'}"])
    [refused] = submit_patiently([(other, run_folder(other))], said.append, sleep=pauses.append)
    assert refused.failed and "Invalid account" in refused.note and pauses == [1, 2]
    slurm(squeue="exit 1")
    with pytest.raises(SlurmAway):
        submit_patiently([(other, run_folder(other))], said.append, sleep=pauses.append)
    assert 600 <= sum(pauses) < 700


@pytest.mark.timeout(1800)
def test_a_sweep_whose_launcher_is_killed_goes_on_and_its_survivor_was_never_paused(
    tmp_path, image_tokenizer, store, monkeypatch, capsys
):
    root, alone = tmp_path / "it's a root", tmp_path / "alone"
    root.mkdir()
    shutil.copy(store, root / "mlflow.db")
    run = [*SMALL_RUN, "sft.num_steps=4", "sft.heldout_every_steps=1", f"image_tokenizer.weights={image_tokenizer}"]
    run += ["vlcot.instruction='it\\'s \"<|image|>\"'", "optim.min_lr=0"]
    words = [*run, "-m", f"output_root={root}", "cluster.array_parallelism=2", "optim.lr=1e-9,3e-3"]
    words += ["sampler=asha", "rungs=1", "keep=2", "sweep=rates"]
    configs = {config.optim.lr: config for config in choose(*read_command_line(words))}
    folders = {rate: run_folder(config) for rate, config in configs.items()}
    state = root / "sweeps" / "rates" / "asha.json"

    command = [sys.executable, str(project_root() / "tools" / "launch.py"), *words]
    launcher = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not state.exists() or len(json.loads(state.read_text())["trials"]) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()

    monkeypatch.setenv("COLUMNS", "160")
    again = [word for word in words if not word.startswith(("cluster.array", "optim.min_lr"))]
    assert main([*again, "cluster.array_parallelism=3", "optim.min_lr=0", "tracking.description=again"]) == 0
    states = {rate: status.state for rate, path in folders.items() if (status := current_status(path))}
    assert states == {3e-3: "done", 1e-9: "stopped"}
    assert {rate: max(metrics_by_step(path)) for rate, path in folders.items()} == {3e-3: 4, 1e-9: 1}
    assert "5 of 8 steps, 62%" in capsys.readouterr().out

    assert main([*run, f"output_root={alone}", "optim.lr=3e-3"]) == 0
    [run_dir] = (path.parent for path in alone.glob("*/recipe.yaml"))
    assert results(run_dir) == results(folders[3e-3])
    assert weights(run_dir) == weights(folders[3e-3]) != {}


def weights(run_dir: Path) -> dict[str, str]:
    """Checksums of the weights and the optimizer's state in the last checkpoint."""
    paths = run_dir.glob("checkpoints/step-*4/*.distcp")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
