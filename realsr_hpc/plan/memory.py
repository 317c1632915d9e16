"""Memory of one rank of the fullest pipeline stage: what is resident, and what each phase of a step adds.

Counted tensor by tensor from the code; activations and logits in activations.py, the rest here. `tools/bench.py memory`
compares it with small runs on the CPU; a test requires each term to be within 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from realsr_hpc.config.derived import DRAWN_AT_ONCE, PIXELS_AT_ONCE, pass_tokens, widest_lookahead
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import GIB
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.plan.activations import first_stage, gather_buffer, last_stage, scoring
from realsr_hpc.plan.experts import final_pixels, on_the_device, rewards_of
from realsr_hpc.plan.sizes import (
    MicrobatchShape,
    adapter_parameters,
    dp_size,
    guided,
    has_second_model,
    sequence_tokens,
    sequences_of_a_rank,
    stage_layers,
    stage_parameters,
    trained_parameters,
    truncated,
    vocabulary_size,
    width,
)

FIXED_GIB = 2.5
"""CUDA context, cuBLAS and NCCL buffers, and the image tokenizer's weights on one GPU."""
ENCODER_MAPS, DECODER_MAPS = (4.3, 6.0), (4.0, 6.0)
"""Number of feature maps at the finest level that are alive at once, without and with residual blocks in the encoder.
An encoder without them first reshapes pixels to channels, down to the level before its last."""
SCORES = 2
"""Float32 values per pair of positions in the image tokenizer's attention; no fused kernel supports its head size."""
DISTANCES = 3
"""Float32 values per code and latent while the nearest code is computed."""
SAMPLE_BYTES, CHOSEN_BYTES, CHOSEN_TEXT_BYTES = 18, 32, 24
"""Bytes per logit while a token is sampled: without truncation, an image code with guidance or truncation, and a text
token with truncation; see rollout/choice.py."""


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest GPU in GiB by term, and host memory."""

    resident: dict[str, float]
    """Memory that is allocated for the whole run."""
    phases: dict[str, dict[str, float]]
    """By phase of a step (rollout, images, rewards, score, update): the memory that it adds."""
    host: float
    """Host memory of one process for what the recipe offloads."""

    @property
    def peak_phase(self) -> str:
        """Name of the phase that adds most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """Resident memory and the largest phase, in GiB."""
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())


def memory(config: RunConfig, shape: MicrobatchShape) -> Memory:
    """Memory of a GRPO or SFT recipe whose microbatches have this shape (`microbatch_shape`)."""
    supports = _supports(config, shape)
    ends = [last_stage(config, shape)]
    if config.parallel.pp > 1:
        ends.insert(0, first_stage(config, shape))
    phases = {
        "update": max(ends, key=lambda terms: sum(terms.values())) | {"allowed tokens": supports},
        "images": {"image tokenizer's maps": _images(config)},
    }
    if config.task == "grpo":
        phases["rollout"] = _rollout(config)
        phases["rewards"] = _scoring_images(config)
        offloaded = has_second_model(config) and config.parallel.reference_offload
        weights = stage_parameters(config) * width(config) if offloaded else 0.0
        # microbatches that are scored together are concatenated, which copies their supports
        phases["score"] = {"reference": weights, **scoring(config, shape), "allowed tokens": 2 * supports}
    in_gib = {phase: {name: size / GIB for name, size in terms.items() if size} for phase, terms in phases.items()}
    return Memory(_resident(config, shape), in_gib, _host(config) / GIB)


def _resident(config: RunConfig, shape: MicrobatchShape) -> dict[str, float]:
    shard = stage_parameters(config)
    kept = has_second_model(config) and not config.parallel.reference_offload
    trained = trained_parameters(config)
    terms = {
        "weights": shard * width(config),
        "adapters": adapter_parameters(config) * width(config),
        "gradients (fp32)": trained * 4,
        "optimizer": trained
        * optimizer_bytes(config)[0]
        / (dp_size(config) if config.parallel.distributed_optimizer else 1),
        "reference": shard * width(config) if kept else 0.0,
        "rewards' networks": _networks(config) if on_the_device(config) and not config.rewards.offload else 0.0,
    }
    fixed = FIXED_GIB if config.cluster.gpus_per_node else 0.0
    buffers = fixed + gather_buffer(config, shape) / GIB
    terms = {name: size for name, size in terms.items() if size or name not in ("adapters", "rewards' networks")}
    return {**{name: size / GIB for name, size in terms.items()}, "context and buffers": buffers}


def optimizer_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes per parameter on the device and in host memory: AdamW's moments and, for bf16 parameters, main weights."""
    bf16, lean = config.precision.params == "bf16", config.optim.main_params == "bf16"
    main = (2 if lean else 4) if bf16 else 0
    moments = 4 if lean else 8
    if not config.optim.cpu_offload:
        return main + moments, 0
    # Megatron keeps the float32 main weights on the device and works on a host copy, with its gradient beside it
    return main, 8 + 4 + 4


def _host(config: RunConfig) -> float:
    shard = stage_parameters(config)
    reference = shard * width(config) if has_second_model(config) and config.parallel.reference_offload else 0.0
    on_host = config.cluster.gpus_per_node and (config.rewards.offload or not on_the_device(config))
    experts = _networks(config) if on_host else 0.0
    return (
        reference
        + experts
        + trained_parameters(config)
        * optimizer_bytes(config)[1]
        / (dp_size(config) if config.parallel.distributed_optimizer else 1)
    )


def _networks(config: RunConfig) -> float:
    return rewards_of(config).weight_bytes


def _scoring_images(config: RunConfig) -> dict[str, float]:
    """Bytes by term while one batch of final images is scored; reward terms run one at a time."""
    if not on_the_device(config):
        return {}
    experts, offloaded = rewards_of(config), config.rewards.offload and config.cluster.gpus_per_node
    return {
        "networks": experts.largest_weight_bytes if offloaded else 0.0,
        "networks at work": config.rewards.batch_size * experts.bytes_at_work(final_pixels(config)),
    }


def _rows(config: RunConfig) -> tuple[int, int]:
    """Number of prompts and of rollouts that one rank decodes at once."""
    group = config.grpo.group_size
    prompts = min(max(1, config.rollout.batch_size // group), max(1, config.grpo.prompts_per_step // dp_size(config)))
    return prompts, prompts * group


def kv_cache_bytes(config: RunConfig) -> float:
    """Bytes of one rank's KV cache while it decodes: the longest response for each rollout, the prompt once per
    group."""
    if config.task != "grpo":
        return 0.0
    model, parallel = config.model, config.parallel
    head_dim = model.hidden_size // model.num_heads
    heads = kv_heads(model) / parallel.tp
    per_token = 2 * heads * head_dim * width(config) * model.num_layers / parallel.pp
    prompts, rollouts = _rows(config)
    prompt, _ = sequence_tokens(config)
    # the unconditional context has only the response's images, but its cache is allocated for a whole response
    streams = 2 if guided(config) else 1
    own = config.rollout.max_new_tokens + widest_lookahead(config.rollout)
    return per_token * (prompts * prompt + streams * rollouts * own)


def _rollout(config: RunConfig) -> dict[str, float]:
    model, tp = config.model, config.parallel.tp
    prompts, rollouts = _rows(config)
    streams = 2 if guided(config) else 1
    kv = kv_heads(model) / model.num_heads
    # two residuals and a norm; q, k, v, normalised q, k, the output; gate and up, silu(gate), the product
    attention = ((1 + 2 * kv) + (1 + kv) + 1) * model.hidden_size
    tokens = max(1, prompts // config.parallel.pp) * sequence_tokens(config)[0]  # its batches take turns
    prefill = tokens * width(config) * (3 * model.hidden_size + (attention + 4 * model.ffn_hidden_size) / tp)
    fed = pass_tokens(config.rollout, max(1, rollouts // min(config.parallel.pp, prompts)))
    length = sequence_tokens(config)[0] + config.rollout.max_new_tokens
    attention = fed * model.num_heads / tp * length * (6 + 2 * width(config) + 2 * streams)
    codes = config.image_tokenizer.codebook_size * (CHOSEN_BYTES if streams > 1 or truncated(config) else SAMPLE_BYTES)
    cuts_text = config.rollout.text_top_k > 0 or config.rollout.top_p < 1.0
    text = vocabulary_size(config) * (CHOSEN_TEXT_BYTES if cuts_text else SAMPLE_BYTES)
    sampling = streams * fed * model.hidden_size * width(config) + min(fed, DRAWN_AT_ONCE) * max(codes, text)
    return {
        "KV cache": kv_cache_bytes(config),
        "prefill or pass": max(prefill, attention, sampling),
        "FP8 weights": stage_layers(config) if config.precision.rollout_fp8 else 0.0,
    }


def _supports(config: RunConfig, shape: MicrobatchShape) -> float:
    """Bytes of the supports: for each loss token of a step one bit per token of the vocabulary, whether it was allowed.

    They are collected in host memory during the rollout and are on the device until the update.
    """
    if not truncated(config):
        return 0.0
    return sequences_of_a_rank(config) * shape.loss_tokens_of_a_row * vocabulary_size(config) / 8


def _images(config: RunConfig) -> float:
    """Peak bytes of the float32 image tokenizer: feature maps at full size, distances to all codes, or attention."""
    tokenizer, sizes = config.image_tokenizer, config.vlcot
    grpo, blocks = config.task == "grpo", tokenizer.num_res_blocks > 0
    count = sequences_of_a_rank(config)
    encoded = _pixels(sizes.lq_size_px, max(1, count // config.grpo.group_size) if grpo else count)
    if not grpo:
        encoded = max(encoded, _pixels(sizes.image_sizes_px[-1], count))
    at_once = min(config.rewards.batch_size, count)  # as they are scored; see train/rewarding.py
    decoded = _pixels(sizes.image_sizes_px[-1], at_once if grpo else 0)
    gathered = 1 if blocks else 4 ** max(0, len(tokenizer.channel_multiplier) - 2)
    maps = ENCODER_MAPS[blocks] * tokenizer.base_channels * tokenizer.channel_multiplier[0] / gathered * encoded
    distances = DISTANCES * tokenizer.codebook_size * encoded / tokenizer.downsample**2
    return 4 * max(
        maps, distances, _restored(config, decoded), *(_attention(config, pixels) for pixels in (encoded, decoded))
    )


def _restored(config: RunConfig, pixels: int) -> float:
    """Number of values while so many pixels are decoded: maps of the finest level, latents, and on the CPU one
    convolution's weights twice, which its kernels reorder."""
    tokenizer = config.image_tokenizer
    width = tokenizer.decoder_base * tokenizer.decoder_multiplier[0]
    maps = DECODER_MAPS[tokenizer.num_res_blocks > 0] * width / tokenizer.decoder_output_shuffle**2
    latents = (tokenizer.latent_channels + tokenizer.embed_dim) / tokenizer.downsample**2
    return pixels * (maps + latents) + (0 if config.cluster.gpus_per_node or not pixels else 2 * 9 * width**2)


def _attention(config: RunConfig, pixels: int) -> float:
    """Number of values in attention over `pixels` pixels: scores, softmax and six maps of the lowest resolution."""
    tokenizer, sizes = config.image_tokenizer, config.vlcot
    positions = (max(sizes.lq_size_px, sizes.image_sizes_px[-1]) // tokenizer.downsample) ** 2
    width = tokenizer.base_channels * tokenizer.channel_multiplier[-1]
    return pixels / tokenizer.downsample**2 * (SCORES * positions + 6 * width)


def _pixels(side_px: int, count: int) -> int:
    """Number of pixels that the image tokenizer processes at once, of `count` images."""
    return min(count, max(1, PIXELS_AT_ONCE // side_px**2)) * side_px**2
