"""Metric keys that runs report, and the direction in which each is better, for checkpoints, samplers and comparisons.

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
"""Default of `checkpoint.best_metric` by task."""


def lower_is_better(key: str) -> bool:
    """Whether a metric (its key or bare name) is better when lower; `_y`, `-vgg`, `_nr` mark variants of a name."""
    parts = key.split("/")
    name = parts[-1] if parts[0] == "evaluate" or len(parts) == 1 else parts[1]
    return parts[0] == "time" or name in LOWER_IS_BETTER or name.replace("_", "-").split("-")[0] in LOWER_IS_BETTER


def is_measured(value: float | None) -> bool:
    """Whether a value exists and is finite. MLflow stores infinities as the largest float."""
    return value is not None and math.isfinite(value) and abs(value) < 1e300


def best_metric(config: RunConfig) -> str:
    """Key of the metric by which the best checkpoints of a run are chosen."""
    return config.checkpoint.best_metric or TASK_METRIC[config.task]


def best_is_highest(config: RunConfig) -> bool:
    """Whether `best_metric` is better when higher."""
    return not lower_is_better(best_metric(config))


def num_steps(config: RunConfig) -> int:
    """Number of steps of a run."""
    return {"grpo": config.grpo, "sft": config.sft, "tokenizer": config.tokenizer_training}[config.task].num_steps


def measured_every(config: RunConfig) -> tuple[str, int]:
    """The field that says how often `best_metric` is measured, and its value in steps (0: never)."""
    if not best_metric(config).startswith("heldout/"):
        return "", 1
    every = {
        "grpo": ("grpo.heldout_every_steps", config.grpo.heldout_every_steps),
        "sft": ("sft.heldout_every_steps", config.sft.heldout_every_steps),
        "tokenizer": ("tokenizer_training.log_every_steps", config.tokenizer_training.log_every_steps),
    }
    return every[config.task]


def reported(config: RunConfig) -> list[str]:
    """The valid values of `checkpoint.best_metric`."""
    if config.task == "grpo":
        rewards = ["total", *config.rewards.terms]
        return [f"{room}/{name}/mean" for room in ("heldout", "rewards") for name in rewards] + [
            "heldout/well_formed/mean",
            "rollout/well_formed/mean",
        ]
    return ["heldout/loss/mean", "sft/loss/mean"] if config.task == "sft" else ["heldout/psnr_db/mean"]
