"""Training sequences to the equal-shaped microbatches of a pipeline pass.

A microbatch is a few rows of `row_tokens` tokens. A row holds one sequence, or several one after another (packing:
attention stays inside a segment; rotary embeddings are relative, so positions need no reset), or one prompt and several
of its responses (branches: what they have in common is computed once). What the loss needs travels beside the tokens in
compact form, one entry a loss token. With classifier-free guidance each branched row has a twin, where a token sees its
own image block alone: the unconditional stream, scored in the same pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
from realsr_hpc.records import TrainingSequence

SCORED = ("positions", "targets", "mask_ids", "temperature", "support", "cfg_scale")
"""Extras that log-probabilities depend on."""


Placed = tuple[TrainingSequence, Tensor]
"""A sequence, and where in its row each of its tokens stands."""


def collate(
    sequences: Sequence[TrainingSequence], parallel: ParallelConfig, *, packing: bool, pad: int, device: torch.device
) -> list[Microbatch]:
    """Microbatches of one shape [rows, row_tokens] for all sequences; at least one, empty ones at the end.

    Args:
        sequences: may be none.
        parallel: a microbatch holds at most its `microbatch_tokens`, padding included; a longer row stands alone.
        packing: fill rows with several sequences instead of padding.
        pad: token id of padding.
        device: where the tensors go.
    """
    longest = max((len(sequence.tokens) for sequence in sequences), default=1)
    row_tokens = rounded_up(max(longest, parallel.microbatch_tokens) if packing else longest, row_multiple(parallel))
    layout = _pack(sequences, row_tokens) if packing else [[sequence] for sequence in sequences]
    rows = []
    for members in layout:
        ends = itertools.accumulate(len(sequence.tokens) for sequence in members)
        rows.append([(s, torch.arange(end - len(s.tokens), end)) for s, end in zip(members, ends, strict=True)])
    parts, rows_each = _parts(rows, parallel, row_tokens)
    return [_microbatch(part, (rows_each, row_tokens), pad, device, packing=packing) for part in parts]


def collate_groups(
    sequences: Sequence[TrainingSequence], parallel: ParallelConfig, *, pad: int, device: torch.device
) -> list[Microbatch]:
    """As `collate`, for rollouts: those of one prompt share a row, as many as `microbatch_tokens` holds.

    Args:
        sequences: with prompts of one length; may be none: a rank whose groups were all dropped still takes part.
        parallel: see `collate`.
        pad: token id of padding.
        device: where the tensors go.
    """
    groups = _by_prompt(sequences)
    prompt = max((sequence.prompt_length for sequence in sequences), default=0)
    response = max((len(sequence.tokens) - prompt for sequence in sequences), default=1)
    streams = 2 if any(sequence.blocks is not None for sequence in sequences) else 1
    shared = fitting_branches(prompt, response, max(map(len, groups), default=1), parallel, streams)
    row_tokens = rounded_up(shared.tokens, row_multiple(parallel))
    layout = [members[i : i + shared.count] for members in groups for i in range(0, len(members), shared.count)]
    rows = [[(s, _branch(s, shared, number)) for number, s in enumerate(members)] for members in layout]
    parts, rows_each = _parts(rows, parallel, row_tokens * streams)
    return [_microbatch(part, (rows_each, row_tokens), pad, device, shared=shared, streams=streams) for part in parts]


def _pack(sequences: Sequence[TrainingSequence], row_tokens: int) -> list[list[TrainingSequence]]:
    """First fit, longest first; rows keep the sequences' order inside."""
    free: list[int] = []
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


def _by_prompt(sequences: Sequence[TrainingSequence]) -> list[list[TrainingSequence]]:
    """Sequences that begin with the same prompt, in the order of their first."""
    groups: dict[bytes, list[TrainingSequence]] = {}
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_length].numpy().tobytes()
        groups.setdefault(prompt, []).append(sequence)
    return list(groups.values())


def _branch(sequence: TrainingSequence, shared: Branches, number: int) -> Tensor:
    """Where the tokens of a row's response `number`, and of its prompt, stand."""
    start = shared.prompt + number * shared.response
    return torch.cat([torch.arange(shared.prompt), torch.arange(start, start + len(sequence.tokens) - shared.prompt)])


def _parts(rows: list[list[Placed]], parallel: ParallelConfig, row_tokens: int) -> tuple[list[list[list[Placed]]], int]:
    """The rows of each microbatch, and how many rows one has."""
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
    streams: int = 1,
) -> Microbatch:
    tokens, numbers = torch.full(shape, pad), torch.full(shape, -1)
    columns: dict[str, list[Tensor]] = {}
    for row, members in enumerate(rows):
        for number, (sequence, places) in enumerate(members):
            tokens[row, places] = sequence.tokens
            numbers[row, places] = number if sequence.blocks is None else sequence.blocks
            for name, value in _loss_columns(sequence, row * shape[1] + places).items():
                columns.setdefault(name, []).append(value)
    lengths = torch.tensor([len(values) for values in columns.get("positions", [])], dtype=torch.long)
    extras = {name: torch.cat(values).to(device) for name, values in columns.items()}
    if extras:
        extras["rollouts"] = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    segments = numbers.to(device) if packing or streams == 2 else None
    return Microbatch(tokens.repeat(streams, 1).to(device), segments, shared, extras)


def _loss_columns(sequence: TrainingSequence, places: Tensor) -> dict[str, Tensor]:
    """What the loss needs of one sequence whose tokens stand at `places`; `columns` numbers its loss tokens."""
    columns = {
        "positions": places[sequence.positions],
        "targets": sequence.tokens[sequence.positions + 1],
        "mask_ids": sequence.mask_ids,
        "temperature": sequence.temperature,
        "rollout_logprobs": sequence.rollout_logprobs,
        "columns": torch.arange(len(sequence.positions)),
        "advantages": torch.tensor([sequence.advantage]),
    }
    optional = {"support": sequence.support, "cfg_scale": sequence.cfg_scale}
    return columns | {name: value for name, value in optional.items() if value is not None}


def joined_microbatch(parts: Sequence[Microbatch]) -> Microbatch:
    """Several microbatches of one shape as one with all their rows; of the extras, what scoring needs."""
    first = parts[0]
    if len(parts) == 1:
        return Microbatch(first.tokens, first.segment_ids, first.branches, dict(first.extras))
    # first all conditional rows, then all their twins
    streams = 2 if first.branches is not None and first.segment_ids is not None else 1
    tokens = torch.cat([part.tokens.unflatten(0, (streams, -1)) for part in parts], 1).flatten(0, 1)
    segments = [part.segment_ids for part in parts if part.segment_ids is not None]
    extras: dict[str, Tensor] = {}
    for name in SCORED:
        columns = [part.extras[name] for part in parts if name in part.extras]
        if columns:
            extras[name] = torch.cat(columns)
    if extras:
        stream_tokens = first.tokens.numel() // streams
        starts = [part.extras["positions"] + number * stream_tokens for number, part in enumerate(parts) if part.extras]
        extras["positions"] = torch.cat(starts)
    return Microbatch(tokens, torch.cat(segments) if segments else None, first.branches, extras)


def to_rows(values: Tensor, extras: dict[str, Tensor]) -> Tensor:
    """Compact loss-token values [n] as [rollouts, longest], zero where a rollout has no such token."""
    shape = (len(extras["advantages"]), int(extras["columns"].max()) + 1)
    return values.new_zeros(shape).index_put((extras["rollouts"], extras["columns"]), values)


def loss_mask(extras: dict[str, Tensor]) -> Tensor:
    """bool [rollouts, longest]: where `to_rows` put a value."""
    return to_rows(torch.ones_like(extras["rollouts"]), extras).bool()
