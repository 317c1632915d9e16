"""The large and the small recipes at full size: each rank builds its share without memory, and the shares add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from realsr_hpc.config.derived import world_size
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.parallel.process_groups import initialise, shutdown
from realsr_hpc.plan import parameter_count, plan
from realsr_hpc.plan.sizes import vocabulary_size

PUBLISHED = {"chameleon_7b": 7_013_158_912, "chameleon_7b_f8": 7_080_267_776}
LARGE = [(recipe, model) for recipe in ("sft_7b", "grpo_7b", "grpo_7b_paper") for model in PUBLISHED]
PUBLISHED["chameleon_30b"] = 34_293_448_704


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Groups of one rank of a larger world, whose collectives do nothing (torch's fake process group)."""

    def join(rank: int, world: int, parallel: ParallelConfig) -> Any:
        shutdown_if_started()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        new_group = dist.new_group
        # Megatron asks for gloo twins of its groups by name
        monkeypatch.setattr(dist, "new_group", lambda *args, **named: new_group(*args, **named | {"backend": "fake"}))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return initialise(parallel, seed=0)

    yield join
    shutdown_if_started()


def shutdown_if_started() -> None:
    if dist.is_initialized():
        shutdown()


def held(config: RunConfig, groups: Any) -> dict[str, tuple[bool, int]]:
    """Parameter -> (is it cut over tp, how many numbers this rank holds), the layers numbered over the whole model."""
    policy = build_policy(config, groups, vocabulary_size(config), meta=True)
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
    shares = {}
    for chunk in policy.chunks:
        numbers = [layer.layer_number for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(numbers[int(parts[2])])
            shares[".".join(parts)] = (parameter.tensor_model_parallel, parameter.numel())
            assert parameter.dtype == torch.bfloat16
    return shares


def own_norms(config: RunConfig) -> int:
    """We hold a q and a k norm (weight, bias) for each head; the published count has one for a layer."""
    model = config.model
    spare = model.num_heads - 1 + kv_heads(model) - 1
    return model.num_layers * 2 * spare * model.hidden_size // model.num_heads


@pytest.mark.parametrize(("recipe", "model"), [*LARGE, ("sft_7b", "chameleon_30b")])
def test_ranks_of_the_layout_hold_exactly_the_published_model(recipe: str, model: str, as_rank: Any) -> None:
    config = compose_one([f"recipe={recipe}", f"model={model}"])
    assert parameter_count(config) == PUBLISHED[model]
    parallel, world = config.parallel, world_size(config)
    assert parallel.tp * parallel.pp > 1
    whole: dict[str, int] = {}
    for stage in range(parallel.pp):
        first_of_stage = stage * world // parallel.pp  # tp varies fastest, then dp, then pp
        shares = held(config, as_rank(first_of_stage, world, parallel))
        assert not whole.keys() & shares.keys()
        whole |= {name: count * parallel.tp if cut else count for name, (cut, count) in shares.items()}
    assert sum(whole.values()) == PUBLISHED[model] + own_norms(config)


@pytest.mark.parametrize("recipe", ["sft_small", "grpo_small"])
def test_a_small_recipe_is_built_as_planned_and_fits_one_gpu_of_24_gb(recipe: str, as_rank: Any) -> None:
    config = compose_one([f"recipe={recipe}"])
    shares = held(config, as_rank(0, 1, config.parallel))
    assert sum(count for _, count in shares.values()) == parameter_count(config) + own_norms(config)
    assert 100e6 < parameter_count(config) < 350e6
    assert plan(config).fits and config.cluster.gpu_memory_gib <= 24e9 / 2**30
