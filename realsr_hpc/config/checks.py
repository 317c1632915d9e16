"""Rules about several fields of a recipe. Each is a function, named by the sentence that it checks.

A rule yields one message per violation: `field: value: what is wrong; remedy`. `faults` collects all of them, so a user
can correct a recipe in one pass. Checks of single fields are in schema.py. This module has the rules on data, model and
algorithm; execution_checks.py has those on layout, cluster and precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from realsr_hpc.config.derived import MOST_TAG_TOKENS, SIZE_UNIT_PX, prompt_image_tokens, trace_image_tokens
from realsr_hpc.config.execution_checks import EXECUTION_RULES, Rule
from realsr_hpc.config.metrics import TASK_METRIC, best_is_highest, best_metric, reported
from realsr_hpc.config.reward_options import read_options
from realsr_hpc.config.schema import APPLIED_EDGES, IMAGE_PLACEHOLDER, VISIBLE_EDGES, RunConfig


def faults(config: RunConfig) -> list[str]:
    """All violations of all rules, in the order of RULES; empty for a valid recipe."""
    return [fault for rule in RULES for fault in rule(config)]


def name_fault(name: str) -> str:
    """Why a run or sweep cannot have this name, or "". Folders, jobs and MLflow runs get the name."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=,@-]{0,127}", name):
        return ""
    return (
        f"{name!r}: must be one plain folder name: letters without accents, digits, . _ + = , @ -, the first one a "
        "letter, a digit or _"
    )


def a_name_is_one_folder_name(config: RunConfig) -> Iterator[str]:
    """Runs are folders named after their recipe."""
    if fault := name_fault(config.name):
        yield f"name: {fault}"


def image_sizes_are_multiples_of_32(config: RunConfig) -> Iterator[str]:
    """Size tokens count in units of 32 px."""
    sizes = [(f"vlcot.image_sizes_px.{i}", size) for i, size in enumerate(config.vlcot.image_sizes_px)]
    for field, size in [*sizes, ("vlcot.lq_size_px", config.vlcot.lq_size_px)]:
        if size % SIZE_UNIT_PX:
            above = -(-size // SIZE_UNIT_PX) * SIZE_UNIT_PX
            yield f"{field}: {size}: must be a multiple of {SIZE_UNIT_PX}; try {above}"


def image_sizes_are_multiples_of_the_tokenizer_stride(config: RunConfig) -> Iterator[str]:
    """An image is a whole grid of codes."""
    stride = config.image_tokenizer.downsample
    for size in (*config.vlcot.image_sizes_px, config.vlcot.lq_size_px):
        if size % stride:
            yield f"image_tokenizer.downsample: {stride}: does not divide the image size {size}; change either"


def image_sizes_grow_from_rough_to_final(config: RunConfig) -> Iterator[str]:
    """The images of a trace go from coarse to fine."""
    rough, middle, final = config.vlcot.image_sizes_px
    if not rough < middle < final:
        yield f"vlcot.image_sizes_px: {[rough, middle, final]}: must grow from rough to middle to final"


def the_truth_is_a_multiple_of_the_upscale(config: RunConfig) -> Iterator[str]:
    """LQ side = final side / upscale."""
    final, upscale = config.vlcot.image_sizes_px[-1], config.vlcot.upscale
    if final % upscale:
        yield f"vlcot.upscale: {upscale}: must divide the final image's side {final}"


def tokenizer_strides_match_its_levels(config: RunConfig) -> Iterator[str]:
    """Every level of the image tokenizer but the last halves the image."""
    stride, levels = config.image_tokenizer.downsample, len(config.image_tokenizer.channel_multiplier)
    if stride != 2 ** (levels - 1):
        yield (
            f"image_tokenizer.channel_multiplier: {levels} levels give a downsample of {2 ** (levels - 1)}, "
            f"not {stride}; change either"
        )


def the_tokenizer_starts_with_a_feature_per_code(config: RunConfig) -> Iterator[str]:
    """The initial codes are features of the start batches; crops are also used at half and quarter size."""
    training, stride = config.tokenizer_training, config.image_tokenizer.downsample
    if config.task != "tokenizer":
        return
    if training.crop_px % (4 * stride):
        yield f"tokenizer_training.crop_px: {training.crop_px}: must be a multiple of {4 * stride}, 4 x downsample"
    a_batch = training.batch_size * (training.crop_px // stride) ** 2
    found, codes = training.start_batches * a_batch, config.image_tokenizer.codebook_size
    if found < codes:
        yield (
            f"tokenizer_training.start_batches: {training.start_batches}: their {found} features are fewer than the "
            f"{codes} codes (image_tokenizer.codebook_size); take at least {-(-codes // max(a_batch, 1))}"
        )


def a_trained_tokenizer_starts_from_principal_components(config: RunConfig) -> Iterator[str]:
    """The start weights of its encoder are computed (tokenizer/start.py), which needs this architecture."""
    tokenizer = config.image_tokenizer
    for name, wanted in (("base_channels", 128), ("num_res_blocks", 0)):
        if config.task == "tokenizer" and getattr(tokenizer, name) != wanted:
            yield f"image_tokenizer.{name}: {getattr(tokenizer, name)}: training needs {wanted}"
    if config.task == "tokenizer" and tokenizer.latent_channels < 32:
        yield f"image_tokenizer.latent_channels: {tokenizer.latent_channels}: training needs at least 32"


def vocabulary_fits_the_image_tokenizer(config: RunConfig) -> Iterator[str]:
    """The 7B vocabularies have a fixed number of image codes and a fixed stride."""
    required = {"chameleon_f16": (8192, 16), "llamagen_f8": (16384, 8)}.get(config.vlcot.vocabulary)
    given = (config.image_tokenizer.codebook_size, config.image_tokenizer.downsample)
    if required and given != required:
        yield (
            f"vlcot.vocabulary: {config.vlcot.vocabulary} needs image_tokenizer.codebook_size={required[0]} and "
            f"image_tokenizer.downsample={required[1]}, not {given[0]} and {given[1]}"
        )


def heads_divide_the_hidden_size(config: RunConfig) -> Iterator[str]:
    """The head dimension is an even whole number, because rotary embeddings rotate pairs."""
    model = config.model
    if model.hidden_size % (2 * model.num_heads):
        yield f"model.num_heads: {model.num_heads}: hidden_size {model.hidden_size} must be divisible by twice as many"
    kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % kv_heads:
        yield f"model.num_kv_heads: {kv_heads}: must divide num_heads {model.num_heads}"


def a_trace_fits_the_rollout(config: RunConfig) -> Iterator[str]:
    """A rollout must be able to reach its final image."""
    needed = trace_image_tokens(config)
    if config.task == "grpo" and config.rollout.max_new_tokens < needed:
        yield (
            f"rollout.max_new_tokens: {config.rollout.max_new_tokens}: the three images alone take {needed} tokens; "
            f"allow at least {needed + MOST_TAG_TOKENS + 3 * config.vlcot.max_text_tokens}"
        )


def text_slots_fit_the_grammar(config: RunConfig) -> Iterator[str]:
    """The grammar can sample texts as long as those of the training traces."""
    longest = max(config.vlcot.text_slots or (0,))
    if longest > config.vlcot.max_text_tokens:
        yield f"vlcot.text_slots: {longest}: longer than vlcot.max_text_tokens {config.vlcot.max_text_tokens}"


def prompt_and_trace_fit_the_model(config: RunConfig) -> Iterator[str]:
    """The context holds the LQ image and the longest rollout after it."""
    limit, prompt = config.model.max_sequence_tokens, prompt_image_tokens(config)
    response = config.rollout.max_new_tokens if config.task == "grpo" else trace_image_tokens(config)
    if config.task != "tokenizer" and prompt + response > limit:
        yield (
            f"model.max_sequence_tokens: {limit}: prompt image {prompt} + response {response} tokens do not fit; "
            f"raise it to at least {prompt + response}"
        )


def clipping_has_both_bounds(config: RunConfig) -> Iterator[str]:
    """Both bounds are given, or neither."""
    low, high = config.grpo.clip_low, config.grpo.clip_high
    if (low is None) != (high is None):
        yield f"grpo.clip_low: {low}, grpo.clip_high: {high}: give both, or null for both (no clipping)"
    if config.grpo.dual_clip is not None and low is None:
        yield f"grpo.dual_clip: {config.grpo.dual_clip}: needs clip_low and clip_high"


def mismatch_bounds_hold_one(config: RunConfig) -> Iterator[str]:
    """If sampler and trainer agree, the ratio is 1; the bounds must not mask it."""
    bounds = config.grpo.mismatch_bounds
    if bounds is not None and not bounds[0] <= 1.0 <= bounds[1]:
        yield f"grpo.mismatch_bounds: {list(bounds)}: must contain 1, the ratio of equal numbers; try [0.5, 5]"


def grpo_has_rewards_to_learn_from(config: RunConfig) -> Iterator[str]:
    """Without a weighted reward every advantage is 0."""
    if config.task == "grpo" and not config.rewards.terms:
        yield "rewards.terms: {}: GRPO learns from rewards; choose a group with rewards=NAME"
    if config.task == "grpo" and not any(term.weight for term in config.rewards.terms.values()):
        yield "rewards.terms: every weight is 0: no advantage can differ from 0; give one a weight"


def reward_options_are_those_of_their_kind(config: RunConfig) -> Iterator[str]:
    """Each kind of reward has its own typed options."""
    for name, term in config.rewards.terms.items():
        try:
            read_options(name, term)
        except ValueError as error:
            yield str(error)


def severity_edges_are_known_and_ascend(config: RunConfig) -> Iterator[str]:
    """Two thresholds of a known quantity separate light, medium and heavy."""
    known = VISIBLE_EDGES if config.degradation.labels == "visible" else APPLIED_EDGES
    for name, (low, high) in config.degradation.severity_edges.items():
        if name not in known:
            yield (
                f"degradation.severity_edges.{name}: no such threshold with degradation.labels="
                f"{config.degradation.labels}; there are {', '.join(known)}"
            )
        elif not low < high:
            yield f"degradation.severity_edges.{name}: {[low, high]}: the first must be the smaller"


def a_ramp_has_both_ends(config: RunConfig) -> Iterator[str]:
    """A weight that changes has a final value, and first and last step in order."""
    for name, term in config.rewards.terms.items():
        if (term.final_weight is None) != (term.ramp_steps is None):
            yield f"rewards.terms.{name}: final_weight and ramp_steps belong together: give both or neither"
        if term.ramp_steps is not None and term.ramp_steps[0] >= term.ramp_steps[1]:
            yield f"rewards.terms.{name}.ramp_steps: {list(term.ramp_steps)}: the first step must come before the last"


def image_top_k_is_fixed_or_adaptive(config: RunConfig) -> Iterator[str]:
    """Adaptive top-k and a fixed image_top_k exclude each other."""
    if config.rollout.image_adaptive_top_k and config.rollout.image_top_k:
        yield (
            f"rollout.image_top_k: {config.rollout.image_top_k}: image_adaptive_top_k chooses k itself; "
            "set image_top_k=0"
        )


def sft_learns_from_degraded_photographs(config: RunConfig) -> Iterator[str]:
    """A trace names the degradation; real pairs and LQ images have no such label."""
    if config.task == "sft" and config.data.mode != "unpaired":
        yield f"data.mode: {config.data.mode}: has no degradation labels, so no traces for SFT; set unpaired"


def adapters_begin_at_the_reference(config: RunConfig) -> Iterator[str]:
    """With adapters, the KL reference is the policy without them, so GRPO must start from there."""
    lora = config.model.lora
    if lora is not None and lora.weights is not None and config.task == "grpo" and config.grpo.kl_beta > 0:
        yield (
            f"model.lora.weights: {lora.weights}: the KL reference would be the model without these adapters; export "
            "their run with form=merged and name that folder in model.weights, or set grpo.kl_beta=0"
        )


def warm_up_ends_before_the_run(config: RunConfig) -> Iterator[str]:
    """A warm-up as long as the run would never reach the learning rate."""
    num_steps = {"grpo": config.grpo.num_steps * config.grpo.updates_per_step, "sft": config.sft.num_steps}
    if config.optim.warmup_steps >= num_steps.get(config.task, 10**9):
        steps = num_steps[config.task]
        yield f"optim.warmup_steps: {config.optim.warmup_steps}: must be below the {steps} steps; lower it (0: none)"
    if config.optim.min_lr > config.optim.lr:
        yield f"optim.min_lr: {config.optim.min_lr}: above optim.lr {config.optim.lr}; lower it"


def the_best_checkpoint_is_measured(config: RunConfig) -> Iterator[str]:
    """The best checkpoint is chosen by a metric that the task reports, in the direction that the metric declares."""
    checkpoint, metric = config.checkpoint, best_metric(config)
    ignored = not checkpoint.keep_best and metric == TASK_METRIC["grpo"]  # earlier recipes hold it
    if checkpoint.best_metric is not None and metric not in reported(config) and not ignored:
        yield f"checkpoint.best_metric: {metric!r}: task {config.task} reports {', '.join(reported(config))}"
    if not checkpoint.keep_best:
        return
    measured = {"grpo": config.grpo.heldout_every_steps, "sft": config.sft.heldout_every_steps}
    if metric.startswith("heldout/") and not measured.get(config.task, 1):
        yield f"checkpoint.keep_best: {checkpoint.keep_best}: needs {config.task}.heldout_every_steps above 0"
    if checkpoint.best_is is not None and (checkpoint.best_is == "highest") != best_is_highest(config):
        direction = "highest" if best_is_highest(config) else "lowest"
        yield f"checkpoint.best_is: {checkpoint.best_is}: {metric} is best at its {direction}; leave best_is out"


def the_instruction_shows_the_image_once(config: RunConfig) -> Iterator[str]:
    """The placeholder in the prompt's text marks the position of the LQ image."""
    found = config.vlcot.instruction.count(IMAGE_PLACEHOLDER)
    if found != 1:
        yield f"vlcot.instruction: holds {IMAGE_PLACEHOLDER!r} {found} times: write it once, where the LQ image goes"


RULES: tuple[Rule, ...] = (
    a_name_is_one_folder_name,
    image_sizes_are_multiples_of_32,
    image_sizes_are_multiples_of_the_tokenizer_stride,
    image_sizes_grow_from_rough_to_final,
    the_truth_is_a_multiple_of_the_upscale,
    tokenizer_strides_match_its_levels,
    the_tokenizer_starts_with_a_feature_per_code,
    a_trained_tokenizer_starts_from_principal_components,
    vocabulary_fits_the_image_tokenizer,
    heads_divide_the_hidden_size,
    a_trace_fits_the_rollout,
    text_slots_fit_the_grammar,
    prompt_and_trace_fit_the_model,
    clipping_has_both_bounds,
    mismatch_bounds_hold_one,
    grpo_has_rewards_to_learn_from,
    reward_options_are_those_of_their_kind,
    severity_edges_are_known_and_ascend,
    a_ramp_has_both_ends,
    image_top_k_is_fixed_or_adaptive,
    sft_learns_from_degraded_photographs,
    adapters_begin_at_the_reference,
    warm_up_ends_before_the_run,
    the_best_checkpoint_is_measured,
    the_instruction_shows_the_image_once,
    *EXECUTION_RULES,
)
