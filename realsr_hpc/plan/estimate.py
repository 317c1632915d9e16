"""What a recipe will need, before anything is submitted: memory per GPU, pipeline bubble, traffic, GPU-hours.

Pure arithmetic on a RunConfig. Memory is counted term by term (memory.py), time follows from stated shares of the
device's peaks (seconds.py): an estimate to compare recipes with, not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from realsr_hpc.config.derived import world_size
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
    """An estimate; memory in GiB on the fullest GPU."""

    device: str
    parameters: int
    world_size: int
    dp: int
    memory: Memory
    limit_gib: float | None
    microbatches: int
    bubble: float
    """Share of a training pass in which a pipeline stage waits."""
    prompt_tokens: int
    response_tokens: int
    sequences: int
    """Of one update, over all ranks."""
    rollout_s: float
    rewards_s: float
    """Scoring the rollouts; 0 for terms that another process computes."""
    rewards: Rewards
    training_s: float
    """Arithmetic and idling of one step."""
    communication_s: float
    """Of training, as if none of it were hidden."""
    traffic: Traffic
    steps: int

    @property
    def memory_gib(self) -> dict[str, float]:
        """GiB by term: what stays, and what the largest phase of a step adds; {} for a tokenizer recipe."""
        if not self.memory.phases:
            return {}
        phase = self.memory.peak_phase
        return self.memory.resident | {f"{phase}: {name}": gib for name, gib in self.memory.phases[phase].items()}

    @property
    def total_gib(self) -> float:
        """Peak of a step, GiB."""
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
        """Tokens of prompts and responses that a GPU learns from in a second."""
        tokens = self.sequences * (self.prompt_tokens + self.response_tokens)
        return tokens / self.step_s / self.world_size if self.step_s else 0.0

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.steps * self.step_s * self.world_size / 3600


def plan(config: RunConfig, device: Device | None = None) -> Plan:
    """The estimate for a GRPO or SFT recipe; a tokenizer recipe has no sequence model, its figures are 0.

    device: None: chosen by the recipe's GPU memory (`device_of`).
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
        steps={"grpo": config.grpo.num_steps, "sft": config.sft.num_steps}.get(config.task, 0),
    )
