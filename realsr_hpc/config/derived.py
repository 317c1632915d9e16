"""Numbers that follow from a recipe, and sizes of chunks of work, shared by checks, program and planner."""

from __future__ import annotations

from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.config.schema import RunConfig

VOCABULARY_SIZES = {"chameleon_f16": 65536, "llamagen_f8": 73728}
"""Padded vocabulary of the 7B layouts; the tiny one follows from its two tokenizers."""

AUTO_WIDEST, AUTO_TOKENS = 32, 512
"""`rollout.lookahead=auto` tries passes of at most this many tokens per row, and this many tokens in total."""

SIZE_UNIT_PX = 32
"""Unit of the size tokens at the beginning of an image block."""

TAG_TOKENS, MOST_TAG_TOKENS = 130, 260
"""Tokens of a trace's tags and degradation phrase: in the 7B vocabulary, and at most (one per character)."""

LOGIT_CHUNK_TOKENS = 1024
"""Tokens whose logits are in memory at once when a loss is scored (behaviour/logprobs.py)."""

DRAWN_AT_ONCE = 256
"""Positions whose logits are in memory at once when tokens are drawn (rollout/choice.py)."""

PIXELS_AT_ONCE = 2**21
"""Pixels in one pass of the image tokenizer, 8 images of 512 px: a step's 64 would need tens of GiB."""


def world_size(config: RunConfig) -> int:
    """Number of processes of a run."""
    return config.cluster.nodes * config.cluster.tasks_per_node


def image_tokens(size_px: int, downsample: int) -> int:
    """Tokens of an image block: begin, two size tokens, rows of codes that end in a newline, end."""
    side = size_px // downsample
    return side * (side + 1) + 4


def prompt_image_tokens(config: RunConfig) -> int:
    """Tokens of the LQ image in the prompt."""
    return image_tokens(config.vlcot.lq_size_px, config.image_tokenizer.downsample)


def trace_image_tokens(config: RunConfig) -> int:
    """Tokens of the three images of a trace."""
    return sum(image_tokens(size, config.image_tokenizer.downsample) for size in config.vlcot.image_sizes_px)


def widest_lookahead(config: RolloutConfig) -> int:
    """Largest number of tokens per row in one decoding pass; the cache has that much room after the last token."""
    return AUTO_WIDEST if config.lookahead == "auto" else config.lookahead


def pass_tokens(config: RolloutConfig, rows: int) -> int:
    """Largest number of tokens in one decoding pass over this many rows."""
    if config.lookahead == "auto":
        return max(rows, min(rows * AUTO_WIDEST, AUTO_TOKENS))
    return rows * config.lookahead


def fp8_widths(config: RunConfig) -> dict[str, int]:
    """Widths of the layers' matrices on one tensor-parallel rank, by the field that determines them."""
    model, tp = config.model, config.parallel.tp
    head_dim = model.hidden_size // model.num_heads
    rows = (model.num_heads + 2 * (model.num_kv_heads or model.num_heads)) * head_dim
    return {
        "hidden_size": model.hidden_size // tp,
        "num_kv_heads": rows // tp,
        "ffn_hidden_size": model.ffn_hidden_size // tp,
    }
