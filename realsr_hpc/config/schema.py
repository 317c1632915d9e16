"""The whole recipe as one typed, closed, frozen tree.

A default lives here, or in `operation.py` for where a run executes, and nowhere else. Unknown keys, wrong types and
values out of range fail in `RunConfig.model_validate`, all of them in one message, each with its path. Rules that need
two sections stand in `checks.py` and `execution_checks.py`. This file imports neither torch nor Hydra, so that
launching stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from realsr_hpc.config.operation import CheckpointConfig, ClusterConfig, TrackingConfig
from realsr_hpc.config.section import (
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

IMAGE_PLACEHOLDER = "<|image|>"
INSTRUCTION = (
    "Perceive the degradation, understand the image content, and restore the high-quality image step by step "
    "(simulating the image restoration process from coarse to fine). The low-quality image is as follows: <|image|>. "
    "The generation format should be as follows: <degradation>...</degradation>"
    "<rough_understand>...</rough_understand><rough_image>...</rough_image>"
    "<middle_understand>...</middle_understand><middle_image>...</middle_image>"
    "<final_understand>...</final_understand><final_image>...</final_image>"
)
"""The released code's prompt (PAPER section 1)."""


class VLCoTConfig(Section, tasks=POLICY):
    """Shape of a trace: PAPER prompt, three texts, three images."""

    vocabulary: Literal["tiny", "chameleon_f16", "llamagen_f8"] = "tiny"
    image_sizes_px: tuple[Count, Count, Count] = (32, 64, 128)
    """Side of the rough, middle and final image; multiples of 32 (the size tokens' unit)."""
    lq_size_px: Count = 64
    """Side at which the LQ image is shown in the prompt; a multiple of 32."""
    upscale: Count = 4
    instruction: Annotated[str, read_by(*get_args(Task))] = INSTRUCTION
    """Prompt text; `<|image|>` marks where the LQ image stands."""
    max_text_tokens: Count = 48
    """Longest free text of one understanding field."""
    text_slots: Annotated[tuple[Count, Count, Count] | None, read_by("sft")] = None
    """Training traces: tokens that each text is filled up to with blanks. Images then begin at the same place in every
    trace, and a small model learns where to look; None: texts as they are (the paper)."""


class ImageTokenizerConfig(Section):
    """VQ encoder and decoder; the names follow transformers' `ChameleonVQVAEConfig`."""

    weights: Annotated[str, read_by(*POLICY)] = "recipes/assets/tiny/image_tokenizer.safetensors"
    downsample: Count = 8
    codebook_size: Count = 1024
    embed_dim: Count = 8
    """Features a code is chosen by."""
    latent_channels: Count = 64
    """Channels between encoder and `quant_conv`."""
    base_channels: Count = 128
    channel_multiplier: tuple[Count, ...] = (1, 1, 1, 1)
    num_res_blocks: Annotated[int, Field(ge=0)] = 0
    """Residual blocks an encoder level (the decoder has one more); 0 is the cheapest, and needs multipliers of 1."""
    decoder_base_channels: Count | None = 64
    """None: as the encoder."""
    decoder_norm: bool = False
    """Group normalisation in the decoder (taming); without it a narrow decoder keeps brightness and colour."""
    decoder_patch_out: bool = True
    """The decoder adds to a linear reading of each latent's patch; false: taming's."""
    decoder_channel_multiplier: tuple[Count, ...] | None = (1, 1, 2)
    """From the finest level down; None: as the encoder."""
    decoder_output_shuffle: Count = 2
    """The decoder ends at 1/s of the image size and emits s x s sub-pixels; 1: taming's full-size last level."""
    normalised_codes: bool = False
    """Codes and features are compared after l2 normalisation (LlamaGen VQ-8)."""

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


class TokenizerTrainingConfig(Section, tasks=("tokenizer",)):
    """Recipe tokenizer_tiny: how the VQ is trained."""

    num_steps: Count = 6000
    batch_size: Count = 16
    crop_px: Count = 128
    lr: Positive = 1e-3
    warmup_steps: int = 100
    commitment_weight: NonNegative = 0.25
    gradient_weight: NonNegative = 1.0
    """Weight of the multi-scale gradient loss beside L1 and L2."""
    codebook_decay: Probability = 0.99
    dead_leaves_share: Probability = 0.25
    """Share of generated images; the rest are crops of the manifest's training photographs."""
    degraded_share: Probability = 0.2
    """Share of images that are degraded first: the tokenizer also encodes LQ images."""
    text_vocab_size: Count = 768
    log_every_steps: Count = 100


class ModelConfig(Section, tasks=POLICY):
    """Chameleon-shaped decoder (PAPER section 2)."""

    num_layers: Count = 4
    hidden_size: Count = 256
    num_heads: Count = 4
    num_kv_heads: Count | None = None
    """Grouped-query attention when smaller than `num_heads`; None: as many as heads."""
    ffn_hidden_size: Count = 688
    rope_theta: Positive = 10000.0
    norm_epsilon: Positive = 1e-5
    init_std: Positive = 0.02
    max_sequence_tokens: Count = 1024
    weights: str | None = None
    """Start weights: a Hugging Face export folder; None: random (a run's own checkpoint goes before)."""


class ParallelConfig(Section, role="layout", tasks=POLICY):
    """Layout; data parallelism is what the world size leaves."""

    tp: Count = 1
    pp: Count = 1
    virtual_pp: Count = 1
    """Model chunks a pipeline stage holds (interleaved 1F1B); 1: none."""
    sequence_parallel: bool = False
    microbatch_tokens: Count = 4096
    """Token budget of one microbatch on one data-parallel rank, padding included. Of a GRPO group as many rollouts
    share one copy of their prompt as it holds."""
    scoring_microbatches: Annotated[Count, read_by("grpo")] = 4
    """Microbatches that the reference scores at once: without gradients it keeps no activations."""
    recompute: Literal["none", "selective", "full"] = "none"
    reference_offload: Annotated[bool, OPERATION] = False
    """Keep the frozen reference in host memory between its uses."""
    distributed_optimizer: bool = True
    decode_graphs: bool = False
    """Replay decode steps from CUDA graphs, one for each 128 cached tokens. Needs pp = 1; not tried on a GPU yet."""


class PrecisionConfig(Section, tasks=POLICY):
    """Number formats of training and of rollouts."""

    params: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    fp8_format: Literal["e4m3", "hybrid"] = "hybrid"
    fp8_backend: Literal["transformer_engine", "emulated"] = "transformer_engine"
    """emulated: operands are rounded to FP8 and multiplied in bf16. The same numerics, no speed, on any machine."""
    rollout_fp8: bool = False
    """Rollouts multiply FP8 copies of the weights (one scale a row), whatever training does."""
    first_last_layers_bf16: bool = True
    fp8_gate_logprob: Positive = 0.1
    """Largest mean |log-prob(FP8) - log-prob(bf16)| on a fixed batch, nats a token."""
    fp8_gate_every_steps: Annotated[int, Field(ge=0)] = 50
    """The gate is asked before the first step and then this often; 0: only before."""
    fp8_gate_action: Literal["bf16", "stop"] = "bf16"
    """What a closed gate does: go on in bf16 from there, or stop the run."""


class OptimConfig(Section, tasks=POLICY):
    """AdamW with warm-up."""

    lr: Positive = 1e-4
    min_lr: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    epsilon: Positive = 1e-8
    clip_grad_norm: Positive = 1.0
    max_skipped_in_a_row: Count = 5
    """Stop the run after so many updates in a row whose gradient was not finite; each is skipped, its batch kept."""
    cpu_offload: bool = False
    """Adam's states and arithmetic in host memory (Megatron's hybrid optimizer); slower by two copies a step."""
    main_params: Literal["fp32", "bf16"] = "fp32"
    """bf16: main weights as the bf16 weights plus their 16-bit remainders (no bit is lost), Adam's moments in bf16:
    6 instead of 12 bytes a parameter. Needs Transformer Engine's optimizer."""


class DataConfig(Section):
    """Manifest and loader."""

    manifest: str = "recipes/assets/photographs/manifest.parquet"
    train_split: str = "train"
    heldout_split: str = "heldout"
    mode: Annotated[Literal["unpaired", "paired", "lq_only"], read_by(*POLICY)] = "unpaired"
    num_threads: Annotated[Count, OPERATION] = 1
    prefetch: Annotated[Count, OPERATION] = 1
    min_scene_fraction: Annotated[Probability, read_by(*POLICY)] = 0.7
    """Smallest crop, as a share of the photograph's shorter side, before resizing to the GT size."""
    hflip: Annotated[Probability, read_by(*POLICY)] = 0.5


SEVERITY_EDGES = tuple(
    f"{number}_{stage}"
    for number in ("blur_sigma", "gaussian_sigma", "jpeg_quality", "poisson_level", "sinc_omega")
    for stage in ("first", "second")
)
"""Keys of `degradation.severity_edges`; each takes two ascending values in the number's own unit."""


class DegradationConfig(Section, tasks=POLICY):
    """Second-order degradation (PAPER section 3)."""

    preset: Literal["realesrgan", "seesr"] = "realesrgan"
    usm_sharpen_gt: bool = True
    severity_edges: dict[str, tuple[float, float]] = {}
    """Overrides of the light|medium|heavy edges by parameter name; default: terciles of each range."""


class RewardTerm(Section):
    """One reward: its kind, weight and options."""

    kind: Literal["format", "degradation", "understanding", "generation", "fidelity"]
    weight: float = 1.0
    final_weight: float | None = None
    """Weight at and after the ramp's end; None: `weight` throughout."""
    ramp_steps: tuple[Annotated[int, Field(ge=0)], Count] | None = None
    """Steps between which the weight goes linearly from `weight` to `final_weight`."""
    options: dict[str, float | int | str | bool | list[str]] = {}


class RewardsConfig(Section, tasks=("grpo",)):
    """Rewards by name; the mixture is their weighted sum."""

    terms: dict[str, RewardTerm] = {
        "format": RewardTerm(kind="format"),
        "degradation": RewardTerm(kind="degradation"),
        "understanding": RewardTerm(kind="understanding"),
        "generation": RewardTerm(kind="generation"),
        "fidelity": RewardTerm(kind="fidelity"),
    }
    gate_malformed: bool = True
    """Image rewards of a malformed trace are the term's minimum."""


class RolloutConfig(Section, tasks=POLICY):
    """The sampling distribution; the loss scores with exactly the same one."""

    grammar: Literal["constrained", "modality"] = "modality"
    """constrained: the whole trace; modality: image blocks only, the text around them is free."""
    temperature: Positive = 1.0
    text_temperature: Positive | None = None
    text_top_k: Annotated[int, Field(ge=0)] = 0
    image_top_k: Annotated[int, Field(ge=0)] = 0
    image_adaptive_top_k: bool = False
    """k = round(1 + 1999 sigmoid(H - 5)), H the entropy in nats (PAPER section 1)."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    cfg_scale: NonNegative = 1.0
    """Classifier-free guidance on image tokens: u + s (c - u); 1: off."""
    max_new_tokens: Count = 640
    batch_size: Count = 64
    """Rollouts decoded at once on one data-parallel rank."""


class RestoreConfig(Section, role="operation"):
    """What restoring and evaluating sample from; training has `rollout`. Does not decide a run's result."""

    temperature: Positive = 0.8
    """Of image codes; lower is calmer: rollouts explore, a result should not (docs/looking.md has measured values)."""
    text_temperature: Positive | None = None
    """None: as `temperature`."""
    image_top_k: Annotated[int, Field(ge=0)] = 0
    text_top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    cfg_scale: NonNegative | None = None
    """None: as the rollouts'."""


class GRPOConfig(Section, tasks=("grpo",)):
    """Group relative policy optimisation."""

    num_steps: Count = 30
    prompts_per_step: Count = 4
    group_size: Annotated[int, Field(ge=2)] = 8
    updates_per_step: Count = 1
    """Optimizer updates on one batch of rollouts (real ratios from the second on)."""
    kl_beta: NonNegative = 0.01
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    clip_low: Positive | None = 0.2
    clip_high: Positive | None = 0.2
    """None on both: no clipping (the paper's released code)."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    aggregation: Literal["token", "sequence", "dr_grpo"] = "token"
    importance: Literal["token", "sequence"] = "token"
    """sequence: GSPO's length-normalised sequence ratio."""
    advantage: Literal["mean_std", "mean", "leave_one_out"] = "mean_std"
    unbiased_std: bool = True
    advantage_epsilon: Positive = 1e-4
    normalise_each_reward: bool = True
    """Each reward is normalised in its group before weighting (GDPO)."""
    zero_variance: Literal["drop", "resample", "keep"] = "drop"
    max_resample_rounds: Count = 2
    entropy_weight: float = 0.0
    mismatch_cap: Positive | None = None
    """Truncated importance sampling: cap of exp(policy - rollout log-prob); None: off."""
    mismatch_bounds: tuple[Positive, Positive] | None = None
    """Tokens whose exp(policy - rollout log-prob) lies outside take no part in the policy loss; None: off."""
    mismatch_kl_gate: Positive | None = 1e-3
    """Stop the run when the mean KL(rollout || policy) of the first update exceeds this, nats a token."""
    heldout_every_steps: Annotated[int, Field(ge=0)] = 0
    heldout_prompts: Count = 16
    heldout_rollouts: Count = 2


class SFTConfig(Section, tasks=("sft",)):
    """Supervised fine-tuning on VLCoT traces."""

    num_steps: Count = 2000
    batch_size: Count = 16
    """Traces an optimizer step, over all data-parallel ranks."""
    traces: str | None = None
    """Folder of frozen traces (tools/freeze_traces.py) to train on; None: they are made of photographs in each step."""
    z_loss: NonNegative = 1e-5
    packing: bool = True
    heldout_every_steps: Count = 200
    heldout_traces: Count = 32
    sample_every_steps: Annotated[int, Field(ge=0)] = 500


class RunConfig(Section):
    """One whole run: everything that decides its result."""

    name: Annotated[str, OPERATION]
    task: Task
    seed: Annotated[int, Field(ge=0)] = 0
    output_root: Annotated[str, OPERATION] = "runs"
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
