"""The plan of a recipe: memory per GPU, pipeline bubble, traffic and GPU-hours, before anything is submitted.

Pure arithmetic on a RunConfig. Memory is counted term by term (memory.py); time follows from assumed shares of the
device's peak rates (seconds.py) and is meant for comparing recipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from realsr_hpc.config.derived import world_size
from realsr_hpc.config.metrics import num_steps
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.experts import Rewards, rewards_of
from realsr_hpc.plan.memory import Memory, memory
from realsr_hpc.plan.seconds import (
    Device,
    Traffic,
    bubble,
    communication_seconds,
    device_of,
    rewards_seconds,
    rollout_seconds,
    traffic,
    training_seconds,
)
from realsr_hpc.plan.sizes import microbatch_shape, parameter_count, sequence_tokens, sequences_per_update


@dataclass(frozen=True)
class Plan:
    """The estimate for one recipe; memory is that of the GPU with the highest peak."""

    device: str
    parameters: int
    world_size: int
    dp: int
    memory: Memory
    limit_gib: float | None
    microbatches: int
    bubble: float
    """Share (0..1) of a training pass in which a pipeline stage is idle."""
    prompt_tokens: int
    response_tokens: int
    sequences: int
    """Sequences of one update, over all ranks."""
    rollout_s: float
    rewards_s: float
    """Scoring the rollouts, without terms that another process computes."""
    rewards: Rewards
    training_s: float
    """Computation of one step's updates, including the pipeline bubble."""
    communication_s: float
    """Communication of one step's updates, assuming no overlap with computation."""
    traffic: Traffic
    steps: int

    @property
    def memory_gib(self) -> dict[str, float]:
        """GiB by term: resident memory and the terms of the largest phase; empty for a tokenizer recipe."""
        if not self.memory.phases:
            return {}
        phase = self.memory.peak_phase
        return self.memory.resident | {f"{phase}: {name}": gib for name, gib in self.memory.phases[phase].items()}

    @property
    def total_gib(self) -> float:
        """Peak memory of a step in GiB."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the GPU; None if the recipe does not give the memory of its GPUs."""
        return None if self.limit_gib is None else self.total_gib <= self.limit_gib

    @property
    def step_s(self) -> float:
        """Seconds of a step: rollouts, rewards, training and its communication."""
        return self.rollout_s + self.rewards_s + self.training_s + self.communication_s

    @property
    def tokens_per_gpu_s(self) -> float:
        """Training throughput: tokens of prompts and responses per GPU and second of a whole step."""
        tokens = self.sequences * (self.prompt_tokens + self.response_tokens)
        return tokens / self.step_s / self.world_size if self.step_s else 0.0

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.steps * self.step_s * self.world_size / 3600


def plan(config: RunConfig, device: Device | None = None) -> Plan:
    """The estimate for a GRPO or SFT recipe; for a tokenizer recipe, which has no sequence model, 0 but for its steps.

    device: None chooses by the recipe's GPU memory (`device_of`).
    """
    device = device or device_of(config)
    parallel, world = config.parallel, world_size(config)
    dp = world // (parallel.tp * parallel.pp)
    prompt, response = sequence_tokens(config)
    shape = microbatch_shape(config) if config.task != "tokenizer" else None
    count = shape.count if shape else 0
    sent = traffic(config, shape, dp) if shape else Traffic(0.0, 0.0, 0.0)
    return Plan(
        device=device.name,
        parameters=parameter_count(config),
        world_size=world,
        dp=dp,
        memory=memory(config, shape) if shape else Memory({}, {}, 0.0),
        limit_gib=config.cluster.gpu_memory_gib,
        microbatches=count,
        bubble=bubble(parallel.pp, parallel.virtual_pp, count) if count else 0.0,
        prompt_tokens=prompt,
        response_tokens=response,
        sequences=sequences_per_update(config),
        rollout_s=rollout_seconds(config, device, dp),
        rewards_s=rewards_seconds(config, device),
        rewards=rewards_of(config),
        training_s=training_seconds(config, shape, device, dp) if shape else 0.0,
        communication_s=communication_seconds(config, sent, device, dp),
        traffic=sent,
        steps=num_steps(config),
    )
