"""Training sequences to the equal-shaped microbatches of a pipeline pass.

A microbatch is a few rows of at most `row_tokens` tokens. Rows hold one sequence, or several one after another
(packing: attention stays inside a segment; rotary embeddings are relative, so positions need no reset). What the loss
needs travels beside the tokens in compact form, one entry a loss token. With classifier-free guidance each row has a
twin whose segments are the image blocks: the unconditional stream, scored in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel.layout import even_parts, microbatch_multiple, row_multiple
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import TrainingSequence

SCORED = ("positions", "targets", "mask_ids", "temperature", "support", "cfg_scale")
"""Extras that log-probabilities depend on."""


def collate(
    sequences: Sequence[TrainingSequence], parallel: ParallelConfig, *, packing: bool, pad: int, device: torch.device
) -> list[Microbatch]:
    """Microbatches of one shape [rows, row_tokens] for all sequences; at least one, empty ones at the end.

    Args:
        sequences: may be none: a rank whose groups were all dropped still takes part in the step.
        parallel: a microbatch holds at most its `microbatch_tokens`, padding included; a longer row stands alone.
        packing: fill rows with several sequences instead of padding.
        pad: token id of padding.
        device: where the tensors go.
    """
    longest = max((len(sequence.tokens) for sequence in sequences), default=1)
    target, multiple = max(longest, parallel.microbatch_tokens) if packing else longest, row_multiple(parallel)
    row_tokens = -(-target // multiple) * multiple
    streams = 2 if any(sequence.blocks is not None for sequence in sequences) else 1
    layout = _pack(sequences, row_tokens) if packing else [[number] for number in range(len(sequences))]
    most = max(1, parallel.microbatch_tokens // (row_tokens * streams))
    num_microbatches, rows = even_parts(len(layout), most, microbatch_multiple(parallel))
    members = [[sequences[number] for number in row] for row in layout]
    parts = [members[start * rows : (start + 1) * rows] for start in range(num_microbatches)]
    return [_microbatch(part, (rows, row_tokens), streams, pad, device, packing) for part in parts]


def _pack(sequences: Sequence[TrainingSequence], row_tokens: int) -> list[list[int]]:
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
    return [sorted(row) for row in sorted(layout)]


def _microbatch(
    layout: list[list[TrainingSequence]],
    shape: tuple[int, int],
    streams: int,
    pad: int,
    device: torch.device,
    packing: bool,
) -> Microbatch:
    tokens, segments, blocks = (torch.full(shape, value) for value in (pad, -1, -1))
    columns: dict[str, list[Tensor]] = {}
    rollout = 0
    for row, members in enumerate(layout):
        start = 0
        for sequence in members:
            stop = start + len(sequence.tokens)
            tokens[row, start:stop] = sequence.tokens
            segments[row, start:stop] = rollout
            if sequence.blocks is not None:
                # Blocks of neighbours in a packed row must not meet: their numbers are spread apart.
                blocks[row, start:stop] = sequence.blocks + start
            for name, value in _loss_columns(sequence, row * shape[1] + start, rollout).items():
                columns.setdefault(name, []).append(value)
            start, rollout = stop, rollout + 1
    extras = {name: torch.cat(values).to(device) for name, values in columns.items()}
    if streams == 2:
        tokens, segments = tokens.repeat(2, 1), torch.cat([segments, blocks])
    return Microbatch(tokens.to(device), segments.to(device) if packing or streams == 2 else None, extras)


def _loss_columns(sequence: TrainingSequence, offset: int, rollout: int) -> dict[str, Tensor]:
    """What the loss needs of one sequence; `rollouts` and `columns` say where each token stands in [rollouts, L]."""
    length = len(sequence.positions)
    columns = {
        "positions": sequence.positions + offset,
        "targets": sequence.tokens[sequence.positions + 1],
        "mask_ids": sequence.mask_ids,
        "temperature": sequence.temperature,
        "rollout_logprobs": sequence.rollout_logprobs,
        "rollouts": torch.full((length,), rollout),
        "columns": torch.arange(length),
        "advantages": torch.tensor([sequence.advantage]),
    }
    optional = {"support": sequence.support, "cfg_scale": sequence.cfg_scale}
    return columns | {name: value for name, value in optional.items() if value is not None}


def joined_microbatch(parts: Sequence[Microbatch]) -> Microbatch:
    """Several microbatches of one shape as one with all their rows; of the extras, what scoring needs."""
    if len(parts) == 1:
        return Microbatch(parts[0].tokens, parts[0].segment_ids, dict(parts[0].extras))
    streams = 2 if any("cfg_scale" in part.extras for part in parts) else 1
    extras: dict[str, Tensor] = {}
    for name in SCORED:
        columns = [part.extras[name] for part in parts if name in part.extras]
        if columns:
            extras[name] = torch.cat(columns)
    if extras:
        stream_tokens = parts[0].tokens.numel() // streams
        starts = [part.extras["positions"] + number * stream_tokens for number, part in enumerate(parts) if part.extras]
        extras["positions"] = torch.cat(starts)
    ids = [part.segment_ids for part in parts]
    segments = None if ids[0] is None else _rows_of([part for part in ids if part is not None], streams)
    return Microbatch(_rows_of([part.tokens for part in parts], streams), segments, extras)


def _rows_of(parts: Sequence[Tensor], streams: int) -> Tensor:
    """[streams x b, S] each -> [streams x parts x b, S]: first all conditional rows, then all their twins."""
    return torch.cat([part.unflatten(0, (streams, -1)) for part in parts], 1).flatten(0, 1)


def to_rows(values: Tensor, extras: dict[str, Tensor]) -> Tensor:
    """Compact loss-token values [n] as [rollouts, longest], zero where a rollout has no such token."""
    shape = (len(extras["advantages"]), int(extras["columns"].max()) + 1)
    return values.new_zeros(shape).index_put((extras["rollouts"], extras["columns"]), values)


def loss_mask(extras: dict[str, Tensor]) -> Tensor:
    """bool [rollouts, longest]: where `to_rows` put a value."""
    return to_rows(torch.ones_like(extras["rollouts"]), extras).bool()
