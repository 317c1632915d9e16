"""The whole recipe as one typed, closed, frozen tree.

A default is set here, in `learning.py` or in `operation.py`, and nowhere else. Unknown keys, wrong types and values out
of range fail in `RunConfig.model_validate`, all in one message, each with its path. Rules across sections are in
`checks.py` and `execution_checks.py`. This file imports neither torch nor Hydra, so that launching stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from realsr_hpc.config.learning import GRPOConfig, RestoreConfig, RewardsConfig, RolloutConfig, SFTConfig
from realsr_hpc.config.operation import CheckpointConfig, ClusterConfig, TrackingConfig
from realsr_hpc.config.section import (
    LAYOUT,
    OPERATION,
    POLICY,
    Count,
    NonNegative,
    Positive,
    Probability,
    Section,
    Task,
    read_by,
)

GROUPS = ("model", "data", "rewards", "parallel", "cluster", "profile")
"""Folders of recipes/ with ready-made sections, chosen by an override such as `model=7b`."""
IMAGE_PLACEHOLDER = "<|image|>"
INSTRUCTION = (
    "Perceive the degradation, understand the image content, and restore the high-quality image step by step "
    "(simulating the image restoration process from coarse to fine). The low-quality image is as follows: <|image|>. "
    "The generation format should be as follows: <degradation>...</degradation>"
    "<rough_understand>...</rough_understand><rough_image>...</rough_image>"
    "<middle_understand>...</middle_understand><middle_image>...</middle_image>"
    "<final_understand>...</final_understand><final_image>...</final_image>"
)
"""The released code's prompt (RealSR-R1)."""


class VLCoTConfig(Section, tasks=POLICY):
    """Shape of a prompt and a trace: the instruction, three texts, three images."""

    vocabulary: Literal["tiny", "chameleon_f16", "llamagen_f8"] = "tiny"
    """Token layout: `tiny` follows from the two tokenizers; `chameleon_f16` is Chameleon's, `llamagen_f8` adds a second
    block of image codes to it (the paper's)."""
    image_sizes_px: tuple[Count, Count, Count] = (32, 64, 128)
    """Side of the rough, middle and final image; multiples of 32 (the size tokens' unit)."""
    lq_size_px: Count = 64
    """Side to which the LQ image is resized for the prompt; a multiple of 32."""
    upscale: Count = 4
    """Side of the truth divided by the side of the LQ image."""
    instruction: Annotated[str, read_by(*get_args(Task))] = INSTRUCTION
    """Prompt text; `<|image|>` marks the position of the LQ image."""
    max_text_tokens: Count = 48
    """Longest free text of one understanding field."""
    text_slots: Annotated[tuple[Count, Count, Count] | None, read_by("sft")] = None
    """Number of tokens to which each text of a training trace is padded with blanks. Images then begin at the same
    position in every trace, so that a small model can learn which positions to attend to. A longer text loses its last
    words, which is counted (`sft/shortened_texts/total`). None: texts keep their length (the paper)."""


class ImageTokenizerConfig(Section):
    """VQ encoder and decoder; the names follow transformers' `ChameleonVQVAEConfig`."""

    weights: Annotated[str, read_by(*POLICY)] = "recipes/assets/tiny/image_tokenizer.safetensors"
    """safetensors file with encoder, codebook and decoder."""
    downsample: Count = 8
    """Image pixels per code along one side (f)."""
    codebook_size: Count = 4096
    """Number of codes."""
    embed_dim: Count = 16
    """Dimension of a code vector: features are projected to it and the nearest code is chosen."""
    latent_channels: Count = 64
    """Channels between encoder and `quant_conv`."""
    base_channels: Count = 128
    """Encoder channels at full resolution, before `channel_multiplier`."""
    channel_multiplier: tuple[Count, ...] = (1, 1, 1, 1)
    """Channels of each encoder level relative to `base_channels`, finest first; each but the last halves the side."""
    num_res_blocks: Annotated[int, Field(ge=0)] = 0
    """Number of residual blocks per encoder level (the decoder has one more); 0 is the cheapest and needs channel
    multipliers of 1."""
    decoder_base_channels: Count | None = 64
    """Decoder channels at full resolution, before `decoder_channel_multiplier`; None: as the encoder."""
    decoder_norm: bool = False
    """Group normalisation in the decoder (taming); without it a narrow decoder keeps brightness and colour."""
    decoder_patch_out: bool = True
    """Add the decoder's output to a linear projection of each latent to its patch; false: the decoder alone
    (taming)."""
    decoder_channel_multiplier: tuple[Count, ...] | None = (2, 2)
    """Channels of each decoder level relative to `decoder_base_channels`, finest first; None: as the encoder."""
    decoder_output_shuffle: Count = 4
    """The decoder ends at 1/s of the image size and emits s x s sub-pixels; 1: taming's full-size last level."""
    normalised_codes: bool = False
    """Codes and features are compared after l2 normalisation (LlamaGen VQ-8)."""
    attention: Literal["middle", "lowest"] = "middle"
    """middle: self-attention in the middle blocks only (Chameleon); lowest: also after every residual block of the
    lowest resolution, in encoder and decoder (LlamaGen)."""

    @property
    def decoder_base(self) -> int:
        """Base channels of the decoder."""
        return self.decoder_base_channels or self.base_channels

    @property
    def decoder_multiplier(self) -> tuple[int, ...]:
        """Channel multipliers of the decoder's levels, finest first."""
        return self.decoder_channel_multiplier or self.channel_multiplier


class TextTokenizerConfig(Section):
    """Byte-pair encoding through the `tokenizers` library."""

    path: Annotated[str, read_by(*POLICY)] = "recipes/assets/tiny/text_tokenizer.json"
    """`tokenizer.json` of the `tokenizers` library."""


class TokenizerTrainingConfig(Section, tasks=("tokenizer",)):
    """Training of the image tokenizer and the text vocabulary."""

    num_steps: Count = 6000
    """Optimizer updates."""
    batch_size: Count = 16
    """Images per optimizer update."""
    crop_px: Count = 128
    """Side of the training crops."""
    lr: Positive = 1e-3
    """Peak learning rate; it decays to 2 % of the peak on a cosine schedule."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises from 0."""
    commitment_weight: NonNegative = 0.25
    """Weight of the commitment loss, which pulls features to their codes."""
    gradient_weight: NonNegative = 1.0
    """Weight of the multi-scale gradient loss relative to L1 and L2."""
    codebook_decay: Probability = 0.99
    """Decay of the codes' exponential moving averages, per update."""
    start_batches: Count = 40
    """Batches that the start weights are computed from: principal components, k-means, least squares."""
    freeze_encoder: bool = False
    """Keep encoder and codebook as computed at the start and train only the decoder. With many codes, a small batch has
    too few samples of each to update a codebook; and with fixed codes a policy can be trained before the decoder is."""
    dead_leaves_share: Probability = 0.25
    """Share of training images that are generated shapes; images that are neither shapes nor signs are crops of
    photographs."""
    signs_share: Probability = 0.0
    """Share of training images that are generated signs, whose letters must stay legible in the reconstruction."""
    degraded_share: Probability = 0.2
    """Share of images that are degraded first: the tokenizer also encodes LQ images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions in bfloat16 (autocast), several times faster on CPUs with AMX; codes are chosen in fp32."""
    text_vocab_size: Count = 768
    """Size of the byte-pair vocabulary, which is trained in the same run."""
    log_every_steps: Count = 100
    """Updates between two reports of the metrics."""


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAConfig(Section, tasks=POLICY):
    """Low-rank adapters: only they are trained, the weights stay frozen."""

    rank: Count = 16
    """Inner width of an adapter."""
    alpha: Positive = 32.0
    """An adapter's product is scaled by alpha / rank."""
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = get_args(Projection)
    """Projections that get an adapter, by their Hugging Face names."""
    weights: str | None = None
    """Start adapters: a PEFT folder (adapter_model.safetensors); None: new adapters, whose output is 0 at first."""


class ModelConfig(Section, tasks=POLICY):
    """The policy, a decoder-only transformer with Chameleon's architecture."""

    num_layers: Count = 4
    """Transformer layers."""
    hidden_size: Count = 256
    """Width of the residual stream."""
    num_heads: Count = 4
    """Attention heads; the head dimension is `hidden_size / num_heads`."""
    num_kv_heads: Count | None = None
    """Grouped-query attention when smaller than `num_heads`; None: as many as heads."""
    ffn_hidden_size: Count = 688
    """Inner width of the SwiGLU feed-forward layers."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of RMSNorm and of the query/key LayerNorm."""
    swin_norm: bool = False
    """Apply RMSNorm to the outputs of attention and MLP (Chameleon 30B) instead of to their inputs."""
    init_std: Positive = 0.02
    """Standard deviation of random initial weights."""
    max_sequence_tokens: Count = 1024
    """Largest number of tokens of prompt and response together."""
    weights: str | None = None
    """Start weights: a Hugging Face export folder; None: random. A run's own checkpoint takes precedence."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters instead of the weights: `{rank: 16, alpha: 32}`; None: train all weights."""


class ParallelConfig(Section, role="layout", tasks=POLICY):
    """Parallel layout. The data-parallel size is the world size / (tp x pp)."""

    tp: Count = 1
    """Tensor-parallel ranks: each holds a slice of every layer."""
    pp: Count = 1
    """Pipeline stages: each holds consecutive layers."""
    virtual_pp: Count = 1
    """Number of model chunks per pipeline stage (interleaved 1F1B); 1: no interleaving."""
    sequence_parallel: bool = False
    """Shard norms and residuals along the sequence over the tensor-parallel ranks; needs tp > 1."""
    microbatch_tokens: Count = 4096
    """Token budget of one microbatch on one data-parallel rank, padding included. As many rollouts of a GRPO group as
    fit share one copy of their prompt."""
    scoring_microbatches: Annotated[Count, read_by("grpo")] = 4
    """Number of microbatches that the reference scores at once; without gradients it stores no activations."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, those of the MLPs (selective), or all (full)."""
    reference_offload: Annotated[bool, OPERATION] = False
    """Keep the frozen reference in host memory between its uses."""
    distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks (ZeRO 1)."""
    decode_graphs: bool = False
    """Replay decode steps from CUDA graphs, one for each 128 cached tokens. Needs pp = 1; not tried on a GPU yet."""


class PrecisionConfig(Section, tasks=POLICY):
    """Number formats of training and of rollouts."""

    params: Literal["fp32", "bf16"] = "fp32"
    """Number format of weights and activations; the optimizer keeps float32."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """Scaling recipe of FP8 matrix products in training (Transformer Engine's names); none: no FP8."""
    fp8_format: Literal["e4m3", "hybrid"] = "hybrid"
    """e4m3 everywhere, or e4m3 forward and e5m2 for gradients."""
    fp8_backend: Literal["transformer_engine", "emulated"] = "transformer_engine"
    """emulated: operands are rounded to FP8 and multiplied in bf16. The same numerics, no speed, on any machine."""
    rollout_fp8: bool = False
    """Rollouts multiply FP8 copies of the weights (one scale per row), independently of training's format."""
    first_last_layers_bf16: bool = True
    """Compute the first and the last layer in bf16 instead of FP8."""
    fp8_gate_logprob: Positive = 0.1
    """Largest mean |log-prob(FP8) - log-prob(bf16)| on a fixed batch, nats per token."""
    fp8_gate_every_steps: Annotated[int, Field(ge=0)] = 50
    """Steps between checks of the gate; the first check is before the first step. 0: no further checks."""
    fp8_gate_action: Literal["bf16", "stop"] = "bf16"
    """Action above `fp8_gate_logprob`: continue in bf16, or stop the run."""


class OptimConfig(Section, tasks=POLICY):
    """AdamW with warm-up."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning-rate schedule after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: Probability = 0.9
    """Decay of the gradient's running mean."""
    beta2: Probability = 0.95
    """Decay of the squared gradient's running mean."""
    epsilon: Positive = 1e-8
    """Added to the denominator of the update."""
    clip_grad_norm: Positive = 1.0
    """Largest global norm of the gradients; larger ones are scaled down to it."""
    max_skipped_in_a_row: Annotated[Count, OPERATION] = 5
    """Stop the run after this many consecutive non-finite gradients; each update is skipped and its batch kept."""
    cpu_offload: Annotated[bool, LAYOUT] = False
    """Keep Adam's states and its arithmetic in host memory (Megatron's hybrid optimizer); costs two copies per step."""
    main_params: Literal["fp32", "bf16"] = "fp32"
    """bf16: main weights as the bf16 weights plus their 16-bit remainders (no bit is lost), Adam's moments in bf16:
    6 instead of 12 bytes per parameter. Needs Transformer Engine's optimizer."""


class DataConfig(Section):
    """Photographs to train and measure on, and how they are loaded."""

    manifest: str = "recipes/assets/photographs/manifest.parquet"
    """Parquet manifest of photographs, as `realsr-hpc prepare-data` writes it."""
    train_split: str = "train"
    """Split of the manifest that is trained on."""
    heldout_split: str = "heldout"
    """Split of the manifest for measurements; it is never trained on."""
    mode: Annotated[Literal["unpaired", "paired", "lq_only"], read_by(*POLICY)] = "unpaired"
    """unpaired: photographs, degraded on the fly; paired: LQ images with their truths; lq_only: LQ images only."""
    num_threads: Annotated[Count, OPERATION] = 1
    """Threads that decode and degrade, per process."""
    prefetch: Annotated[Count, OPERATION] = 1
    """Number of batches prepared ahead."""
    min_scene_fraction: Annotated[Probability, read_by(*POLICY)] = 0.7
    """Smallest crop, as a share of the photograph's shorter side, before resizing to the GT size."""
    hflip: Annotated[Probability, read_by(*POLICY)] = 0.5
    """Probability that a crop is mirrored left to right."""


APPLIED_EDGES = tuple(
    f"{number}_{stage}"
    for number in ("blur_sigma", "gaussian_sigma", "jpeg_quality", "poisson_level", "sinc_omega")
    for stage in ("first", "second")
)
"""Keys of `degradation.severity_edges` with labels=applied; each takes two ascending values in its own unit."""
VISIBLE_EDGES = ("blur_px", "noise_rms", "compression_rms")
"""Keys of `degradation.severity_edges` with labels=visible: LQ pixels, and levels on 0..255 (data/visible.py)."""


class DegradationConfig(Section, tasks=POLICY):
    """Second-order degradation (Real-ESRGAN, Wang et al. 2021)."""

    preset: Literal["realesrgan", "seesr"] = "realesrgan"
    """Ranges that parameters are drawn from: Real-ESRGAN's x4plus training, or SeeSR's milder ones."""
    usm_sharpen_gt: bool = True
    """Sharpen truths with an unsharp mask, as Real-ESRGAN does."""
    labels: Literal["visible", "applied"] = "visible"
    """The labels describe the damage still visible in the LQ image, or the parameters that were drawn."""
    severity_edges: dict[str, tuple[float, float]] = {}
    """Limits between light, medium and heavy by name. Default with labels=visible: terciles of the values that the
    preset gives at the recipe's sizes; with labels=applied: terciles of each range."""


class RunConfig(Section):
    """One whole run: everything that decides its result."""

    name: Annotated[str, OPERATION]
    """First part of the run folder's name, and the run's name in MLflow."""
    task: Task
    """Which training loop runs; it decides which sections are read."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random stream: data order, crops, degradations, initial weights, sampling."""
    output_root: Annotated[str, OPERATION] = "runs"
    """Folder of all runs; relative paths start at the project."""
    vlcot: VLCoTConfig = VLCoTConfig()
    image_tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    text_tokenizer: TextTokenizerConfig = TextTokenizerConfig()
    tokenizer_training: TokenizerTrainingConfig = TokenizerTrainingConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    degradation: DegradationConfig = DegradationConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    restore: RestoreConfig = RestoreConfig()
    grpo: GRPOConfig = GRPOConfig()
    sft: SFTConfig = SFTConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
