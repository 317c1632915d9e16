"""Rules that need more than one section of a recipe, each a function named as the sentence it checks.

A rule yields a fault for every breach: `field: value: what is wrong; remedy`. `faults` collects all of them, so a
user mends a recipe in one go. What one field can judge alone stands in schema.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePath

from realsr_hpc.config.reward_options import read_options
from realsr_hpc.config.schema import RunConfig

Rule = Callable[[RunConfig], Iterator[str]]

VOCABULARY_SIZES = {"chameleon_f16": 65536, "llamagen_f8": 73728}
"""Padded vocabulary of the 7B layouts; the tiny one follows from its two tokenizers."""
TEXT_BYTES_OF_TAGS = 260
"""Characters of the fourteen tags and the degradation phrase: an upper bound of their tokens."""
SIZE_UNIT_PX = 32
FP8_MULTIPLE = 16


def faults(config: RunConfig) -> list[str]:
    """All breaches of all rules, in the order of RULES; empty: the recipe is sound."""
    return [fault for rule in RULES for fault in rule(config)]


def world_size(config: RunConfig) -> int:
    """Processes of a run."""
    return config.cluster.nodes * config.cluster.tasks_per_node


def image_tokens(size_px: int, downsample: int) -> int:
    """Tokens of an image block: brackets, two sizes, and rows of codes that end in a newline."""
    side = size_px // downsample
    return side * (side + 1) + 4


def prompt_image_tokens(config: RunConfig) -> int:
    """Tokens of the LQ image in the prompt."""
    return image_tokens(config.vlcot.lq_size_px, config.image_tokenizer.downsample)


def trace_image_tokens(config: RunConfig) -> int:
    """Tokens of the three images of a trace."""
    return sum(image_tokens(size, config.image_tokenizer.downsample) for size in config.vlcot.image_sizes_px)


def a_name_is_one_folder_name(config: RunConfig) -> Iterator[str]:
    """Runs are folders named after their recipe."""
    if not config.name or PurePath(config.name).name != config.name or config.name.startswith("."):
        yield f"name: {config.name!r}: must be one plain folder name; leave out '/' and a leading '.'"


def image_sizes_are_multiples_of_32(config: RunConfig) -> Iterator[str]:
    """The size tokens count in units of 32 px."""
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
    """Coarse to fine."""
    rough, middle, final = config.vlcot.image_sizes_px
    if not rough < middle < final:
        yield f"vlcot.image_sizes_px: {[rough, middle, final]}: must grow from rough to middle to final"


def the_truth_is_a_multiple_of_the_upscale(config: RunConfig) -> Iterator[str]:
    """LQ side = final side / upscale."""
    final, upscale = config.vlcot.image_sizes_px[-1], config.vlcot.upscale
    if final % upscale:
        yield f"vlcot.upscale: {upscale}: must divide the final image's side {final}"


def tokenizer_strides_match_its_levels(config: RunConfig) -> Iterator[str]:
    """Every level of the VQ but the last halves the image."""
    stride, levels = config.image_tokenizer.downsample, len(config.image_tokenizer.channel_multiplier)
    if stride != 2 ** (levels - 1):
        yield (
            f"image_tokenizer.channel_multiplier: {levels} levels give a downsample of {2 ** (levels - 1)}, "
            f"not {stride}; change either"
        )


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
    """The head dimension is whole and even (rotary embedding turns pairs)."""
    model = config.model
    if model.hidden_size % (2 * model.num_heads):
        yield f"model.num_heads: {model.num_heads}: hidden_size {model.hidden_size} must divide by twice as many"
    kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % kv_heads:
        yield f"model.num_kv_heads: {kv_heads}: must divide num_heads {model.num_heads}"


def layers_divide_over_pipeline_stages(config: RunConfig) -> Iterator[str]:
    """Every stage and every virtual chunk holds as many layers."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pp * parallel.virtual_pp
    if layers % chunks:
        yield f"parallel.pp: {parallel.pp} x virtual_pp {parallel.virtual_pp}: must divide model.num_layers {layers}"
    if parallel.virtual_pp > 1 and parallel.pp == 1:
        yield f"parallel.virtual_pp: {parallel.virtual_pp}: needs parallel.pp >= 2; set it to 1"


def tensor_parallel_divides_the_model(config: RunConfig) -> Iterator[str]:
    """Heads, key/value heads, feed-forward and vocabulary are cut over the tensor-parallel ranks."""
    tp, model = config.parallel.tp, config.model
    parts = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads or model.num_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.hidden_size": model.hidden_size,
    }
    for field, value in parts.items():
        if value % tp:
            yield f"{field}: {value}: must divide by parallel.tp {tp}"
    vocabulary = VOCABULARY_SIZES.get(config.vlcot.vocabulary)
    if vocabulary and vocabulary % (128 * tp):
        yield f"parallel.tp: {tp}: the vocabulary {vocabulary} must divide by 128 x tp"


def sequence_parallel_needs_tensor_parallel(config: RunConfig) -> Iterator[str]:
    """It shards what tensor parallelism leaves whole."""
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        yield "parallel.sequence_parallel: true: needs parallel.tp >= 2; set it to false"


def world_size_divides_by_the_layout(config: RunConfig) -> Iterator[str]:
    """Data parallelism is what TP x PP leaves of the world."""
    world, block = world_size(config), config.parallel.tp * config.parallel.pp
    if world % block:
        yield (
            f"parallel: tp {config.parallel.tp} x pp {config.parallel.pp} = {block}: must divide the world size "
            f"{world} (cluster.nodes x cluster.tasks_per_node); change cluster.tasks_per_node or the layout"
        )


def data_parallel_ranks_share_the_batch_evenly(config: RunConfig) -> Iterator[str]:
    """Prompts (GRPO) and traces (SFT) are dealt out evenly."""
    block = config.parallel.tp * config.parallel.pp
    dp = max(1, world_size(config) // block)
    if config.task == "grpo" and config.grpo.prompts_per_step % dp:
        yield f"grpo.prompts_per_step: {config.grpo.prompts_per_step}: must divide by the data-parallel size {dp}"
    if config.task == "sft" and config.sft.batch_size % dp:
        yield f"sft.batch_size: {config.sft.batch_size}: must divide by the data-parallel size {dp}"
    if config.task == "tokenizer" and world_size(config) > 1:
        yield f"cluster.tasks_per_node: {world_size(config)} processes: the tokenizer trains in one; set it to 1"


def a_trace_fits_the_rollout(config: RunConfig) -> Iterator[str]:
    """A rollout must be able to reach its final image."""
    needed = trace_image_tokens(config)
    if config.task == "grpo" and config.rollout.max_new_tokens < needed:
        yield (
            f"rollout.max_new_tokens: {config.rollout.max_new_tokens}: the three images alone take {needed} tokens; "
            f"allow at least {needed + TEXT_BYTES_OF_TAGS + 3 * config.vlcot.max_text_tokens}"
        )


def text_slots_fit_the_grammar(config: RunConfig) -> Iterator[str]:
    """A text that training traces fill up can also be sampled."""
    longest = max(config.vlcot.text_slots or (0,))
    if longest > config.vlcot.max_text_tokens:
        yield f"vlcot.text_slots: {longest}: longer than vlcot.max_text_tokens {config.vlcot.max_text_tokens}"


def prompt_and_trace_fit_the_model(config: RunConfig) -> Iterator[str]:
    """The context holds the LQ image, and the longest rollout behind it."""
    limit, prompt = config.model.max_sequence_tokens, prompt_image_tokens(config)
    response = config.rollout.max_new_tokens if config.task == "grpo" else trace_image_tokens(config)
    if config.task != "tokenizer" and prompt + response > limit:
        yield (
            f"model.max_sequence_tokens: {limit}: prompt image {prompt} + response {response} tokens do not fit; "
            f"raise it to at least {prompt + response}"
        )


def a_microbatch_holds_one_sequence(config: RunConfig) -> Iterator[str]:
    """The token budget of a microbatch counts at least one whole sequence."""
    budget, longest = config.parallel.microbatch_tokens, config.model.max_sequence_tokens
    if config.task != "tokenizer" and budget < longest:
        yield f"parallel.microbatch_tokens: {budget}: must hold one sequence of model.max_sequence_tokens {longest}"


def fp8_needs_bf16_gpus_and_aligned_dimensions(config: RunConfig) -> Iterator[str]:
    """Megatron ignores fp8 silently without Transformer Engine, and FP8 products need multiples of 16."""
    precision, gpus = config.precision, config.cluster.gpus_per_node > 0
    real = precision.fp8 != "none" and precision.fp8_backend == "transformer_engine"
    if real and not gpus:
        yield (
            f"precision.fp8: {precision.fp8}: needs GPUs; set cluster.gpus_per_node, or fp8=none, or "
            "fp8_backend=emulated to see what FP8 does to the numbers"
        )
    if (real or (precision.rollout_fp8 and gpus)) and precision.params != "bf16":
        yield f"precision.params: {precision.params}: FP8 layers keep bf16 parameters; set bf16"
    if real or precision.rollout_fp8:
        for field, width in fp8_widths(config).items():
            if width % FP8_MULTIPLE:
                yield f"model.{field}: {width} per tensor-parallel rank: FP8 needs a multiple of {FP8_MULTIPLE}"


def fp8_widths(config: RunConfig) -> dict[str, int]:
    """Input and output widths of the layers' matrices on one tensor-parallel rank, by the field that decides them."""
    model, tp = config.model, config.parallel.tp
    head_dim = model.hidden_size // model.num_heads
    rows = (model.num_heads + 2 * (model.num_kv_heads or model.num_heads)) * head_dim
    return {
        "hidden_size": model.hidden_size // tp,
        "num_kv_heads": rows // tp,
        "ffn_hidden_size": model.ffn_hidden_size // tp,
    }


def lean_optimizers_need_gpus(config: RunConfig) -> Iterator[str]:
    """Offloading moves memory off a GPU; 16-bit remainders are Transformer Engine's."""
    optim, gpus = config.optim, config.cluster.gpus_per_node > 0
    if optim.cpu_offload and not gpus:
        yield "optim.cpu_offload: true: without GPUs everything is in host memory already; set it to false"
    if optim.main_params == "bf16":
        if not gpus or config.precision.params != "bf16":
            yield (
                "optim.main_params: bf16: needs GPUs (Transformer Engine's optimizer) and precision.params=bf16; "
                "set it to fp32"
            )
        if not config.parallel.distributed_optimizer:
            yield "optim.main_params: bf16: needs parallel.distributed_optimizer=true; set it, or main_params=fp32"


def one_task_a_gpu(config: RunConfig) -> Iterator[str]:
    """A task drives one GPU; on a CPU cluster there are none."""
    cluster = config.cluster
    if cluster.gpus_per_node and cluster.tasks_per_node > cluster.gpus_per_node:
        yield (
            f"cluster.tasks_per_node: {cluster.tasks_per_node}: more than gpus_per_node {cluster.gpus_per_node}; "
            "one task drives one GPU"
        )


def a_local_run_has_one_node(config: RunConfig) -> Iterator[str]:
    """The local executor starts processes on this machine only."""
    if config.cluster.kind == "local" and config.cluster.nodes > 1:
        yield f"cluster.nodes: {config.cluster.nodes}: cluster.kind=local is one machine; set 1 or cluster=slurm"


def clipping_has_both_bounds(config: RunConfig) -> Iterator[str]:
    """Both bounds, or neither."""
    low, high = config.grpo.clip_low, config.grpo.clip_high
    if (low is None) != (high is None):
        yield f"grpo.clip_low: {low}, grpo.clip_high: {high}: give both, or null for both (no clipping)"
    if config.grpo.dual_clip is not None and low is None:
        yield f"grpo.dual_clip: {config.grpo.dual_clip}: needs clip_low and clip_high"


def mismatch_bounds_hold_one(config: RunConfig) -> Iterator[str]:
    """A sampler that agrees with the trainer has ratio 1, which must not be masked."""
    bounds = config.grpo.mismatch_bounds
    if bounds is not None and not bounds[0] <= 1.0 <= bounds[1]:
        yield f"grpo.mismatch_bounds: {list(bounds)}: must hold 1, the ratio of equal numbers; try [0.5, 5]"


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


def a_ramp_has_both_ends(config: RunConfig) -> Iterator[str]:
    """A reward whose weight changes has a last weight, and steps in order."""
    for name, term in config.rewards.terms.items():
        if (term.final_weight is None) != (term.ramp_steps is None):
            yield f"rewards.terms.{name}: final_weight and ramp_steps belong together: give both or neither"
        if term.ramp_steps is not None and term.ramp_steps[0] >= term.ramp_steps[1]:
            yield f"rewards.terms.{name}.ramp_steps: {list(term.ramp_steps)}: the first step must come before the last"


def image_top_k_is_fixed_or_adaptive(config: RunConfig) -> Iterator[str]:
    """Top-k by entropy and a fixed image top-k exclude each other."""
    if config.rollout.image_adaptive_top_k and config.rollout.image_top_k:
        yield (
            f"rollout.image_top_k: {config.rollout.image_top_k}: image_adaptive_top_k chooses k itself; "
            "set image_top_k=0"
        )


def a_checkpoint_can_be_taken_before_time_is_up(config: RunConfig) -> Iterator[str]:
    """The warning signal must come inside the time limit."""
    if config.cluster.signal_delay_s >= 60 * config.cluster.time_min:
        yield (
            f"cluster.signal_delay_s: {config.cluster.signal_delay_s}: not below cluster.time_min "
            f"{config.cluster.time_min} min; lower it"
        )


def sft_learns_from_degraded_photographs(config: RunConfig) -> Iterator[str]:
    """A trace names the degradation that was applied; pairs and LQ images carry no such label."""
    if config.task == "sft" and config.data.mode != "unpaired":
        yield f"data.mode: {config.data.mode}: has no degradation labels, so no traces for SFT; set unpaired"


def warm_up_ends_before_the_run(config: RunConfig) -> Iterator[str]:
    """A warm-up as long as the run never reaches its learning rate."""
    num_steps = {"grpo": config.grpo.num_steps * config.grpo.updates_per_step, "sft": config.sft.num_steps}
    if config.optim.warmup_steps >= num_steps.get(config.task, 10**9):
        steps = num_steps[config.task]
        yield f"optim.warmup_steps: {config.optim.warmup_steps}: not below the run's {steps} steps; lower it, 0 is none"
    if config.optim.min_lr > config.optim.lr:
        yield f"optim.min_lr: {config.optim.min_lr}: above optim.lr {config.optim.lr}; lower it"


def the_best_checkpoint_is_measured(config: RunConfig) -> Iterator[str]:
    """Keeping the best needs a metric that the task reports."""
    if not config.checkpoint.keep_best or not config.checkpoint.best_metric.startswith("heldout/"):
        return
    measured = {"grpo": config.grpo.heldout_every_steps, "sft": config.sft.heldout_every_steps}
    if not measured.get(config.task, 1):
        yield f"checkpoint.keep_best: {config.checkpoint.keep_best}: needs {config.task}.heldout_every_steps above 0"
    if config.task == "sft" and config.checkpoint.best_metric != "heldout/loss/mean":
        yield (
            f"checkpoint.best_metric: {config.checkpoint.best_metric}: SFT reports heldout/loss/mean; "
            "set that, and checkpoint.best_is=lowest"
        )


def a_tracking_uri_holds_no_password(config: RunConfig) -> Iterator[str]:
    """The URI is logged as a parameter and stands in files that people share."""
    if "@" in (uri := config.tracking.uri or "") and ":" in uri.partition("://")[2].rpartition("@")[0]:
        yield (
            "tracking.uri: holds a password; leave it out and give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (a server) or PGPASSFILE (PostgreSQL) in cluster.environment_file"
        )


RULES: tuple[Rule, ...] = (
    a_name_is_one_folder_name,
    image_sizes_are_multiples_of_32,
    image_sizes_are_multiples_of_the_tokenizer_stride,
    image_sizes_grow_from_rough_to_final,
    the_truth_is_a_multiple_of_the_upscale,
    tokenizer_strides_match_its_levels,
    vocabulary_fits_the_image_tokenizer,
    heads_divide_the_hidden_size,
    layers_divide_over_pipeline_stages,
    tensor_parallel_divides_the_model,
    sequence_parallel_needs_tensor_parallel,
    world_size_divides_by_the_layout,
    data_parallel_ranks_share_the_batch_evenly,
    a_trace_fits_the_rollout,
    text_slots_fit_the_grammar,
    prompt_and_trace_fit_the_model,
    a_microbatch_holds_one_sequence,
    fp8_needs_bf16_gpus_and_aligned_dimensions,
    lean_optimizers_need_gpus,
    one_task_a_gpu,
    a_local_run_has_one_node,
    clipping_has_both_bounds,
    mismatch_bounds_hold_one,
    grpo_has_rewards_to_learn_from,
    reward_options_are_those_of_their_kind,
    a_ramp_has_both_ends,
    image_top_k_is_fixed_or_adaptive,
    a_checkpoint_can_be_taken_before_time_is_up,
    sft_learns_from_degraded_photographs,
    warm_up_ends_before_the_run,
    the_best_checkpoint_is_measured,
    a_tracking_uri_holds_no_password,
)
