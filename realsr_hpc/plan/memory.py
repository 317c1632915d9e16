"""Memory of one rank of the fullest pipeline stage: what stays, and what each phase of a step adds.

Counted from what the code keeps, tensor by tensor: model/spec.py for activations, rollout/decoder.py for the cache,
behaviour/logprobs.py for logits. Not yet compared with what a run really allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from realsr_hpc.config.checks import world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.sizes import (
    guided,
    has_reference,
    sequence_tokens,
    sequences_per_update,
    stage_layers,
    stage_parameters,
    vocabulary_size,
    width,
)

GIB = 2**30
LOGIT_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once; see behaviour/logprobs.py."""
LOGIT_COPIES = 6
"""float32 tensors of a chunk's logits that its backward pass holds together."""
FIXED_GIB = 2.5
"""CUDA context, cuBLAS and NCCL buffers, and the image tokenizer's weights on one GPU."""
IMAGE_COPIES = 4
"""Full-size feature maps that live together while images are encoded or decoded."""
IMAGE_BATCH_PIXELS = 2**21
"""Pixels that pass the image tokenizer at once; see tokenizer/trace.py."""


@dataclass(frozen=True)
class Memory:
    """GiB of the fullest GPU; host memory apart."""

    resident: dict[str, float]
    """What a run holds all the time."""
    phases: dict[str, dict[str, float]]
    """What each phase of a step adds: rollout, images, score, update."""
    host: float
    """What one process keeps in host memory because a recipe offloads it."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """What stays and the largest phase."""
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())


def memory(config: RunConfig) -> Memory:
    """All terms of a GRPO or SFT recipe."""
    dp = world_size(config) // (config.parallel.tp * config.parallel.pp)
    phases = {"update": _update(config, dp), "images": {"image tokenizer's maps": _images(config)}}
    if config.task == "grpo":
        copies = stage_layers(config) if config.precision.rollout_fp8 else 0.0
        cache = kv_cache_bytes(config)
        phases["rollout"] = {"KV cache": cache, "allowed tokens": _support(config), "FP8 weights": copies}
        phases["score"] = _score(config)
    in_gib = {phase: {name: size / GIB for name, size in terms.items()} for phase, terms in phases.items()}
    return Memory(_resident(config, dp), in_gib, _host(config, dp) / GIB)


def _resident(config: RunConfig, dp: int) -> dict[str, float]:
    shard = stage_parameters(config)
    kept = has_reference(config) and not config.parallel.reference_offload
    terms = {
        "weights": shard * width(config),
        "gradients (fp32)": shard * 4,
        "optimizer": shard * optimizer_bytes(config)[0] / (dp if config.parallel.distributed_optimizer else 1),
        "reference": shard * width(config) if kept else 0.0,
    }
    fixed = FIXED_GIB if config.cluster.gpus_per_node else 0.0
    return {**{name: size / GIB for name, size in terms.items()}, "context and buffers": fixed}


def optimizer_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes a parameter on the device and in host memory: AdamW's moments and, of bf16 parameters, the main weights."""
    bf16, lean = config.precision.params == "bf16", config.optim.main_params == "bf16"
    main = (2 if lean else 4) if bf16 else 0
    moments = 4 if lean else 8
    if not config.optim.cpu_offload:
        return main + moments, 0
    # Megatron keeps the float32 main weights on the device and works on a host copy, with its gradient beside it
    return main, 8 + 4 + 4


def _host(config: RunConfig, dp: int) -> float:
    shard = stage_parameters(config)
    reference = shard * width(config) if has_reference(config) and config.parallel.reference_offload else 0.0
    return reference + shard * optimizer_bytes(config)[1] / (dp if config.parallel.distributed_optimizer else 1)


def microbatches(config: RunConfig, dp: int) -> int:
    """Of one update on one data-parallel rank."""
    tokens = sequences_per_update(config) / dp * sum(sequence_tokens(config)) * (2 if guided(config) else 1)
    return max(1, math.ceil(tokens / config.parallel.microbatch_tokens)) if tokens else 0


def _update(config: RunConfig, dp: int) -> dict[str, float]:
    return {
        "activations": activation_bytes(config, microbatches(config, dp)),
        "attention masks": _mask_bytes(config, microbatches(config, dp)),
        "logits of a chunk": _logit_bytes(config, gradient=True),
    }


def _score(config: RunConfig) -> dict[str, float]:
    offloaded = has_reference(config) and config.parallel.reference_offload
    return {
        "reference": stage_parameters(config) * width(config) if offloaded else 0.0,
        "activations": config.parallel.microbatch_tokens * _layer_bytes(config, "none"),
        "logits of a chunk": _logit_bytes(config, gradient=False),
    }


def _logit_bytes(config: RunConfig, *, gradient: bool) -> float:
    shard = vocabulary_size(config) / config.parallel.tp
    tokens = min(LOGIT_CHUNK_TOKENS, config.parallel.microbatch_tokens)
    logits = tokens * shard * 4 * (LOGIT_COPIES if gradient else LOGIT_COPIES // 2)
    # the output weight's gradient is summed in float32, beside one chunk's share of it and its rounded form
    return logits + (shard * config.model.hidden_size * (4 + 2 * width(config)) if gradient else 0.0)


def _in_flight(config: RunConfig, count: int) -> float:
    """Microbatches whose activations the first stage holds (1F1B: as many as there are stages)."""
    pp, virtual = config.parallel.pp, config.parallel.virtual_pp
    interleaving = 1 + (pp - 1) / (pp * virtual) if virtual > 1 else 1.0
    return max(1, min(pp, count)) * interleaving


def activation_bytes(config: RunConfig, count: int) -> float:
    """Kept for the backward pass by the first stage, with `count` microbatches in an update."""
    parallel, model = config.parallel, config.model
    layers = model.num_layers / parallel.pp * _in_flight(config, count)
    inputs = model.hidden_size * width(config) / (parallel.tp if parallel.sequence_parallel else 1)
    if parallel.recompute == "full":  # each layer's input, and all of the layer that is being computed again
        per_token = layers * inputs + _layer_bytes(config, "none")
    else:
        again = _layer_bytes(config, "none") - _layer_bytes(config, "selective")
        per_token = layers * _layer_bytes(config, parallel.recompute) + (again if parallel.recompute != "none" else 0.0)
    ends = 3 * inputs  # embedding, final norm, hidden states
    return parallel.microbatch_tokens * (per_token + ends)


def _layer_bytes(config: RunConfig, recompute: str) -> float:
    """Bytes a token of what one layer keeps for its backward pass; attention keeps no scores (fused)."""
    model, parallel = config.model, config.parallel
    kv = (model.num_kv_heads or model.num_heads) / model.num_heads
    whole = 4 * model.hidden_size  # inputs of two norms and of the two column-parallel matrices
    # q, k, v; normalised q, k; rotated q, k; the output in attention's layout and in that of the projection
    attention = ((1 + 2 * kv) + (1 + kv) + (1 + kv) + 2) * model.hidden_size
    # gate and up, silu(gate), their product; "selective" computes the whole MLP again
    feed_forward = 4 * model.ffn_hidden_size if recompute == "none" else 0
    shared = parallel.tp if parallel.sequence_parallel else 1
    return width(config) * (whole / shared + (attention + feed_forward) / parallel.tp)


def _mask_bytes(config: RunConfig, count: int) -> float:
    """Packed or guided rows need a mask, which attention turns into numbers and keeps, layer by layer."""
    packed = config.task == "sft" and config.sft.packing
    if not (packed or guided(config)):
        return 0.0
    row = config.parallel.microbatch_tokens if packed else sum(sequence_tokens(config))
    rows = max(1, config.parallel.microbatch_tokens // row)
    layers = 1.0 if config.parallel.recompute == "full" else config.model.num_layers / config.parallel.pp
    return rows * row**2 * (1 + layers * _in_flight(config, count) * width(config))


def _rows(config: RunConfig) -> tuple[int, int]:
    """Prompts and rollouts that are decoded at once on one rank."""
    dp = world_size(config) // (config.parallel.tp * config.parallel.pp)
    group = config.grpo.group_size
    prompts = min(max(1, config.rollout.batch_size // group), max(1, config.grpo.prompts_per_step // dp))
    return prompts, prompts * group


def kv_cache_bytes(config: RunConfig) -> float:
    """Of one rank while it decodes; room for the longest response, a group shares its prompt's part."""
    if config.task != "grpo":
        return 0.0
    model, parallel = config.model, config.parallel
    head_dim = model.hidden_size // model.num_heads
    kv_heads = (model.num_kv_heads or model.num_heads) / parallel.tp
    per_token = 2 * kv_heads * head_dim * width(config) * model.num_layers / parallel.pp
    prompts, rollouts = _rows(config)
    prompt, _ = sequence_tokens(config)
    # the unconditional context is the response's images alone, but its room is that of a response
    streams = 2 if guided(config) else 1
    return per_token * (prompts * prompt + streams * rollouts * config.rollout.max_new_tokens)


def _support(config: RunConfig) -> float:
    """What truncation allowed at each position, a bit a token of the vocabulary, once a step and once joined."""
    rollout = config.rollout
    if not (rollout.image_adaptive_top_k or rollout.image_top_k or rollout.text_top_k or rollout.top_p < 1.0):
        return 0.0
    return 2 * _rows(config)[1] * rollout.max_new_tokens * vocabulary_size(config) / 8


def _images(config: RunConfig) -> float:
    """The image tokenizer runs in float32; its feature maps at full size are the largest."""
    side = max(*config.vlcot.image_sizes_px, config.vlcot.lq_size_px)
    pixels = max(side**2, min(IMAGE_BATCH_PIXELS, sequences_per_update(config) * side**2))
    shuffle = config.image_tokenizer.decoder_output_shuffle**2
    channels = max(config.image_tokenizer.base_channels, config.image_tokenizer.decoder_base / shuffle)
    return IMAGE_COPIES * pixels * channels * 4
