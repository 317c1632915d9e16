"""FP8 numerics on any machine: rounding against numbers by hand, the policy under each recipe, switching on and off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from realsr_hpc.config.schema import ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from realsr_hpc.model.fp8 import Fp8Weight, rounded, rounded_by_blocks, stop_fp8, without_fp8
from realsr_hpc.model.hf_mapping import local_to_hf
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise
from realsr_hpc.rollout.decoder import Decoder

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ("tensorwise", "blockwise", "delayed")
MODEL = ModelConfig(num_layers=3, hidden_size=32, num_heads=4, ffn_hidden_size=48, init_std=0.15)


@pytest.fixture(scope="module")
def groups() -> ProcessGroups:
    torch.set_num_threads(1)
    return initialise(ParallelConfig(), seed=0)


def policy_of(groups: ProcessGroups, fp8: Any, **precision: Any) -> Policy:
    wanted = PrecisionConfig(fp8=fp8, fp8_backend="emulated", **precision)
    return build_policy(RunConfig(name="t", task="sft", model=MODEL, precision=wanted), groups, 64)


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def hidden_of(policy: Policy) -> Tensor:
    def keep(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return hidden.sum(), {"hidden": hidden}

    return run_pipeline(policy, [Microbatch(tokens())], keep, forward_only=True)[0]["hidden"]


def loss_fn(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = (hidden[:, :-1] @ weight.T).float()
    value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), microbatch.tokens[:, 1:].flatten())
    return value, {"loss": value.detach().clone()}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_that_the_format_holds_stay_and_others_move_by_half_a_step(dtype: torch.dtype) -> None:
    held = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    held = held[held.isfinite()]
    top = torch.tensor(torch.finfo(dtype).max)
    assert torch.equal(rounded(held, dtype, top), held)
    # the largest input lands on the largest number, whatever its size
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    moved = (rounded(x, dtype, x.abs().max()) - x).abs()
    mantissa_bits = 3 if dtype is E4M3 else 2
    assert (moved <= x.abs() * 2.0 ** -(mantissa_bits + 1) + 1e-7).all()
    assert moved.max() > 0
    assert rounded(torch.tensor([3.0, -3.0]), dtype, torch.tensor(1.0)).tolist() == [1.0, -1.0]


def test_blocks_do_not_share_an_outlier() -> None:
    x = torch.full((2, 300), 1.1)
    x[0, 5] = 1e7
    rows, squares = rounded_by_blocks(x, E4M3, square=False), rounded_by_blocks(x, E4M3, square=True)
    clean = rounded_by_blocks(torch.full((1,), 1.1), E4M3, square=False)
    assert torch.equal(rows[1], clean.expand(300)) and torch.equal(rows[0, 128:], clean.expand(172))
    assert (rows[0, :5] != clean).all()
    assert (squares[1, :128] != clean).all() and torch.equal(squares[:, 128:], clean.expand(2, 172))
    # power-of-two scales: such values times a power of two are held exactly
    assert torch.equal(rounded_by_blocks(x * 2.0**-7, E4M3, square=False), rows * 2.0**-7)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_moves_the_numbers_a_little_and_switched_off_nothing(groups: ProcessGroups, recipe: str) -> None:
    plain, fp8 = policy_of(groups, "none"), policy_of(groups, recipe)
    exact, moved = hidden_of(plain), hidden_of(fp8)
    difference = (moved - exact).abs().max()
    assert 1e-4 < difference < 0.5 * exact.abs().max()
    with without_fp8(fp8):
        assert torch.equal(hidden_of(fp8), exact)
    assert torch.equal(hidden_of(fp8), moved)
    stop_fp8(fp8)
    with without_fp8(fp8):
        pass
    assert torch.equal(hidden_of(fp8), exact)


def test_the_ends_stay_in_bf16_where_the_recipe_can(groups: ProcessGroups) -> None:
    def rounds(policy: Policy) -> list[bool]:
        return [layer.mlp.linear_fc1.fp8 is not None for layer in policy.chunks[0].decoder.layers]

    assert rounds(policy_of(groups, "tensorwise")) == [False, True, False]
    assert rounds(policy_of(groups, "tensorwise", first_last_layers_bf16=False)) == [True] * 3
    assert rounds(policy_of(groups, "delayed")) == [True] * 3


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_that_without_fp8(groups: ProcessGroups, recipe: str, recompute: Any) -> None:
    def train(fp8: str) -> tuple[list[float], Policy]:
        config = RunConfig(
            name="t",
            task="sft",
            model=MODEL,
            parallel=ParallelConfig(recompute=recompute),
            precision=PrecisionConfig(params="bf16", fp8=fp8, fp8_backend="emulated"),
            optim=OptimConfig(lr=1e-2),
        )
        optimiser = Optimiser(build_policy(config, groups, 64), config, total_steps=6)
        results = [optimiser.step([Microbatch(tokens())] * 2, loss_fn) for _ in range(6)]
        assert all(result.applied for result in results)
        return [float(result.outputs[0]["loss"]) for result in results], optimiser.policy

    exact, _ = train("none")
    losses, policy = train(recipe)
    assert losses[-1] < losses[0] - 0.3
    assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) < 0.2
    assert {value.dtype for value in local_to_hf(policy).values()} == {torch.bfloat16}
    state = policy.chunks[0].decoder.layers[1].mlp.linear_fc1.get_extra_state()
    assert (state is not None) == (recipe == "delayed")
    if state is not None:  # input, weight and gradient of the last pass; scoring leaves them
        assert (state > 0).all()
        hidden_of(policy)
        assert torch.equal(policy.chunks[0].decoder.layers[1].mlp.linear_fc1.get_extra_state(), state)


def test_a_weight_in_fp8_multiplies_as_its_rounded_rows_do() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 32, generator=random), torch.randn(48, 32, generator=random)
    weight[7] *= 1e3  # a row's scale is its own
    fp8 = Fp8Weight.of(weight)
    held = fp8.values.float() * fp8.scales
    assert fp8.values.element_size() == 1
    assert ((held - weight).abs() <= weight.abs() * 2.0**-4 + weight.abs().amax(1, keepdim=True) * 2.0**-10).all()
    exact = x @ weight.T
    moved = (fp8.product(x) - exact).norm(dim=0) / exact.norm(dim=0)
    assert 1e-3 < moved.mean() < 0.05
    assert fp8.product(x.bfloat16()).dtype is torch.bfloat16


def test_rollouts_multiply_in_fp8_where_the_recipe_says(groups: ProcessGroups) -> None:
    """The training forward pass stays exact; the decoder changes slightly, and more if its ends are in FP8 too."""

    def first_logits(policy: Policy) -> Tensor:
        decoder, prompts = Decoder(policy), tokens()
        turns = decoder.prefill(decoder.new_cache(prompts, 1, 4, False), prompts)
        try:
            while True:
                next(turns)
        except StopIteration as end:
            return end.value

    exact = policy_of(groups, "none")
    inner, every = (policy_of(groups, "none", rollout_fp8=True, first_last_layers_bf16=ends) for ends in (True, False))
    assert (inner.rollout_fp8_layers, every.rollout_fp8_layers) == ((2,), (1, 2, 3))
    assert torch.equal(hidden_of(every), hidden_of(exact))
    reference = first_logits(exact)
    little, more = ((first_logits(policy) - reference).abs().mean() for policy in (inner, every))
    assert 0 < little < more < 0.2 * reference.abs().mean()
