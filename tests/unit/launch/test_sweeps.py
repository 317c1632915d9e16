"""Sweeps: named axes, Optuna's choices, and what cannot fit."""

from __future__ import annotations

import pytest

from realsr_hpc.config.load import compose, yaml_names
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.command import choose, main, read_command_line
from realsr_hpc.launch.rundir import make_private, run_folder, write_status
from realsr_hpc.launch.search import sample
from realsr_hpc.tracking.spool import Spool


def test_a_large_sweep_equals_its_recipes_one_by_one():
    options, multirun, overrides = read_command_line(
        ["recipe=grpo_7b", "axes=kl", "grpo.kl_beta=0,0.5", "rewards=paper,default"]
    )
    configs = choose(options, multirun, overrides)
    assert len(configs) == 12
    assert configs[-1] == compose(["recipe=grpo_7b", "grpo.kl_beta=0.5", "rewards=default", "seed=2"])
    assert len({run_folder(config) for config in configs}) == 12


@pytest.mark.parametrize("name", yaml_names("sweeps"))
def test_shipped_axes_fit_the_large_recipe(name):
    options, multirun, overrides = read_command_line(["recipe=grpo_7b", f"axes={name}"])
    if any("interval" in item for item in overrides):
        overrides = [item for item in overrides if "interval" not in item]
    assert len(choose(options, multirun, overrides)) > 1


def test_optuna_learns_from_finished_runs_and_proposes_missing_ones_again(tmp_path, capsys):
    arguments = [
        "-m", "recipe=grpo_tiny", f"output_root={tmp_path}", "grpo.kl_beta=interval(0,0.1)", "seed=0,1",
        "sampler=optuna", "trials=3", "sweep=search",
    ]  # fmt: skip
    planned = choose(*read_command_line(arguments))
    assert main([*arguments, "plan=true"]) == 0 == main([*arguments, "resolve=true"])
    assert main([*arguments, "model.weights=nowhere"]) == 2 and "model.weights" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]  # neither a plan nor what is refused is remembered

    def drawn() -> list[RunConfig]:
        return sample(read_command_line(arguments)[2], "search", 3, keep=True)

    first = drawn()
    assert first == planned and len({config.grpo.kl_beta for config in first}) == 3
    assert drawn() == first
    before = (journal := tmp_path / "sweeps" / "search" / "optuna.journal").read_bytes()
    for number, config in enumerate(first[:2]):
        folder = make_private(run_folder(config))
        write_status(folder, "done", 0)
        spool = Spool(folder)
        spool.append({"kind": "metrics", "step": 1, "time_ms": 1, "metrics": {"heldout/total/mean": float(number)}})
        spool.close()
    assert choose(*read_command_line(arguments)) == first[2:] and journal.read_bytes() == before
    assert drawn() == first[2:] and journal.read_bytes() != before
    write_status(make_private(run_folder(first[2])), "failed", 1)
    second = drawn()
    assert len(second) == 3 and not {config.grpo.kl_beta for config in second} & {c.grpo.kl_beta for c in first}


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["recipe=grpo_7b", f"output_root={tmp_path / 'runs'}", "cluster.gpu_memory_gib=8"]) == 2
    shown = capsys.readouterr().out
    assert "cluster.gpu_memory_gib: 8" in shown and "GiB per GPU" in shown
    assert not (tmp_path / "runs").exists()


def test_an_interval_without_a_sampler_is_refused():
    assert main(["-m", "recipe=grpo_tiny", "grpo.kl_beta=interval(0,0.1)"]) == 2
