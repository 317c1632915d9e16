"""Checkpoints hold every weight once; one that does not fit is refused before any weight is overwritten."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realsr_hpc import checkpoint
from realsr_hpc.model.policy import Policy
from tests.steps import small_parts

torch.set_num_threads(1)
STATE = checkpoint.RunState(3)


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory) -> Path:
    policy = small_parts().policy
    return checkpoint.save(tmp_path_factory.mktemp("run"), 3, policy, None, STATE, checkpoint.Keep(last=1))


def refused(path: Path, policy: Policy, optimiser=None) -> str:
    """Returns the error's message, after checking that no weight has changed."""
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with pytest.raises(ValueError) as told:
        checkpoint.load(path, policy, optimiser, policy.groups)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    return str(told.value)


def test_weights_alone_are_loaded_and_give_no_optimizer_its_state(weights_only):
    parts = small_parts()
    said = refused(weights_only, parts.policy, parts.optimiser)
    assert said.startswith(f"checkpoint {weights_only} holds weights only: ")
    assert checkpoint.load(weights_only, parts.policy, None, parts.groups) == STATE


def test_adapters_of_other_weights_are_refused(weights_only):
    other = replace(small_parts().policy, base="sha256:1")
    assert "belongs to no base, this recipe's model.weights to sha256:1: adapters fit only" in refused(
        weights_only, other
    )


def test_a_checkpoint_of_another_model_section_is_named_by_what_it_lacks(weights_only):
    adapted = small_parts(model={"lora": {"rank": 2, "alpha": 4.0}}).policy
    said = refused(weights_only, replace(adapted, base=None))
    assert f"checkpoint {weights_only} lacks " in said and "it was written with another model section" in said


def test_halves_of_a_layer_are_written_once(tmp_path):
    """Gate and up projections are views of one tensor, whose whole memory torch would save with each of them."""
    policy = small_parts(model={"ffn_hidden_size": 2048}).policy
    path = checkpoint.save(tmp_path, 1, policy, None, STATE, checkpoint.Keep(last=1))
    written = sum(file.stat().st_size for file in path.glob("*.distcp"))
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    assert weights <= written < 1.1 * weights


def test_a_state_of_another_type_is_named(weights_only, tmp_path):
    path = shutil.copytree(weights_only, tmp_path / weights_only.name)
    (path / "state.json").write_text('{"run": {"step": "third"}, "optimiser": null}', encoding="utf-8")
    assert f"checkpoint {path}: its state.json is damaged (run.step: " in refused(path, small_parts().policy)
