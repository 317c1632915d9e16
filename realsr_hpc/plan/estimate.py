"""What a recipe will need, before anything is submitted: memory per GPU, pipeline bubble, GPU-hours.

Pure arithmetic on a RunConfig. Memory is counted term by term on the fullest pipeline stage; time follows from
floating-point work and bytes moved at stated shares of the device's peaks (`Device`), so it is an estimate to compare
recipes with, not a promise. Left out: image decoding and rewards, the loader, communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from realsr_hpc.config.checks import VOCABULARY_SIZES, prompt_image_tokens, trace_image_tokens, world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.vlcot.vocabulary import build_vocabulary

GIB = 2**30
LOGIT_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once; see behaviour/logprobs.py."""
FIXED_GIB = 2.0
"""CUDA context, cuBLAS and NCCL buffers on one GPU."""
TEXT_TOKENS_OF_TAGS = 130
"""Tags and degradation phrase of a trace, in tokens of the 7B vocabulary, roughly."""


@dataclass(frozen=True)
class Device:
    """An accelerator and the shares of its peaks that a run is assumed to reach."""

    bf16_tflops: float = 989.0
    bandwidth_tb_s: float = 4.8
    training_share: float = 0.40
    decoding_share: float = 0.45
    fp8_speedup: float = 1.25


H200 = Device()


@dataclass(frozen=True)
class Plan:
    """An estimate; memory in GiB on the fullest GPU."""

    parameters: int
    world_size: int
    dp: int
    memory_gib: dict[str, float]
    limit_gib: float | None
    microbatches: int
    bubble: float
    """Share of a training pass in which a pipeline stage waits."""
    prompt_tokens: int
    response_tokens: int
    rollout_s: float
    training_s: float
    steps: int

    @property
    def total_gib(self) -> float:
        """Sum of the memory terms."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool | None:
        """None where the recipe does not say how large its GPUs are."""
        return None if self.limit_gib is None else self.total_gib <= self.limit_gib

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.steps * (self.rollout_s + self.training_s) * self.world_size / 3600


def plan(config: RunConfig, device: Device = H200) -> Plan:
    """The estimate for a GRPO or SFT recipe; a tokenizer recipe has no sequence model, its figures are 0."""
    parallel, world = config.parallel, world_size(config)
    dp = world // (parallel.tp * parallel.pp)
    prompt, response = sequence_tokens(config)
    sequences = sequences_per_update(config)
    local_tokens = sequences / dp * (prompt + response)
    microbatches = max(1, math.ceil(local_tokens / parallel.microbatch_tokens)) if sequences else 0
    return Plan(
        parameters=parameter_count(config),
        world_size=world,
        dp=dp,
        memory_gib={} if config.task == "tokenizer" else memory_gib(config, dp, microbatches),
        limit_gib=config.cluster.gpu_memory_gib,
        microbatches=microbatches,
        bubble=bubble(parallel.pp, parallel.virtual_pp, microbatches) if microbatches else 0.0,
        prompt_tokens=prompt,
        response_tokens=response,
        rollout_s=rollout_seconds(config, device, dp),
        training_s=training_seconds(config, device, microbatches),
        steps={"grpo": config.grpo.num_steps, "sft": config.sft.num_steps}.get(config.task, 0),
    )


def vocabulary_size(config: RunConfig) -> int:
    """Rows of the embedding."""
    fixed = VOCABULARY_SIZES.get(config.vlcot.vocabulary)
    if fixed:
        return fixed
    text = config.tokenizer_training.text_vocab_size
    return build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, text).size


def parameter_count(config: RunConfig) -> int:
    """Of the policy without the VQ, q/k norms counted as the published weights hold them: one vector for all heads."""
    model = config.model
    return 2 * vocabulary_size(config) * model.hidden_size + model.hidden_size + model.num_layers * _layer(config)


def _layer(config: RunConfig) -> int:
    model = config.model
    head_dim = model.hidden_size // model.num_heads
    kv_size = (model.num_kv_heads or model.num_heads) * head_dim
    attention = 2 * model.hidden_size**2 + 2 * model.hidden_size * kv_size + 4 * head_dim
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def sequence_tokens(config: RunConfig) -> tuple[int, int]:
    """Prompt and full trace, in tokens, texts at their longest."""
    if config.task == "tokenizer":
        return 0, 0
    texts = TEXT_TOKENS_OF_TAGS + 3 * config.vlcot.max_text_tokens
    response = trace_image_tokens(config) + texts
    if config.task == "grpo":
        response = min(response, config.rollout.max_new_tokens)
    return prompt_image_tokens(config) + TEXT_TOKENS_OF_TAGS, response


def sequences_per_update(config: RunConfig) -> int:
    """Sequences of one optimizer update over all data-parallel ranks."""
    if config.task == "grpo":
        return config.grpo.prompts_per_step * config.grpo.group_size
    return config.sft.batch_size if config.task == "sft" else 0


def bubble(pp: int, virtual_pp: int, microbatches: int) -> float:
    """Idle share of (interleaved) 1F1B: (p - 1) / (v m + p - 1)."""
    return (pp - 1) / (virtual_pp * microbatches + pp - 1)


def memory_gib(config: RunConfig, dp: int, microbatches: int) -> dict[str, float]:
    """Terms on the fullest stage."""
    shard = _stage_parameters(config)
    bf16 = config.precision.params == "bf16"
    weight_bytes = 2 if bf16 else 4
    optimizer_bytes = 12 if bf16 else 8  # two moments, and the fp32 master weights of bf16 parameters
    optimizer_ranks = dp if config.parallel.distributed_optimizer else 1
    on_device = 0 if config.optim.cpu_offload else 1
    terms = {
        "weights": shard * weight_bytes,
        "gradients (fp32)": shard * 4,
        "optimizer": on_device * shard * optimizer_bytes / optimizer_ranks,
        "reference": shard * weight_bytes if _has_reference(config) and not config.parallel.reference_offload else 0,
        "activations": activation_bytes(config, microbatches),
        "logits of a chunk": 2 * 4 * LOGIT_CHUNK_TOKENS * vocabulary_size(config) / config.parallel.tp,
        "KV cache": kv_cache_bytes(config),
    }
    fixed = FIXED_GIB if config.cluster.gpus_per_node else 0.0
    return {**{name: count / GIB for name, count in terms.items()}, "context and buffers": fixed}


def _stage_parameters(config: RunConfig) -> float:
    """Of one tensor-parallel rank of the fullest stage: its layers and one of the two vocabulary matrices."""
    parallel = config.parallel
    matrices = 2 if parallel.pp == 1 else 1
    vocabulary = matrices * vocabulary_size(config) * config.model.hidden_size
    return (config.model.num_layers / parallel.pp * _layer(config) + vocabulary) / parallel.tp


def _has_reference(config: RunConfig) -> bool:
    return config.task == "grpo" and config.grpo.kl_beta > 0


def activation_bytes(config: RunConfig, microbatches: int) -> float:
    """Of the first stage, which holds the most microbatches in flight (1F1B: as many as there are stages)."""
    parallel, model = config.parallel, config.model
    tokens = parallel.microbatch_tokens
    width = 2 if config.precision.params == "bf16" else 4
    layers = model.num_layers / parallel.pp
    in_flight = max(1, min(parallel.pp, microbatches))
    interleaving = 1 + (parallel.pp - 1) / (parallel.pp * parallel.virtual_pp) if parallel.virtual_pp > 1 else 1.0
    inputs = model.hidden_size * width / (parallel.tp if parallel.sequence_parallel else 1)
    if parallel.recompute == "full":
        per_token = layers * inputs * in_flight * interleaving + _layer_activation(config, width)
    else:
        per_token = layers * _layer_activation(config, width) * in_flight * interleaving
    return tokens * per_token


def _layer_activation(config: RunConfig, width: int) -> float:
    """Bytes a token of what one layer keeps for its backward pass; attention keeps no scores (fused)."""
    model, parallel = config.model, config.parallel
    kv_share = (model.num_kv_heads or model.num_heads) / model.num_heads
    whole = 4 * model.hidden_size  # inputs of two norms and of the two column-parallel matrices
    attention = (3 + 4 * kv_share) * model.hidden_size  # q, k, v before and after norm and rotation, and the output
    # selective: the gated activation is computed again
    feed_forward = (3 if parallel.recompute == "none" else 2) * model.ffn_hidden_size
    shared = parallel.tp if parallel.sequence_parallel else 1
    return width * (whole / shared + (attention + feed_forward) / parallel.tp)


def kv_cache_bytes(config: RunConfig) -> float:
    """Of one rank while it decodes `rollout.batch_size` rollouts; a group shares its prompt's part."""
    if config.task != "grpo":
        return 0.0
    model, parallel, rollout = config.model, config.parallel, config.rollout
    head_dim = model.hidden_size // model.num_heads
    kv_heads = (model.num_kv_heads or model.num_heads) / parallel.tp
    width = 2 if config.precision.params == "bf16" else 4
    per_token = 2 * kv_heads * head_dim * width * model.num_layers / parallel.pp
    prompt, response = sequence_tokens(config)
    prompts = math.ceil(rollout.batch_size / config.grpo.group_size)
    guided = 2 if rollout.cfg_scale != 1.0 else 1  # the unconditional context is the response's images alone
    return per_token * (prompts * prompt + guided * rollout.batch_size * response)


def training_seconds(config: RunConfig, device: Device, microbatches: int) -> float:
    """One step: forward and backward of every update, the reference's and the old policy's forward, recomputation."""
    prompt, response = sequence_tokens(config)
    length = prompt + response
    tokens = sequences_per_update(config) * length
    if not tokens:
        return 0.0
    model = config.model
    matrices = parameter_count(config) - vocabulary_size(config) * model.hidden_size
    forward = tokens * (2 * matrices + 2 * model.num_layers * model.hidden_size * length)  # causal: half the scores
    passes = 3.0 + (1.0 if config.parallel.recompute == "full" else 0.0)
    updates = config.grpo.updates_per_step if config.task == "grpo" else 1
    work = forward * (passes * updates + (1.0 if _has_reference(config) else 0.0))
    rate = device.bf16_tflops * 1e12 * device.training_share * world_size(config)
    if config.precision.fp8 != "none":
        rate *= device.fp8_speedup
    idle = bubble(config.parallel.pp, config.parallel.virtual_pp, microbatches)
    return work / rate / (1 - idle)


def rollout_seconds(config: RunConfig, device: Device, dp: int) -> float:
    """One step's decoding: every token reads the weights and half of the full cache, at a share of the bandwidth."""
    if config.task != "grpo":
        return 0.0
    _, response = sequence_tokens(config)
    rollouts = sequences_per_update(config) / dp
    batches = math.ceil(rollouts / config.rollout.batch_size)
    width = 2 if config.precision.params == "bf16" else 4
    weights = parameter_count(config) * width / config.parallel.tp
    cache = kv_cache_bytes(config) * config.parallel.pp
    guided = 2 if config.rollout.cfg_scale != 1.0 else 1
    # Stages take turns: a token passes all of them, each reading its own share of the weights.
    token_s = guided * (weights + cache / 2) / (device.bandwidth_tb_s * 1e12 * device.decoding_share)
    return batches * response * token_s
