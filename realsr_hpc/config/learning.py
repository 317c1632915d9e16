"""Sections of a recipe about sampling, rewards and how the policy learns from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from realsr_hpc.config.section import LAYOUT, OPERATION, POLICY, Count, NonNegative, Positive, Section


class RewardTerm(Section):
    """One reward: its kind, weight and options."""

    kind: Literal["format", "degradation", "understanding", "generation", "fidelity"]
    """Kind of reward; it decides which options are valid."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    final_weight: float | None = None
    """Weight at and after the ramp's end; None: `weight` throughout."""
    ramp_steps: tuple[Annotated[int, Field(ge=0)], Count] | None = None
    """First and last step of the linear change from `weight` to `final_weight`."""
    options: dict[str, float | int | str | bool | list[str]] = {}
    """Options of the kind, listed below."""


class RewardsConfig(Section, tasks=("grpo",)):
    """Rewards by name; the mixture is their weighted sum."""

    terms: dict[str, RewardTerm] = {
        "format": RewardTerm(kind="format"),
        "degradation": RewardTerm(kind="degradation"),
        "understanding": RewardTerm(kind="understanding"),
        "generation": RewardTerm(kind="generation"),
        "fidelity": RewardTerm(kind="fidelity"),
    }
    """Rewards by a name of your choice; each is reported as `rewards/NAME/mean`."""
    gate_malformed: bool = True
    """Give a malformed trace the minimum of each reward that scores its image."""
    batch_size: Annotated[Count, LAYOUT] = 1
    """Rollouts that are decoded to pixels and scored together; it bounds the experts' memory. Batches are distributed
    over the TP x PP ranks of a replica and do not depend on the layout: on a CPU all layouts give bitwise equal
    scores."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OPERATION] = "auto"
    """Device of the reward networks. auto: each rank's own device."""
    offload: Annotated[bool, OPERATION] = False
    """Keep the reward networks in host memory while they are not scoring."""


class RolloutConfig(Section, tasks=POLICY):
    """The sampling distribution; the loss scores with exactly the same one."""

    grammar: Literal["constrained", "modality"] = "modality"
    """constrained: the whole trace; modality: image blocks only, the text around them is free."""
    temperature: Positive = 1.0
    """Divides the logits of image codes, and those of text unless `text_temperature` is set."""
    text_temperature: Positive | None = None
    """Divides the logits of text; None: as `temperature`."""
    text_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample text among its k most probable tokens; 1: greedy, 0: off."""
    image_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample image codes among the k most probable; 0: off."""
    image_adaptive_top_k: bool = False
    """Sample image codes with k = round(1 + 1999 sigmoid(H - 5)), H the entropy in nats (RealSR-R1)."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the smallest set of most probable tokens whose probabilities sum to this; 1: off."""
    cfg_scale: NonNegative = 1.0
    """Classifier-free guidance on image tokens: u + s (c - u); 1: off."""
    max_new_tokens: Count = 640
    """Longest response; a rollout that reaches it is malformed."""
    batch_size: Annotated[Count, LAYOUT] = 64
    """Largest number of rollouts decoded at once on one data-parallel rank."""
    lookahead: Annotated[Annotated[int, Field(ge=1, le=64)] | Literal["auto"], LAYOUT] = "auto"
    """Tokens per row that one decoding pass verifies; the sampled tokens do not change. auto: the fastest number."""


ColourFix = Literal["none", "wavelet", "adain", "back_projection"]


class RestoreConfig(Section, role="operation"):
    """Sampling options for restoring and evaluating; training uses `rollout`. They do not decide a run's result."""

    temperature: Positive = 0.8
    """Divides the logits of image codes; lower than in training, where rollouts explore (values: docs/looking.md)."""
    text_temperature: Positive | None = None
    """Divides the logits of text; None: as `temperature`."""
    image_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample image codes among the k most probable; 0: off."""
    text_top_k: Annotated[int, Field(ge=0)] = 0
    """Sample text among its k most probable tokens; 1: greedy, 0: off."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the smallest set of most probable tokens whose probabilities sum to this; 1: off."""
    cfg_scale: NonNegative | None = None
    """Classifier-free guidance on image tokens; None: as `rollout.cfg_scale`."""
    colour: ColourFix = "none"
    """Correct the final image by its input: `wavelet` and `adain` transfer colours, `back_projection` everything that
    is coarser than an input pixel (values: docs/looking.md)."""


class GRPOConfig(Section, tasks=("grpo",)):
    """Group relative policy optimisation."""

    num_steps: Count = 30
    """Rounds of sampling, scoring and updating."""
    prompts_per_step: Count = 4
    """LQ images per step, over all data-parallel ranks."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts of each prompt; advantages are relative to their group."""
    updates_per_step: Count = 1
    """Optimizer updates per batch of rollouts; importance ratios differ from 1 from the second update on."""
    kl_beta: NonNegative = 0.01
    """Weight of the KL divergence to the frozen reference; 0: no reference is built."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of that divergence (Schulman's k1, k2, k3)."""
    clip_low: Positive | None = 0.2
    """Lower clip: ratios below 1 - clip_low stop contributing to the gradient where the advantage is negative."""
    clip_high: Positive | None = 0.2
    """Upper clip: ratios above 1 + clip_high stop contributing where the advantage is positive. None for both: no
    clipping (the paper's code)."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound on the loss of negative advantages (dual-clip PPO); None: off."""
    aggregation: Literal["token", "sequence", "dr_grpo"] = "token"
    """How token losses are averaged: over all tokens (DAPO), within each rollout first (GRPO), or over a fixed length
    (Dr.GRPO)."""
    importance: Literal["token", "sequence"] = "token"
    """Importance ratio of each token (GRPO), or of the whole sequence, length-normalised (GSPO)."""
    advantage: Literal["mean_std", "mean", "leave_one_out"] = "mean_std"
    """Centre rewards in their group and divide by its standard deviation, only centre them, or subtract the mean of the
    others."""
    unbiased_std: bool = True
    """Divide by n - 1 in the group's standard deviation; false: by n."""
    advantage_epsilon: Positive = 1e-4
    """Added to the group's standard deviation before dividing by it."""
    normalise_each_reward: bool = True
    """Each reward is normalised in its group before weighting (GDPO)."""
    credit: Literal["rollout", "part"] = "rollout"
    """Tokens that get a reward's advantage: all tokens of the rollout (GRPO, the paper), or those of the parts of the
    trace that the reward judges. With part, fidelity and generation score each code of the final image separately,
    where they can, and degradation each slot of the phrase."""
    zero_variance: Literal["drop", "resample", "keep"] = "drop"
    """Groups whose rewards are all equal: drop them, sample other prompts instead, or keep them with advantage 0."""
    max_resample_rounds: Count = 2
    """Largest number of rounds of new prompts with zero_variance=resample; groups still missing then are dropped."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus; negative: a penalty."""
    mismatch_cap: Positive | None = None
    """Truncated importance sampling: cap of exp(policy - rollout log-prob); None: off."""
    mismatch_bounds: tuple[Positive, Positive] | None = None
    """Tokens whose exp(policy - rollout log-prob) is outside are masked out of the policy loss; None: off."""
    mismatch_kl_gate: Annotated[Positive | None, OPERATION] = 1e-3
    """Stop the run if the mean KL(rollout || policy) of a step's first update exceeds this, nats per token. In bf16 it
    grows with depth: 8e-5 at 2 and 8e-4 at 32 layers of a small random policy (docs/behaviour.md)."""
    heldout_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements on held-out images; 0: never."""
    heldout_prompts: Count = 16
    """Number of held-out LQ images; the same ones are measured each time."""
    heldout_rollouts: Count = 2
    """Rollouts of each held-out image, with the same draws each time."""


class SFTConfig(Section, tasks=("sft",)):
    """Supervised fine-tuning on VLCoT traces."""

    num_steps: Count = 2000
    """Optimizer updates."""
    batch_size: Count = 16
    """Traces per optimizer update, over all data-parallel ranks."""
    traces: str | None = None
    """Folder of frozen traces (realsr-hpc freeze-traces) to train on; None: traces are made from photographs."""
    z_loss: NonNegative = 1e-5
    """Weight of the squared log-partition function, which keeps logits from drifting."""
    perception_weight: Positive = 1.0
    """Loss weight of each token before the first image (degradation and rough text); all others weigh 1. Only these few
    tokens describe the input directly, next to hundreds of image codes."""
    own_codes: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the updates whose input image codes are drawn from the policy itself; their targets stay the true codes,
    so that the policy learns to recover from its own errors (scheduled sampling); 0: off."""
    own_codes_passes: Count = 3
    """Largest number of forward passes that draw these codes in parallel; each update draws a number from 1 to this."""
    packing: bool = True
    """Pack several traces into one row up to the token budget; false: one trace per row."""
    heldout_every_steps: Count = 200
    """Updates between measurements of the held-out loss; it is also measured at the end."""
    heldout_traces: Count = 32
    """Held-out traces measured each time."""
    sample_every_steps: Annotated[int, Field(ge=0), OPERATION] = 500
    """Updates between figures of restored held-out images; 0: never."""
