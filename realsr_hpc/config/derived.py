"""Numbers that follow from a recipe; rules and planner share them."""

from __future__ import annotations

from realsr_hpc.config.schema import RunConfig

VOCABULARY_SIZES = {"chameleon_f16": 65536, "llamagen_f8": 73728}
"""Padded vocabulary of the 7B layouts; the tiny one follows from its two tokenizers."""


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
