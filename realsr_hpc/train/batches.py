"""Collate training sequences into the equal-shaped microbatches of a pipeline pass.

A microbatch has a few rows of `row_tokens` tokens. A row holds one of:

    [sequence | padding]                               plain
    [sequence | sequence | ... | padding]              packed: attention stays within a segment; rotary embeddings are
                                                       relative, so positions need no reset
    [prompt | response 0 | response 1 | ... | padding] branched: the prompt that the responses share is computed once

The inputs of the loss accompany the tokens in compact form, one entry per loss token. With classifier-free guidance
each branched row has a twin in which a token sees only its own image block: the unconditional stream, scored in the
same pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel.layout import (
    Branches,
    even_parts,
    fitting_branches,
    microbatch_multiple,
    rounded_up,
    row_multiple,
)
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import LossTokens, RolloutTokens, TrainingGroup, TrainingSequence

Placed = tuple[TrainingSequence, Tensor]
"""A sequence, and the position in its row of each of its tokens, int64 [S]."""


def plain_sequence(tokens: Tensor, first: int) -> TrainingSequence:
    """A sequence whose tokens from index `first` >= 1 on carry loss, under the plain softmax: no mask, temperature 1.

    tokens: int64 [S].
    """
    targets = tokens[first:]
    return TrainingSequence(
        tokens,
        LossTokens(
            # the hidden state at position i predicts token i + 1
            positions=torch.arange(first - 1, len(tokens) - 1),
            targets=targets,
            mask_ids=torch.zeros(len(targets), dtype=torch.long),
            temperature=torch.ones(len(targets)),
        ),
    )


def collate(
    sequences: Sequence[TrainingSequence], parallel: ParallelConfig, *, packing: bool, pad: int, device: torch.device
) -> list[Microbatch]:
    """Microbatches of one shape [rows, row_tokens] for all sequences; at least one, empty ones at the end.

    Args:
        sequences: may be empty.
        parallel: a microbatch holds at most `microbatch_tokens`, padding included; a longer row has its own microbatch.
        packing: fill rows with several sequences instead of padding.
        pad: token id of padding.
        device: where the tensors go.
    """
    longest = max((len(sequence.tokens) for sequence in sequences), default=1)
    row_tokens = rounded_up(max(longest, parallel.microbatch_tokens) if packing else longest, row_multiple(parallel))
    # [rows][sequences in the row]
    layout = _pack(sequences, row_tokens) if packing else [[sequence] for sequence in sequences]
    rows = []
    for members in layout:
        # one after another: a sequence of S tokens that ends at `end` occupies positions [end - S, end)
        ends = itertools.accumulate(len(sequence.tokens) for sequence in members)
        rows.append([(s, torch.arange(end - len(s.tokens), end)) for s, end in zip(members, ends, strict=True)])
    parts, rows_each = _parts(rows, parallel, row_tokens)
    return [_microbatch(part, (rows_each, row_tokens), pad, device, packing=packing) for part in parts]


def collate_groups(
    groups: Sequence[TrainingGroup], parallel: ParallelConfig, *, pad: int, device: torch.device
) -> list[Microbatch]:
    """As `collate`, for rollouts: those of one prompt share a row, as many as `microbatch_tokens` holds.

    A row is [prompt | response 0 | response 1 | ... | padding], each response padded to the longest of all groups.

    Args:
        groups: with prompts of one length, else ValueError; may be empty: a rank whose groups were all dropped still
            takes part.
        parallel: see `collate`.
        pad: token id of padding.
        device: where the tensors go.
    """
    lengths = {group.prompt_tokens for group in groups}
    if len(lengths) > 1:
        raise ValueError(
            f"prompts of {sorted(lengths)} tokens in one batch: all responses must begin at one position; give "
            "every prompt the same instruction and vlcot.lq_size_px"
        )
    sequences = [sequence for group in groups for sequence in group.sequences]
    prompt = max(lengths, default=0)
    response = max((len(sequence.tokens) - prompt for sequence in sequences), default=1)
    guided = any(sequence.image_blocks is not None for sequence in sequences)
    streams = 2 if guided else 1
    largest = max((len(group.sequences) for group in groups), default=1)
    # how many responses of one length fit beside their prompt: a group larger than that takes several rows
    shared = fitting_branches(prompt, response, largest, parallel, streams)
    row_tokens = rounded_up(shared.tokens, row_multiple(parallel))
    layout = [
        group.sequences[i : i + shared.count] for group in groups for i in range(0, len(group.sequences), shared.count)
    ]
    rows = [[(s, _branch(s, shared, number)) for number, s in enumerate(members)] for members in layout]
    parts, rows_each = _parts(rows, parallel, row_tokens * streams)
    return [_microbatch(part, (rows_each, row_tokens), pad, device, shared=shared, guided=guided) for part in parts]


def _pack(sequences: Sequence[TrainingSequence], row_tokens: int) -> list[list[TrainingSequence]]:
    """Sequences of each row, by first-fit decreasing bin packing; within a row they keep their order."""
    free: list[int] = []  # unused tokens of each row
    layout: list[list[int]] = []
    for number in sorted(range(len(sequences)), key=lambda n: -len(sequences[n].tokens)):
        length = len(sequences[number].tokens)
        row = next((row for row, room in enumerate(free) if room >= length), len(free))
        if row == len(free):
            free.append(row_tokens)
            layout.append([])
        free[row] -= length
        layout[row].append(number)
    return [[sequences[number] for number in sorted(row)] for row in sorted(layout)]


def _branch(sequence: TrainingSequence, shared: Branches, number: int) -> Tensor:
    """Positions in the row, int64 [S], of a sequence's tokens: the shared prompt's, then those of response `number`."""
    start = shared.prompt + number * shared.response
    return torch.cat([torch.arange(shared.prompt), torch.arange(start, start + len(sequence.tokens) - shared.prompt)])


def _parts(rows: list[list[Placed]], parallel: ParallelConfig, row_tokens: int) -> tuple[list[list[list[Placed]]], int]:
    """Distribute the rows over equally large microbatches: the rows of each, and the number of rows that each has."""
    most = max(1, parallel.microbatch_tokens // row_tokens)
    count, each = even_parts(len(rows), most, microbatch_multiple(parallel))
    return [rows[start * each : (start + 1) * each] for start in range(count)], each


def _microbatch(
    rows: list[list[Placed]],
    shape: tuple[int, int],
    pad: int,
    device: torch.device,
    *,
    packing: bool = False,
    shared: Branches | None = None,
    guided: bool = False,
) -> Microbatch:
    """Write the placed sequences into tensors of `shape` [rows, row_tokens]; missing rows are padding."""
    # [rows, S] each; -1: padding
    tokens, segments, blocks = torch.full(shape, pad), torch.full(shape, -1), torch.full(shape, -1)
    losses = []
    for row, members in enumerate(rows):
        for number, (sequence, places) in enumerate(members):
            tokens[row, places] = sequence.tokens  # each branch writes the same prompt to the same places
            segments[row, places] = number
            if sequence.image_blocks is not None:
                blocks[row, places] = sequence.image_blocks
            # loss positions: from the sequence [S], to the row [row_tokens], to the flattened [rows x row_tokens]
            losses.append(replace(sequence.loss, positions=row * shape[1] + places[sequence.loss.positions]))
    return Microbatch(
        # the unconditional twins hold the same tokens and follow all the conditional rows: [2 rows, S]
        tokens=(tokens.repeat(2, 1) if guided else tokens).to(device),
        segment_ids=segments.to(device) if packing else None,
        branches=shared,
        image_blocks=blocks.to(device) if guided else None,
        loss=_joined(losses, device) if losses else None,
    )


def joined_microbatch(parts: Sequence[Microbatch]) -> Microbatch:
    """Several microbatches of one shape joined to one with all their rows, for scoring.

    Fields that only the loss needs (`LossTokens.rollouts`) are dropped.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    streams = 1 if first.image_blocks is None else 2
    # [streams x rows, S] each -> [streams, parts x rows, S]: first all conditional rows, then all their twins
    tokens = torch.cat([part.tokens.unflatten(0, (streams, -1)) for part in parts], 1).flatten(0, 1)
    # loss positions index one stream, flattened [rows x S], so part number k starts k x rows x S further on
    stream_tokens = first.tokens.numel() // streams
    losses = [
        replace(part.loss, positions=part.loss.positions + number * stream_tokens, rollouts=None)
        for number, part in enumerate(parts)
        if part.loss is not None
    ]
    return Microbatch(
        tokens=tokens,
        segment_ids=_cat([part.segment_ids for part in parts]),
        branches=first.branches,
        image_blocks=_cat([part.image_blocks for part in parts]),
        loss=_joined(losses, tokens.device) if losses else None,
    )


def _joined(parts: Sequence[LossTokens], device: torch.device) -> LossTokens:
    """The loss tokens of all parts, [n1 + n2 + ...] in order; their rollouts are numbered consecutively."""
    rollouts = [part.rollouts for part in parts if part.rollouts is not None]
    return LossTokens(
        positions=torch.cat([part.positions for part in parts]).to(device),
        targets=torch.cat([part.targets for part in parts]).to(device),
        mask_ids=torch.cat([part.mask_ids for part in parts]).to(device),
        temperature=torch.cat([part.temperature for part in parts]).to(device),
        support=_cat([part.support for part in parts], device),
        cfg_scale=_cat([part.cfg_scale for part in parts], device),
        rollouts=_joined_rollouts(rollouts, device) if rollouts else None,
    )


def _joined_rollouts(parts: Sequence[RolloutTokens], device: torch.device) -> RolloutTokens:
    """The tokens of all parts, [n1 + n2 + ...], of N1 + N2 + ... rollouts; scores are added to the result later."""
    # number of each part's first rollout in the joined batch: 0, N1, N1 + N2, ...
    firsts = itertools.accumulate((len(part.advantages) for part in parts[:-1]), initial=0)
    return RolloutTokens(
        rollout=torch.cat([part.rollout + first for part, first in zip(parts, firsts, strict=True)]).to(device),
        column=torch.cat([part.column for part in parts]).to(device),
        advantages=torch.cat([part.advantages for part in parts]).to(device),
        rollout_logprobs=torch.cat([part.rollout_logprobs for part in parts]).to(device),
        token_advantages=_cat([part.token_advantages for part in parts], device),
    )


def _cat(values: Sequence[Tensor | None], device: torch.device | None = None) -> Tensor | None:
    """Concatenate along the first dim; None if no part has the value. Either all parts have it or none."""
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values)), "some parts of a batch have a column that others lack"
    return torch.cat(present).to(device) if present else None
