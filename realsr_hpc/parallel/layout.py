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
    """The layout that fills a world; ValueError when tp x pp does not divide it."""
    model_size = parallel.tp * parallel.pp
    if world_size % model_size:
        raise ValueError(
            f"world size {world_size} is not divisible by parallel.tp x parallel.pp = {parallel.tp} x {parallel.pp}: "
            f"start a multiple of {model_size} processes (cluster.nodes x cluster.tasks_per_node), or lower tp or pp"
        )
    return Layout(parallel.tp, parallel.pp, world_size // model_size)


def layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Transformer layers of one model chunk (a stage holds `virtual_pp` chunks); `check` has seen that they divide."""
    return model.num_layers // (parallel.pp * parallel.virtual_pp)


def kv_heads(model: ModelConfig) -> int:
    """Key and value heads."""
    return model.num_kv_heads or model.num_heads


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Vocabulary rows held over all tensor ranks: the next multiple of tp."""
    return rounded_up(vocab_size, tp_size)


def check(config: RunConfig) -> None:
    """ValueError with every fault of a recipe whose model its layout cannot hold.

    The rules are those that a composed recipe has passed already; a layout that a program chose has not.
    """
    if faults := [fault for rule in (heads_divide_the_hidden_size, *LAYOUT_RULES) for fault in rule(config)]:
        raise ValueError("\n".join(faults))


def row_multiple(parallel: ParallelConfig) -> int:
    """A row's tokens are a multiple of this: FP8 products need 16 a rank, sequence parallelism cuts rows over tp."""
    return 16 * (parallel.tp if parallel.sequence_parallel else 1)


def rounded_up(tokens: int, multiple: int) -> int:
    """The next multiple."""
    return -(-tokens // multiple) * multiple


def microbatch_multiple(parallel: ParallelConfig) -> int:
    """The number of microbatches of a step is a multiple of this (interleaved 1F1B goes round the stages)."""
    return parallel.pp if parallel.virtual_pp > 1 else 1


@dataclass(frozen=True)
class Branches:
    """What a row holds: one prompt, then `count` of its responses side by side, then padding."""

    prompt: int
    """Tokens."""
    response: int
    """Tokens of each, its padding included."""
    count: int

    @property
    def tokens(self) -> int:
        """Of a row, without the padding at its end."""
        return self.prompt + self.count * self.response


def fitting_branches(prompt: int, response: int, group: int, parallel: ParallelConfig, streams: int) -> Branches:
    """Rows for groups of `group` responses: as many a row as `microbatch_tokens` holds, evenly spread.

    streams: 2 when every row has an unconditional twin.
    """
    most = max(1, (parallel.microbatch_tokens // streams - prompt) // response)
    return Branches(prompt, response, even_parts(group, most)[1])


def even_parts(count: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """(number of parts, size of each) that hold `count` >= 0 with as little padding as parts of at most `most` allow.

    All parts are of one size; their number is at least one and a multiple of `multiple`.
    """
    parts = math.ceil(max(1, math.ceil(count / most)) / multiple) * multiple
    return parts, max(1, math.ceil(count / parts))


def batches_of_rank(count: int, batch_size: int, rank: int, size: int) -> list[range]:
    """The batches of `count` items that one of `size` ranks works on: every size-th, from its own.

    Batches are cut before they are dealt, so that each holds the same items whatever the number of ranks.
    """
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts[rank::size]]
