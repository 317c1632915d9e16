"""Numbers of parameters, tokens and sequences that follow from a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from realsr_hpc.config.derived import TAG_TOKENS, VOCABULARY_SIZES, prompt_image_tokens, trace_image_tokens, world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.parallel.layout import (
    Branches,
    even_parts,
    fitting_branches,
    kv_heads,
    microbatch_multiple,
    rounded_up,
    row_multiple,
)
from realsr_hpc.vlcot.vocabulary import build_vocabulary


@dataclass(frozen=True)
class MicrobatchShape:
    """The shape of all microbatches of one update on one data-parallel rank, with sequences of maximum length."""

    rows: int
    """Rows of one microbatch; with guidance half of them are unconditional twins."""
    row_tokens: int
    count: int
    """Number of microbatches."""
    branches: Branches
    """The prompt and responses of a row; in packed rows those of each sequence."""

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch, including padding."""
        return self.rows * self.row_tokens

    @property
    def in_a_row(self) -> int:
        """Number of `branches` in a row; more than one if sequences are packed."""
        return self.row_tokens // self.branches.tokens

    @property
    def loss_tokens_of_a_row(self) -> int:
        """Tokens of a row that have a log-probability: those of its responses."""
        return self.in_a_row * self.branches.count * self.branches.response


def vocabulary_size(config: RunConfig) -> int:
    """Rows of the embedding matrix."""
    fixed = VOCABULARY_SIZES.get(config.vlcot.vocabulary)
    if fixed:
        return fixed
    text = config.tokenizer_training.text_vocab_size
    return build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, text).size


def parameter_count(config: RunConfig) -> int:
    """Number of parameters of the policy without the image tokenizer. The q and k norms count as in published weights,
    as one vector for all heads."""
    model = config.model
    return 2 * vocabulary_size(config) * model.hidden_size + model.hidden_size + model.num_layers * layer_size(config)


def layer_size(config: RunConfig) -> int:
    """Number of parameters of one layer."""
    model = config.model
    head_dim = model.hidden_size // model.num_heads
    kv_size = kv_heads(model) * head_dim
    attention = 2 * model.hidden_size**2 + 2 * model.hidden_size * kv_size + 4 * head_dim
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def stage_parameters(config: RunConfig) -> float:
    """Number of parameters on one tensor-parallel rank of the fullest stage: its layers and one of the two vocabulary
    matrices (both without pipeline parallelism)."""
    parallel = config.parallel
    matrices = 2 if parallel.pp == 1 else 1
    vocabulary = matrices * vocabulary_size(config) * config.model.hidden_size
    return stage_layers(config) + vocabulary / parallel.tp


def stage_layers(config: RunConfig) -> float:
    """Number of parameters of a stage's layers on one tensor-parallel rank."""
    return config.model.num_layers / config.parallel.pp * layer_size(config) / config.parallel.tp


def adapter_parameters(config: RunConfig) -> float:
    """Number of parameters of the low-rank adapters on one tensor-parallel rank of a stage; one of the two matrices of
    each adapter is sharded."""
    model, lora, tp = config.model, config.model.lora, config.parallel.tp
    if lora is None:
        return 0.0
    hidden, ffn, head_dim = model.hidden_size, model.ffn_hidden_size, model.hidden_size // model.num_heads
    kv_size = kv_heads(model) * head_dim
    cut = {"q_proj": hidden, "k_proj": kv_size, "v_proj": kv_size, "o_proj": hidden}
    cut |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), ffn)
    numbers = sum(hidden + cut[name] / tp for name in lora.targets)  # the other matrix has one side of hidden size
    return model.num_layers / config.parallel.pp * lora.rank * numbers


def trained_parameters(config: RunConfig) -> float:
    """Parameters with gradients and optimizer states on one tensor-parallel rank of the fullest stage."""
    return stage_parameters(config) if config.model.lora is None else adapter_parameters(config)


def sequence_tokens(config: RunConfig) -> tuple[int, int]:
    """Tokens of the prompt and of a whole trace with texts of maximum length; (0, 0) for a tokenizer recipe."""
    if config.task == "tokenizer":
        return 0, 0
    texts = TAG_TOKENS + 3 * config.vlcot.max_text_tokens
    response = trace_image_tokens(config) + texts
    if config.task == "grpo":
        response = min(response, config.rollout.max_new_tokens)
    return prompt_image_tokens(config) + TAG_TOKENS, response


def sequences_per_update(config: RunConfig) -> int:
    """Sequences of one optimizer update over all data-parallel ranks."""
    if config.task == "grpo":
        return config.grpo.prompts_per_step * config.grpo.group_size
    return config.sft.batch_size if config.task == "sft" else 0


def dp_size(config: RunConfig) -> int:
    """Number of data-parallel ranks."""
    return max(1, world_size(config) // (config.parallel.tp * config.parallel.pp))


def sequences_of_a_rank(config: RunConfig) -> int:
    """Sequences of a step on one data-parallel rank."""
    return sequences_per_update(config) // dp_size(config)


def microbatch_shape(config: RunConfig) -> MicrobatchShape:
    """The shape that train/batches.py builds: per row a prompt with some of its rollouts, or in SFT its sequences."""
    prompt, response = sequence_tokens(config)
    parallel, sequences = config.parallel, sequences_of_a_rank(config)
    streams, shared = 2 if guided(config) else 1, Branches(prompt, response, 1)
    if config.task == "grpo":
        group = math.ceil(config.grpo.group_size / config.grpo.updates_per_step)
        shared = fitting_branches(prompt, response, group, parallel, streams)
        rows = math.ceil(sequences / config.grpo.group_size) * math.ceil(group / shared.count)
        row_tokens = rounded_up(shared.tokens, row_multiple(parallel))
    elif config.sft.packing:
        row_tokens = rounded_up(max(shared.tokens, parallel.microbatch_tokens), row_multiple(parallel))
        rows = math.ceil(sequences / (row_tokens // shared.tokens))
    else:
        rows, row_tokens = sequences, rounded_up(shared.tokens, row_multiple(parallel))
    most = max(1, parallel.microbatch_tokens // (row_tokens * streams))
    count, together = even_parts(rows, most, microbatch_multiple(parallel))
    return MicrobatchShape(together * streams, row_tokens, count, shared)


def scored_at_once(config: RunConfig, shape: MicrobatchShape) -> int:
    """Number of microbatches in one pass without gradient."""
    multiple = microbatch_multiple(config.parallel)
    return even_parts(shape.count, config.parallel.scoring_microbatches, multiple)[1]


def truncated(config: RunConfig) -> bool:
    """Whether top-k or top-p truncates the sampling distribution, so that its support is stored with the tokens."""
    rollout = config.rollout
    cuts = rollout.image_adaptive_top_k or rollout.image_top_k or rollout.text_top_k or rollout.top_p < 1.0
    return config.task == "grpo" and bool(cuts)


def guided(config: RunConfig) -> bool:
    """Whether rollouts use classifier-free guidance, so that every row has an unconditional twin."""
    return config.task == "grpo" and config.rollout.cfg_scale != 1.0


def has_reference(config: RunConfig) -> bool:
    """Whether training uses a frozen reference."""
    return config.task == "grpo" and config.grpo.kl_beta > 0


def has_second_model(config: RunConfig) -> bool:
    """Whether the reference is a second model rather than the policy without its adapters."""
    return has_reference(config) and config.model.lora is None


def width(config: RunConfig) -> int:
    """Bytes per weight or activation."""
    return 2 if config.precision.params == "bf16" else 4
