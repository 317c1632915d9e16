"""Directions of metrics, and the best checkpoint's metric."""

from __future__ import annotations

import math

import pytest

from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.config.metrics import best_is_highest, best_metric, is_measured, lower_is_better


@pytest.mark.parametrize(
    "key",
    [
        "heldout/loss/mean",
        "sft/loss/mean",
        "rollout/mismatch_kl",
        "evaluate/real/ours/niqe",
        "evaluate/real/ours/lpips-vgg",
        "dists",
        "time/rollout/s",
        "rewards/failures/count",
    ],
)
def test_lower_is_better(key):
    assert lower_is_better(key)


@pytest.mark.parametrize(
    "key",
    [
        "heldout/total/mean",
        "rewards/fidelity/mean",
        "evaluate/loss/ours/psnr_y",
        "evaluate/real/ours/musiq",
        "topiq_nr",
        "heldout/psnr_db/mean",
        "ssim_y",
    ],
)
def test_higher_is_better(key):
    assert not lower_is_better(key)


def test_pyiqa_agrees():
    table = pytest.importorskip("pyiqa.default_model_configs").DEFAULT_CONFIGS
    wrong = [name for name, entry in table.items() if bool(entry.get("lower_better")) != lower_is_better(name)]
    assert wrong == []


def test_infinities_are_not_measured_also_as_mlflow_stores_them():
    assert is_measured(-3.0) and not any(
        map(is_measured, (None, math.inf, -math.inf, math.nan, 1.7976931348623157e308))
    )


@pytest.mark.parametrize(
    ("recipe", "metric", "highest"),
    [
        ("grpo_tiny", "heldout/total/mean", True),
        ("sft_tiny", "heldout/loss/mean", False),
        ("tokenizer_tiny", "heldout/psnr_db/mean", True),
    ],
)
def test_each_task_has_a_best(recipe, metric, highest):
    config = compose_one([f"recipe={recipe}"])
    assert (best_metric(config), best_is_highest(config)) == (metric, highest)


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.best_metric=nope"],
        ["checkpoint.best_metric=heldout/nope/mean"],
        ["checkpoint.keep_best=1", "checkpoint.best_is=lowest"],
        ["checkpoint.keep_best=1", "grpo.heldout_every_steps=0"],
    ],
)
def test_a_best_that_is_not_measured_or_points_the_wrong_way_is_refused(overrides):
    with pytest.raises(RecipeError, match="checkpoint."):
        compose_one(["recipe=grpo_tiny", *overrides])


def test_recipes_resolved_before_still_load():
    compose_one(["recipe=sft_tiny", "checkpoint.best_metric=heldout/total/mean", "checkpoint.best_is=highest"])
