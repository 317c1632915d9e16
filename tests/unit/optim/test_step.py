"""One update in one process: schedule, summed losses, decay, gradients that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from realsr_hpc.config.schema import ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from realsr_hpc.model.policy import build_policy
from realsr_hpc.optim.step import Optimiser, learning_rate, optimizer_arguments
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.parallel.process_groups import initialise

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, ffn_hidden_size=24)


def make(distributed: bool = True, params: Any = "fp32", **optim: Any) -> Optimiser:
    torch.set_num_threads(1)
    config = RunConfig(
        name="t",
        task="sft",
        model=MODEL,
        parallel=ParallelConfig(distributed_optimizer=distributed),
        precision=PrecisionConfig(params=params),
        optim=OptimConfig(**optim),
    )
    return Optimiser(build_policy(config, initialise(config.parallel, 0), 64), config, total_steps=10)


def batch(count: int) -> list[Microbatch]:
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    return [Microbatch(tokens) for _ in range(count)]


def scaled_loss(factor: float) -> Any:
    def loss(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = (hidden[:, :-1] @ weight.T).float()
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), microbatch.tokens[:, 1:].flatten()) * factor
        return value, {"loss": value.detach().clone()}

    return loss


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.55, 0.1, 0.1]),
        ("cosine", [0.5, 1, 1, 0.55, 0.1, 0.1]),
    ],
)
def test_learning_rate_by_hand(schedule: Any, rates: list[float]) -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2)
    assert [learning_rate(optim, step, 10) for step in (0, 1, 2, 6, 10, 15)] == pytest.approx(rates)


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_add_over_microbatches(distributed: bool) -> None:
    one, three = make(distributed), make(distributed)
    single = one.step(batch(1), scaled_loss(1.0))
    triple = three.step(batch(3), scaled_loss(1.0))
    assert len(triple.outputs) == 3
    assert triple.grad_norm == pytest.approx(3 * single.grad_norm, rel=1e-5)


@pytest.mark.parametrize("params", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_training_lowers_the_loss(distributed: bool, params: str) -> None:
    optimiser = make(distributed, params, lr=1e-2)
    losses = [float(optimiser.step(batch(1), scaled_loss(1.0)).outputs[0]["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("distributed", [False, True])
def test_gradient_that_is_not_finite_changes_nothing_and_is_counted(distributed: bool) -> None:
    optimiser = make(distributed)
    before = [p.detach().clone() for p in optimiser.policy.parameters()]
    result = optimiser.step(batch(1), scaled_loss(float("nan")))
    assert not result.applied and optimiser.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, optimiser.policy.parameters(), strict=True))
    assert (optimiser.num_updates, optimiser.skipped_in_a_row) == (1, 1)  # the schedule's clock goes on
    assert optimiser.step(batch(1), scaled_loss(1.0)).applied and optimiser.num_skipped == 1
    assert (optimiser.num_updates, optimiser.skipped_in_a_row) == (2, 0)


@pytest.mark.parametrize("distributed", [False, True])
def test_every_update_begins_with_no_gradient(distributed: bool) -> None:
    optimiser = make(distributed, lr=1e-12)
    first, second = (optimiser.step(batch(1), scaled_loss(1.0)).grad_norm for _ in range(2))
    assert second == pytest.approx(first, rel=1e-6)


def test_clipping_bounds_the_update() -> None:
    """With a huge epsilon Adam's update is proportional to the gradient: the norm of the update shows the clip."""

    def moved(clip: float) -> tuple[float, float]:
        optimiser = make(lr=1.0, epsilon=1e6, clip_grad_norm=clip)
        before = [p.detach().clone() for p in optimiser.policy.parameters()]
        norm = optimiser.step(batch(1), scaled_loss(1.0)).grad_norm
        pairs = zip(before, optimiser.policy.parameters(), strict=True)
        return norm, sum(float((b - a).detach().double().square().sum()) for a, b in pairs) ** 0.5

    norm, free = moved(1e9)
    _, clipped = moved(norm / 4)
    assert clipped == pytest.approx(free / 4, rel=1e-2)


def test_norms_do_not_decay() -> None:
    optimiser = make(lr=0.1, weight_decay=0.5)
    optimiser.step(batch(1), scaled_loss(0.0))
    moved = {name: p for name, p in optimiser.policy.chunks[0].named_parameters()}
    assert torch.equal(moved["decoder.layers.0.self_attention.q_layernorm.weight"], torch.ones(2, 8))
    assert torch.equal(moved["decoder.final_layernorm.weight"], torch.ones(16))
    fresh = make().policy.chunks[0].output_layer.weight
    assert torch.allclose(moved["output_layer.weight"], fresh * 0.95)


def test_lean_main_weights_are_transformer_engines_and_refused_without_it() -> None:
    """Only the arguments: Transformer Engine's Adam, which supports remainders, needs a GPU."""
    from dataclasses import fields

    from megatron.core.optimizer import OptimizerConfig

    arguments = optimizer_arguments(OptimConfig(main_params="bf16"), torch.bfloat16, distributed=True)
    assert arguments.keys() <= {field.name for field in fields(OptimizerConfig)}
    assert arguments["use_precision_aware_optimizer"] and arguments["store_param_remainders"]
    assert arguments["exp_avg_dtype"] is arguments["exp_avg_sq_dtype"] is torch.bfloat16
    assert arguments["main_params_dtype"] is torch.float32  # what weights and remainders make together
    adam = optimizer_arguments(OptimConfig(beta1=0.7, beta2=0.8, epsilon=1e-5), torch.float32, distributed=False)
    assert (adam["adam_beta1"], adam["adam_beta2"], adam["adam_eps"], adam["bf16"]) == (0.7, 0.8, 1e-5, False)
    plain = optimizer_arguments(OptimConfig(), torch.bfloat16, distributed=True)
    assert "use_precision_aware_optimizer" not in plain
    offloaded = optimizer_arguments(OptimConfig(cpu_offload=True), torch.bfloat16, distributed=True)
    assert (offloaded["optimizer_cpu_offload"], offloaded["optimizer_offload_fraction"]) == (True, 1.0)
    if not backend.has_transformer_engine():
        with pytest.raises(ValueError, match="optim.main_params = bf16 needs CUDA and Transformer Engine"):
            make(params="bf16", main_params="bf16")
