"""Adapters: gradients at any layout equal one process, merging equals adding, checkpoints hold them alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.launcher import run_ranks
from tests.distributed.test_checkpoint import OPTIM, STEPS, train
from tests.distributed.test_equality import LAYOUTS, TOLERANCE
from tests.distributed.worlds import gradients, largest_difference, microbatches, start, tiny_config

LORA = {"rank": 4, "alpha": 8.0}
SOME = {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "v_proj", "up_proj", "down_proj")}


def config_of(lora: dict[str, Any], parallel: dict[str, Any] | None = None, **sections: Any) -> Any:
    return tiny_config(parallel, {"lora": lora}, **sections)


@cache
def one_process(every: bool) -> dict[str, Any]:
    return run_ranks(1, gradients, config_of(LORA if every else SOME), 1, False)[0]


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, every: bool) -> None:
    world, parallel = LAYOUTS[layout]
    results = run_ranks(world, gradients, config_of(LORA if every else SOME, parallel), 2, False)
    assert all(abs(r["loss"] - one_process(every)["loss"]) < TOLERANCE for r in results)
    found = results[0]["gradients"]
    assert len(found) == 4 * 2 * (7 if every else 4)
    assert largest_difference(found, one_process(every)["gradients"]) < TOLERANCE
    assert min(np.abs(gradient).max() for gradient in found.values()) > 100 * TOLERANCE


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    config = config_of({"rank": 4, "alpha": 8.0, "targets": ("down_proj",)}, {"recompute": recompute})
    plain = config_of({"rank": 4, "alpha": 8.0, "targets": ("down_proj",)})
    found, wanted = (run_ranks(1, gradients, each, 2, False)[0]["gradients"] for each in (config, plain))
    assert largest_difference(found, wanted) < TOLERANCE


def forward_ways(config: Any) -> dict[str, Any]:
    """Hidden states with adapters, without, and of a plain policy with the merged weights."""
    import torch

    from realsr_hpc.model import lora
    from realsr_hpc.model.hf_mapping import hf_to_local, local_to_hf
    from realsr_hpc.model.policy import build_policy

    policy = start(config)
    plain = build_policy(
        config.model_copy(update={"model": config.model.model_copy(update={"lora": None})}), policy.groups, 256
    )
    tokens = microbatches(1, 0, 1)[0].tokens
    with torch.no_grad():
        found = {"added": policy.chunks[0](tokens), "start": plain.chunks[0](tokens)}
        with lora.adapters_off(policy):
            found["off"] = policy.chunks[0](tokens)
        hf_to_local(local_to_hf(policy, lora.merging(policy)).__getitem__, plain)
        found["merged"] = plain.chunks[0](tokens)
    return {name: hidden.numpy() for name, hidden in found.items()}


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_merged_weights_are_the_adapted_model_and_without_adapters_it_is_the_start(lora: dict[str, Any]) -> None:
    found = run_ranks(1, forward_ways, config_of(lora))[0]
    assert np.abs(found["added"] - found["merged"]).max() < TOLERANCE
    assert np.array_equal(found["off"], found["start"])
    assert np.abs(found["added"] - found["off"]).max() > 0.1


@pytest.mark.parametrize("second", [(1, {}), (4, {"tp": 2}), (2, {"pp": 2, "virtual_pp": 2})])
def test_a_resumed_run_ends_as_if_undisturbed(second: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    config = config_of(LORA, {"distributed_optimizer": True}, optim=OPTIM)
    whole = run_ranks(1, train, config, tmp_path / "whole", STEPS, None, False)[0]
    run_ranks(1, train, config, tmp_path / "cut", 3, 3, False)
    saved = FileSystemReader(tmp_path / "cut" / "step-000003").read_metadata().state_dict_metadata
    world, parallel = second
    elsewhere = config_of(LORA, {"distributed_optimizer": True} | parallel, optim=OPTIM)
    resumed = run_ranks(world, train, elsewhere, tmp_path / "cut", STEPS, None, True)[0]
    difference = largest_difference(resumed["weights"], whole["weights"])
    assert difference == 0.0 if world == 1 else difference < TOLERANCE
    tensors = [key for key in saved if "rng" not in key and not key.startswith("optimizer.param_groups")]
    assert len(tensors) == 56 and all(".lora." in key for key in tensors), "a checkpoint holds adapters alone"


def load_into(config: Any, root: Path) -> str:
    from realsr_hpc.checkpoint import load, resume_path

    policy = start(config)
    try:
        load(resume_path(root, policy.groups), policy, None, policy.groups)
    except ValueError as error:
        return str(error)
    return ""


def test_adapters_are_refused_by_other_weights(tmp_path: Path) -> None:
    config = config_of(LORA, optim=OPTIM)
    run_ranks(1, train, config, tmp_path, 1, 1, False)
    assert run_ranks(1, load_into, config, tmp_path) == [""]
    other = run_ranks(1, load_into, config.model_copy(update={"seed": 4}), tmp_path)[0]
    assert "seed 3" in other and "seed 4" in other
