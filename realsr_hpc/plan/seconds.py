"""Time and traffic of a step from a roofline model: assumed shares of the device's peak rates, without overlap.

It leaves out the image tokenizer, the loader, checkpoints, and rewards that another process computes. Traffic is
counted exactly; its time follows from the usable link rates in `Device`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from realsr_hpc.config.derived import pass_tokens, world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.experts import final_pixels, on_the_device, rewards_of, rollouts_of_a_rank
from realsr_hpc.plan.memory import kv_cache_bytes
from realsr_hpc.plan.sizes import (
    MicrobatchShape,
    has_reference,
    layer_size,
    parameter_count,
    sequence_tokens,
    sequences_per_update,
    trained_parameters,
    vocabulary_size,
    width,
)

GB = 1e9


@dataclass(frozen=True)
class Device:
    """An accelerator and its links: peak rates from the data sheet, and the share that a run is assumed to reach."""

    name: str
    bf16_tflops: float = 989.0
    bandwidth_tb_s: float = 4.8
    training_share: float = 0.40
    """Share of `bf16_tflops` reached by training's matrix products; Megatron-LM reports 41-48 %."""
    decoding_share: float = 0.45
    """Share of `bandwidth_tb_s` reached while decoding."""
    fp8_speedup: float = 1.25
    fp32_tflops: float = 67.0
    """Peak of float32 without tensor cores, which the rewards' networks use."""
    experts_share: float = 0.30
    """Share of `fp32_tflops` that they reach."""
    core_gflops: float = 10.0
    """Rate of one CPU core for networks that score on the host (rewards.device=cpu)."""
    nvlink_gb_s: float = 360.0
    """Usable by one GPU, in one direction, inside a node (80 % of 450)."""
    network_gb_s: float = 40.0
    """Usable by one GPU, in one direction, between nodes (80 % of one 400 Gbit/s card per GPU)."""
    collective_us: float = 20.0
    """Latency of a small collective inside a node."""


H100, H200 = Device("H100", bandwidth_tb_s=3.35), Device("H200")
_LARGEST_H100_GIB = 80.0


def device_of(config: RunConfig) -> Device:
    """The device that a recipe is planned for: an H100 if its GPUs have at most 80 GiB, else an H200."""
    gib = config.cluster.gpu_memory_gib
    return H100 if gib is not None and gib <= _LARGEST_H100_GIB else H200


@dataclass(frozen=True)
class Traffic:
    """GB (10^9 bytes) that one GPU sends in a step, by axis."""

    tp: float
    pp: float
    dp: float


def bubble(pp: int, virtual_pp: int, count: int) -> float:
    """Idle share (0..1) of (interleaved) 1F1B with `count` microbatches: (p - 1) / (v m + p - 1)."""
    return (pp - 1) / (virtual_pp * count + pp - 1)


def training_seconds(config: RunConfig, shape: MicrobatchShape, device: Device, dp: int) -> float:
    """Seconds of one step's training: forward and backward passes of all updates, the reference's forward pass,
    recomputation and the pipeline bubble.

    With several updates a step the policy's own log-probabilities are computed once more before the first.
    """
    model = config.model
    matrices = parameter_count(config) - vocabulary_size(config) * model.hidden_size
    # causal attention computes half of the pairs of positions
    prompt, response, count = shape.branches.prompt, shape.branches.response, shape.branches.count
    pairs = prompt**2 / 2 + count * response * (prompt + response / 2)
    attention = 4 * model.num_layers * model.hidden_size * pairs * shape.in_a_row
    forward = _rows_of_a_step(config, shape) * dp * (2 * matrices * shape.row_tokens + attention)
    # Each update uses its own share of the rollouts. A backward pass computes gradients of inputs and of weights; with
    # adapters only those of inputs count.
    passes = (3.0 if model.lora is None else 2.0) + _computed_again(config) + has_reference(config)
    passes += config.task == "grpo" and config.grpo.updates_per_step > 1
    if config.task == "sft":  # sampling the policy's own codes takes 1 to `own_codes_passes` forward passes
        passes += config.sft.own_codes * (1 + config.sft.own_codes_passes) / 2
    rate = device.bf16_tflops * 1e12 * device.training_share * world_size(config)
    if config.precision.fp8 != "none":
        rate *= device.fp8_speedup
    idle = bubble(config.parallel.pp, config.parallel.virtual_pp, shape.count)
    return forward * passes / rate / (1 - idle)


def _rows_of_a_step(config: RunConfig, shape: MicrobatchShape) -> int:
    """Number of rows of all updates on one data-parallel rank, including blank ones."""
    return shape.rows * shape.count * (config.grpo.updates_per_step if config.task == "grpo" else 1)


def _computed_again(config: RunConfig) -> float:
    """Share of a forward pass that recomputation adds: everything, the MLPs, or nothing."""
    if config.parallel.recompute == "selective":
        return 3 * config.model.hidden_size * config.model.ffn_hidden_size / layer_size(config)
    return 1.0 if config.parallel.recompute == "full" else 0.0


def tokens_per_pass(width: int) -> float:
    """Tokens per row that a pass over `width` tokens accepts, as measured with the small policy at temperature 1.

    Measured at widths 2, 4, 8 and 16: 1.37, 1.88, 2.36 and 3.21 (docs/benchmarks.md); no other policy was measured.
    """
    return 1 + 0.37 * (width - 1) ** 0.66


def rollout_seconds(config: RunConfig, device: Device, dp: int) -> float:
    """Seconds of one step's decoding, at the recipe's look-ahead width, or the fastest one if it is `auto`.

    A pass takes the longer of reading the weights and half of the full cache, and of its floating-point operations.
    """
    if config.task != "grpo":
        return 0.0
    _, response = sequence_tokens(config)
    batches = math.ceil(sequences_per_update(config) / dp / config.rollout.batch_size)
    rows = min(config.rollout.batch_size, math.ceil(sequences_per_update(config) / dp))
    widest = pass_tokens(config.rollout, rows) // rows
    auto = [2**power for power in range(widest.bit_length())]
    widths = auto if config.rollout.lookahead == "auto" else [widest]
    token_s = min(_pass_seconds(config, device, rows * width) / tokens_per_pass(width) for width in widths)
    return batches * response * token_s


def rewards_seconds(config: RunConfig, device: Device) -> float:
    """Seconds of one step's scoring on the busiest rank: the networks' operations, and the work of one CPU core."""
    experts, pixels = rewards_of(config), final_pixels(config)
    rate = device.fp32_tflops * 1e12 * device.experts_share if on_the_device(config) else device.core_gflops * 1e9
    image_s = experts.flops(pixels) / rate + experts.host_s(pixels)
    return rollouts_of_a_rank(config) * image_s


def _pass_seconds(config: RunConfig, device: Device, tokens: int) -> float:
    """Seconds of one decoding pass with this many tokens."""
    parallel, model = config.parallel, config.model
    byte = 1 if config.precision.rollout_fp8 else width(config)
    weights = parameter_count(config) * byte / parallel.tp
    cache = kv_cache_bytes(config) * parallel.pp
    # A token passes all pipeline stages one after the other, each reading its own share of the weights.
    reading_s = (weights + cache / 2) / (device.bandwidth_tb_s * 1e12 * device.decoding_share)
    work = 2 * parameter_count(config) * tokens / parallel.tp
    pass_s = max(reading_s, work / (device.bf16_tflops * 1e12 * device.training_share))
    if parallel.tp > 1:  # two all-reduces per layer, so small that only their latency counts
        pass_s += 2 * model.num_layers * device.collective_us * 1e-6
    return pass_s


def traffic(config: RunConfig, shape: MicrobatchShape, dp: int) -> Traffic:
    """GB that one GPU sends in the training of a step. Decoding sends little but often: see `rollout_seconds`."""
    parallel, model = config.parallel, config.model
    hidden = _rows_of_a_step(config, shape) * shape.row_tokens * model.hidden_size * width(config)
    ring = (parallel.tp - 1) / parallel.tp
    # An all-reduce over tp is a reduce-scatter and an all-gather; each layer has two in the forward and two in the
    # backward pass. Under sequence parallelism inputs are gathered once more for the weights' gradients.
    passes = 4 * 2 + (2 if parallel.sequence_parallel else 0) + (4 if has_reference(config) else 0)
    passes += {"none": 0, "selective": 2, "full": 4}[parallel.recompute]
    over_tp = model.num_layers / parallel.pp * hidden * ring * passes
    over_pp = 2 * hidden / (parallel.tp if parallel.sequence_parallel else 1) if parallel.pp > 1 else 0.0
    updates = config.grpo.updates_per_step if config.task == "grpo" else 1
    # gradients are reduce-scattered in float32, weights all-gathered
    over_dp = trained_parameters(config) * (4 + width(config)) * (dp - 1) / dp * updates
    return Traffic(over_tp / GB, over_pp / GB, over_dp / GB)


def communication_seconds(config: RunConfig, sent: Traffic, device: Device, dp: int) -> float:
    """Seconds to send this traffic without overlap; an axis is as fast as the slowest link that it uses."""
    parallel = config.parallel
    per_node = max(1, config.cluster.tasks_per_node)
    spans = {"tp": parallel.tp, "dp": parallel.tp * dp, "pp": world_size(config)}
    return sum(
        getattr(sent, axis) / (device.nvlink_gb_s if span <= per_node else device.network_gb_s)
        for axis, span in spans.items()
    )
