"""Loss, hidden states, gradients and updates at any layout equal one process (fp32, 1e-5)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import gradients, largest_difference, tiny_config, updates

TOLERANCE = 1e-5
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2_sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_virtual2": (2, {"pp": 2, "virtual_pp": 2}),
}


@cache
def one_process(packed: bool) -> dict[str, Any]:
    return run_ranks(1, gradients, tiny_config(), 1, packed)[0]


def assert_equal(results: list[dict[str, Any]], packed: bool) -> None:
    reference = one_process(packed)
    assert all(abs(r["loss"] - reference["loss"]) < TOLERANCE for r in results)
    assert largest_difference(results[0]["gradients"], reference["gradients"]) < TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, packed: bool) -> None:
    world, parallel = LAYOUTS[layout]
    results = run_ranks(world, gradients, tiny_config(parallel), 2, packed)
    assert_equal(results, packed)
    if layout != "dp2":
        assert np.abs(results[0]["hidden"] - one_process(packed)["hidden"]).max() < TOLERANCE


@pytest.mark.parametrize("count", [2, 4])
def test_splitting_into_microbatches_changes_nothing(count: int) -> None:
    assert_equal(run_ranks(1, gradients, tiny_config(), count, False), False)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    assert_equal(run_ranks(1, gradients, tiny_config({"recompute": recompute}), 2, True), True)


def test_norms_after_attention_and_mlp_split_as_one_process_computes_them() -> None:
    """`swin_norm`: norms stand behind the sums over tp; under sequence parallelism each rank holds some of the rows."""
    swin = {"swin_norm": True}
    reference = run_ranks(1, gradients, tiny_config(model=swin), 1, False)[0]
    layout = {"tp": 2, "sequence_parallel": True, "recompute": "selective"}
    results = run_ranks(2, gradients, tiny_config(layout, swin), 2, False)
    assert all(abs(result["loss"] - reference["loss"]) < TOLERANCE for result in results)
    assert largest_difference(results[0]["gradients"], reference["gradients"]) < TOLERANCE
    assert largest_difference(reference["gradients"], one_process(False)["gradients"]) > 100 * TOLERANCE


def test_gradients_are_large_enough_to_tell() -> None:
    reference = one_process(False)["gradients"]
    smallest = min(np.abs(g).max() for g in reference.values())
    assert smallest > 100 * TOLERANCE
    assert largest_difference(reference, one_process(True)["gradients"]) > 100 * TOLERANCE


@pytest.mark.parametrize("layout", ["dp2", "tp2_sequence", "tp2_pp2"])
def test_distributed_optimizer_updates_as_one_process(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    # a large epsilon: Adam's first update is a sign, which would blow up differences of 1e-9
    optim = {"lr": 1e-2, "clip_grad_norm": 0.5, "weight_decay": 0.1, "warmup_steps": 2, "epsilon": 1e-3}
    reference = run_ranks(1, updates, tiny_config(optim=optim), 3)[0]
    results = run_ranks(world, updates, tiny_config(parallel | {"distributed_optimizer": True}, optim=optim), 3)
    assert results[0]["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert largest_difference(results[0]["weights"], reference["weights"]) < TOLERANCE
    assert reference["lrs"] == [5e-3, 1e-2, 1e-2]
    assert all(reference["applied"]) and reference["norms"][0] > 0.5
