"""Comparisons from a real MLflow store."""

from __future__ import annotations

import csv
import json

import pytest

from realsr_hpc.compare import compare, connect, find_runs, find_sweep, plot_curves
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import prepare_sweep, sync, write_launch_tags
from realsr_hpc.tracking.spool import Spool
from realsr_hpc.tracking.store import PARENT_TAG

REWARDS = {0.0: [0.1, 0.5, 0.9], 0.04: [0.1, 0.3, 0.4]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs of one sweep, with rewards that rise to .9 and .4."""
    root = tmp_path_factory.mktemp("runs")
    for kl_beta, rewards in REWARDS.items():
        tree = {"name": f"beta{kl_beta}", "task": "grpo", "output_root": str(root), "grpo": {"kl_beta": kl_beta}}
        config = RunConfig.model_validate(tree)
        run_dir = root / config.name
        run_dir.mkdir()
        write_launch_tags(run_dir, {PARENT_TAG: prepare_sweep(config, "betas")})
        (run_dir / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")))
        spool = Spool(run_dir)
        for step, value in enumerate(rewards, 1):
            metrics = {"rewards/total/mean": value, "optim/lr": 1e-4}
            spool.append({"kind": "metrics", "step": step, "time_ms": step, "metrics": metrics})
        spool.close()
        sync(run_dir)
    return connect(f"sqlite:///{root / 'mlflow.db'}")


def test_a_sweep_is_its_children_and_the_best_has_the_highest_reward(store):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"))
    assert [run.name for run in comparison.runs] == ["beta0.0", "beta0.04"]
    assert comparison.metric == "rewards/total/mean"
    assert comparison.best is not None and comparison.best.name == "beta0.0"
    assert comparison.differing == ("grpo.kl_beta", "name")


def test_runs_are_found_by_name_and_unknown_ones_named(store):
    assert [run.info.run_name for run in find_runs(store, "realsr_hpc", ["beta0.04"])] == ["beta0.04"]
    with pytest.raises(ValueError, match="several begin so"):
        find_runs(store, "realsr_hpc", ["beta"])
    with pytest.raises(ValueError, match="there are: betas"):
        find_sweep(store, "realsr_hpc", "gammas")
    with pytest.raises(ValueError, match="tracking.experiment 'other'"):
        find_sweep(store, "other", "betas")


def test_csv_and_curve_hold_every_run(store, tmp_path):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"))
    comparison.write_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["grpo.kl_beta"], float(row["rewards/total/mean"])) for row in rows] == [("0.0", 0.9), ("0.04", 0.4)]
    assert plot_curves(store, comparison, "rewards/total/mean", tmp_path / "curve.png") == 2
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_is_best_where_none_has_the_metric(store):
    assert compare(find_sweep(store, "realsr_hpc", "betas"), "heldout/none").best is None
