# pyright: strict, reportMissingTypeStubs=false
"""One optimizer update: data-parallel wrapping, forward and backward, clipping, AdamW.

Gradients are those of the sum of all losses over microbatches and data-parallel ranks; nothing divides them. An update
whose gradient is not finite is skipped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any  # Megatron's optimizers, model chunks and keywords

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from torch import Tensor

from realsr_hpc.config.schema import OptimConfig, RunConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch, Outputs, run_pipeline
from realsr_hpc.parallel.process_groups import ProcessGroups
from realsr_hpc.parallel.reduce import reduce_float

# norms and their biases do not decay; selected by name, because the weights of q and k norms have two dims
_NO_DECAY: Any = {ParamKey(name="*layernorm.*"): {"wd_mult": 0.0}}


@dataclass(frozen=True)
class StepResult:
    """The result of one update."""

    outputs: list[Outputs]
    """The loss function's outputs by microbatch on the last stage, [] on the others."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    applied: bool
    """False: the gradient was not finite and the weights are unchanged."""
    lr: float


class Optimiser:
    """Owns the trained policy's gradient buffers, AdamW's state and the learning-rate schedule."""

    def __init__(self, policy: Policy, config: RunConfig, total_steps: int) -> None:
        """total_steps: number of updates of the whole run, at which the learning-rate decay ends."""
        self.policy = policy
        self.optim = config.optim
        self.total_steps = total_steps
        self.num_updates = 0
        """Number of updates so far, skipped ones included; the learning-rate schedule follows it."""
        self.num_skipped = 0
        """Updates that were not applied because their gradient was not finite."""
        self.skipped_in_a_row = 0
        self.on_skipped: Callable[[list[Microbatch]], None] | None = None
        """Called on every rank with the microbatches of an update that was not applied."""
        self.distributed = config.parallel.distributed_optimizer
        policy.config.finalize_model_grads_func = _sum_gradients
        with backend.vendor_calls():
            self.chunks = [
                DistributedDataParallel(policy.config, self._ddp_config(), chunk, disable_bucketing=index > 0)
                for index, chunk in enumerate(policy.chunks)
            ]
            self.vendor: Any = get_megatron_optimizer(self._optimizer_config(), self.chunks, _NO_DECAY)  # pyright: ignore[reportArgumentType]

    @property
    def groups(self) -> ProcessGroups:
        """Process groups of the policy."""
        return self.policy.groups

    def step(self, microbatches: list[Microbatch], loss_fn: LossFunction) -> StepResult:
        """Make one update: forward and backward passes over all microbatches, clipping, AdamW."""
        self.backward(microbatches, loss_fn, outputs := [])
        with backend.vendor_calls():
            result = self._update(outputs)
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if not result.applied and self.on_skipped is not None:
            self.on_skipped(microbatches)
        return result

    def backward(self, microbatches: list[Microbatch], loss_fn: LossFunction, outputs: list[Outputs]) -> None:
        """Compute the microbatches' gradients in every parameter's `main_grad`; appends their outputs to `outputs`."""
        self.policy.train()
        with backend.vendor_calls():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.vendor.zero_grad()
        outputs.extend(run_pipeline(self, microbatches, loss_fn, forward_only=False))

    def _update(self, outputs: list[Outputs]) -> StepResult:
        lr = learning_rate(self.optim, self.num_updates, self.total_steps)
        for group in self.vendor.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.optim.weight_decay * group["wd_mult"]
        # copies the bf16 model's gradients to the float32 main weights; every rank then agrees on the norm
        found_inf = bool(self.vendor.prepare_grads())
        grad_norm = self._grad_norm()
        applied = not found_inf and math.isfinite(grad_norm)
        if applied:
            self._clip(grad_norm)
            self.vendor.step_with_ready_grads()
        # a skipped update counts too, so that the learning rate is a function of the step
        self.num_updates += 1
        self.num_skipped += not applied
        return StepResult(outputs, grad_norm, applied, lr)

    def _grad_norm(self) -> float:
        norm = float(self.vendor.get_grad_norm())
        # every rank must come to the same decision; Megatron's own norm spans tp x pp (x dp when sharded)
        agreed = norm if math.isfinite(norm) else math.inf
        return reduce_float(agreed, torch.distributed.group.WORLD, self.groups.device, "max")

    def _clip(self, grad_norm: float) -> None:
        factor = self.optim.clip_grad_norm / (grad_norm + 1e-6)
        if factor >= 1.0:
            return
        for parameter in self.vendor.get_parameters():
            # an optimizer without separate float32 weights stores gradients as `decoupled_grad` of the bf16 ones
            gradient: Tensor | None = getattr(parameter, "decoupled_grad", parameter.grad)
            if gradient is not None:
                gradient.mul_(factor)

    def _ddp_config(self) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self.distributed,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
            check_for_nan_in_grad=False,
        )

    def _optimizer_config(self) -> OptimizerConfig:
        if self.optim.main_params == "bf16" and not backend.has_transformer_engine():
            raise ValueError(
                "optim.main_params = bf16 needs CUDA and Transformer Engine's Adam, and one of them is absent here: "
                "install the extra `gpu` on a GPU node, or set optim.main_params=fp32"
            )
        return OptimizerConfig(
            **optimizer_arguments(self.optim, self.policy.config.params_dtype, distributed=self.distributed)
        )


def optimizer_arguments(optim: OptimConfig, params_dtype: torch.dtype, *, distributed: bool) -> dict[str, Any]:
    """Keywords of Megatron's OptimizerConfig.

    main_params=bf16 is Megatron's "precision-aware" optimizer: Transformer Engine's Adam keeps the float32 main
    weights as the bf16 ones and their remainders, and its moments in bf16.
    """
    arguments: dict[str, Any] = {
        "optimizer": "adam",
        "lr": optim.lr,
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_eps": optim.epsilon,
        "clip_grad": optim.clip_grad_norm,
        "bf16": params_dtype is torch.bfloat16,
        "params_dtype": params_dtype,
        "use_distributed_optimizer": distributed,
        "optimizer_cpu_offload": optim.cpu_offload,
        "optimizer_offload_fraction": 1.0 if optim.cpu_offload else 0.0,
    }
    if optim.main_params == "bf16":
        arguments |= {
            "use_precision_aware_optimizer": True,
            "store_param_remainders": True,
            "main_params_dtype": torch.float32,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
    return arguments


def _sum_gradients(
    model: list[Any], num_tokens: Tensor | None = None, pg_collection: Any = None, **arguments: Any
) -> None:
    """Megatron's reduction of gradients without dividing by the number of tokens; the loss is already divided."""
    del num_tokens
    finalize_model_grads(model, None, pg_collection, **arguments)


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of update `step` (0-based) of `total_steps`: warm-up, then constant, linear or cosine decay to `min_lr`.

    The first warm-up step is already above zero.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    decay_steps = max(1, total_steps - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    remaining = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining
