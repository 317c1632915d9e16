"""Metric keys that runs report, and which way is better: one declaration for checkpoints, samplers and comparisons.

A key is `room/quantity/reduction` (`heldout/total/mean`), or `evaluate/SET/METHOD/METRIC`.
"""

from __future__ import annotations

import math

from realsr_hpc.config.schema import RunConfig

LOWER_IS_BETTER = frozenset(
    {"loss", "z_loss", "policy_loss", "commitment", "failures", "mismatch_kl", "mismatch_abs", "kl_reference"}
    | {"passes", "lookahead_flips"}
    | {"niqe", "ilniqe", "brisque", "piqe", "pi", "lpips", "stlpips", "dists", "pieapp", "fid", "sfid", "mad", "gmsd"}
    | {"nlpd", "deepdc", "afine", "msswd"}
)
"""Quantities and pyiqa metrics (without variants: `lpips-vgg` is an `lpips`); everything else is better when higher."""
TASK_METRIC = {"grpo": "heldout/total/mean", "sft": "heldout/loss/mean", "tokenizer": "heldout/psnr_db/mean"}
"""What a checkpoint of a task is best by, where the recipe does not say."""


def lower_is_better(key: str) -> bool:
    """The direction of a metric, by its key or bare name; `_y`, `-vgg`, `_nr` and the like are variants of a name."""
    parts = key.split("/")
    name = parts[-1] if parts[0] == "evaluate" or len(parts) == 1 else parts[1]
    return parts[0] == "time" or name in LOWER_IS_BETTER or name.replace("_", "-").split("-")[0] in LOWER_IS_BETTER


def is_measured(value: float | None) -> bool:
    """Whether a value can be compared: there, and finite. MLflow stores infinities as the largest float."""
    return value is not None and math.isfinite(value) and abs(value) < 1e300


def best_metric(config: RunConfig) -> str:
    """Key of the metric by which a run's checkpoints are best."""
    return config.checkpoint.best_metric or TASK_METRIC[config.task]


def best_is_highest(config: RunConfig) -> bool:
    """The direction of `best_metric`."""
    return not lower_is_better(best_metric(config))


def num_steps(config: RunConfig) -> int:
    """Steps of a run."""
    return {"grpo": config.grpo, "sft": config.sft, "tokenizer": config.tokenizer_training}[config.task].num_steps


def measured_every(config: RunConfig) -> tuple[str, int]:
    """The field that says how often `best_metric` is measured, and its value in steps; 0: never."""
    if not best_metric(config).startswith("heldout/"):
        return "", 1
    every = {
        "grpo": ("grpo.heldout_every_steps", config.grpo.heldout_every_steps),
        "sft": ("sft.heldout_every_steps", config.sft.heldout_every_steps),
        "tokenizer": ("tokenizer_training.log_every_steps", config.tokenizer_training.log_every_steps),
    }
    return every[config.task]


def reported(config: RunConfig) -> list[str]:
    """Keys that can be `checkpoint.best_metric`."""
    if config.task == "grpo":
        rewards = ["total", *config.rewards.terms]
        return [f"{room}/{name}/mean" for room in ("heldout", "rewards") for name in rewards] + [
            "heldout/well_formed/mean",
            "rollout/well_formed/mean",
        ]
    return ["heldout/loss/mean", "sft/loss/mean"] if config.task == "sft" else ["heldout/psnr_db/mean"]
