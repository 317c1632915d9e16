"""Arithmetic of a parallel layout: sizes, splits and rounding. Imports neither torch nor Megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass

from realsr_hpc.config.checks import heads_divide_the_hidden_size
from realsr_hpc.config.execution_checks import LAYOUT_RULES
from realsr_hpc.config.schema import ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes; tp varies fastest, then dp, then pp (Megatron's order)."""

    tp_size: int
    pp_size: int
    dp_size: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp_size * self.pp_size * self.dp_size


def layout_of(parallel: ParallelConfig, world_size: int) -> Layout:
    """The layout of `world_size` processes. ValueError if tp x pp does not divide their number."""
    model_size = parallel.tp * parallel.pp
    if world_size % model_size:
        raise ValueError(
            f"world size {world_size} is not divisible by parallel.tp x parallel.pp = {parallel.tp} x {parallel.pp}: "
            f"start a multiple of {model_size} processes (cluster.nodes x cluster.tasks_per_node), or lower tp or pp"
        )
    return Layout(parallel.tp, parallel.pp, world_size // model_size)


def layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Number of layers of one model chunk (a stage has `virtual_pp` chunks); `check` ensures exact division."""
    return model.num_layers // (parallel.pp * parallel.virtual_pp)


def kv_heads(model: ModelConfig) -> int:
    """Number of key and value heads."""
    return model.num_kv_heads or model.num_heads


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Vocabulary rows over all tensor-parallel ranks: the next multiple of tp."""
    return rounded_up(vocab_size, tp_size)


def check(config: RunConfig) -> None:
    """Raise ValueError with every reason why the recipe's layout does not suit its model.

    A loaded recipe has already passed these rules; a layout chosen by code has not.
    """
    if faults := [fault for rule in (heads_divide_the_hidden_size, *LAYOUT_RULES) for fault in rule(config)]:
        raise ValueError("\n".join(faults))


def row_multiple(parallel: ParallelConfig) -> int:
    """The tokens per row are a multiple of this: FP8 products need 16 per rank; sequence parallelism splits rows."""
    return 16 * (parallel.tp if parallel.sequence_parallel else 1)


def rounded_up(tokens: int, multiple: int) -> int:
    """`tokens` rounded up to a multiple."""
    return -(-tokens // multiple) * multiple


def microbatch_multiple(parallel: ParallelConfig) -> int:
    """The number of microbatches is a multiple of this: interleaved 1F1B needs a multiple of the number of stages."""
    return parallel.pp if parallel.virtual_pp > 1 else 1


@dataclass(frozen=True)
class Branches:
    """Layout of a row: one prompt, then `count` of its responses one after the other, then padding."""

    prompt: int
    """Tokens of the prompt."""
    response: int
    """Tokens of each response, including its padding."""
    count: int
    """Number of responses."""

    @property
    def tokens(self) -> int:
        """Tokens of a row without the padding at its end."""
        return self.prompt + self.count * self.response


def fitting_branches(prompt: int, response: int, group: int, parallel: ParallelConfig, streams: int) -> Branches:
    """The row layout for groups of `group` responses: as many per row as fit `microbatch_tokens`, evenly distributed.

    prompt, response: tokens. streams: 2 if every row has an unconditional twin, else 1.
    """
    most = max(1, (parallel.microbatch_tokens // streams - prompt) // response)
    return Branches(prompt, response, even_parts(group, most)[1])


def even_parts(count: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """Split `count` >= 0 items into parts of equal size, at most `most` each, with as little padding as possible.

    Returns the number of parts, which is at least one and a multiple of `multiple`, and their size.
    """
    parts = math.ceil(max(1, math.ceil(count / most)) / multiple) * multiple
    return parts, max(1, math.ceil(count / parts))


def batches_of_rank(count: int, batch_size: int, rank: int, size: int) -> list[range]:
    """The batches of `count` items that belong to rank `rank` of `size`: every `size`-th batch from number `rank` on.

    Items are split into batches first, so that a batch has the same items for any number of ranks.
    """
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts[rank::size]]
