"""Numbers of parameters, tokens and sequences that follow from a recipe."""

from __future__ import annotations

from realsr_hpc.config.checks import VOCABULARY_SIZES, prompt_image_tokens, trace_image_tokens
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.vlcot.vocabulary import build_vocabulary

TEXT_TOKENS_OF_TAGS = 130
"""Tags and degradation phrase of a trace, in tokens of the 7B vocabulary, roughly."""


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
    return 2 * vocabulary_size(config) * model.hidden_size + model.hidden_size + model.num_layers * layer_size(config)


def layer_size(config: RunConfig) -> int:
    """Parameters of one layer."""
    model = config.model
    head_dim = model.hidden_size // model.num_heads
    kv_size = (model.num_kv_heads or model.num_heads) * head_dim
    attention = 2 * model.hidden_size**2 + 2 * model.hidden_size * kv_size + 4 * head_dim
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def stage_parameters(config: RunConfig) -> float:
    """Of one tensor-parallel rank of the fullest stage: its layers and one of the two vocabulary matrices."""
    parallel = config.parallel
    matrices = 2 if parallel.pp == 1 else 1
    vocabulary = matrices * vocabulary_size(config) * config.model.hidden_size
    return stage_layers(config) + vocabulary / parallel.tp


def stage_layers(config: RunConfig) -> float:
    """Of the layers alone."""
    return config.model.num_layers / config.parallel.pp * layer_size(config) / config.parallel.tp


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


def guided(config: RunConfig) -> bool:
    """Rollouts use classifier-free guidance, so every row has an unconditional twin."""
    return config.task == "grpo" and config.rollout.cfg_scale != 1.0


def has_reference(config: RunConfig) -> bool:
    """A frozen reference takes part."""
    return config.task == "grpo" and config.grpo.kl_beta > 0


def width(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.precision.params == "bf16" else 4
