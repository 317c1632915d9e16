"""Rows of training sequences: what stands where, whatever is shared, packed or padded."""

from __future__ import annotations

import pytest
import torch

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.records import TrainingSequence
from realsr_hpc.train.batches import collate, collate_groups

CPU = torch.device("cpu")
PAD = 1


def rollouts(prompt_seed: int, lengths: list[int], prompt_length: int = 7) -> list[TrainingSequence]:
    """Rollouts of one prompt, random tokens from 10; every second token of the response carries loss."""
    generator = torch.Generator().manual_seed(prompt_seed)
    prompt = torch.randint(10, 99, (prompt_length,), generator=generator)
    sequences = []
    for length in lengths:
        response = torch.randint(10, 99, (length,), generator=generator)
        positions = torch.arange(prompt_length - 1, prompt_length + length - 1, 2)
        none = torch.zeros(len(positions))
        sequences.append(
            TrainingSequence(torch.cat([prompt, response]), positions, none.long(), none, none, prompt_length)
        )
    return sequences


def learnt(sequences: list[TrainingSequence]) -> list[list[int]]:
    """Token that predicts and token that is predicted, in the order of the sequences."""
    return [[int(s.tokens[p]), int(s.tokens[p + 1])] for s in sequences for p in s.positions]


@pytest.mark.parametrize(("budget", "a_row"), [(1, 1), (40, 2), (60, 4), (500, 4)])
def test_rollouts_of_a_prompt_share_their_row(budget, a_row):
    num_rows = {1: 7, 2: 4, 4: 2}[a_row]
    sequences = [*rollouts(0, [9, 3, 10]), *rollouts(1, [10, 10, 1, 5])]
    batches = collate_groups(sequences, ParallelConfig(microbatch_tokens=budget), pad=PAD, device=CPU)
    shared = batches[0].branches
    assert shared is not None and (shared.prompt, shared.response, shared.count) == (7, 10, a_row)
    found = []
    for batch in batches:
        tokens = batch.tokens.flatten()[batch.extras["positions"]] if batch.extras else torch.tensor([])
        found += [[int(a), int(b)] for a, b in zip(tokens, batch.extras.get("targets", []), strict=True)]
    assert found == learnt(sequences)
    assert sum(int((batch.tokens != PAD).sum()) for batch in batches) == 48 + 7 * num_rows


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_sequence_once(packing):
    sequences = [*rollouts(0, [9, 3, 10]), *rollouts(1, [10, 10, 1, 5])]
    batches = collate(sequences, ParallelConfig(microbatch_tokens=40), packing=packing, pad=PAD, device=CPU)
    found = []
    for batch in batches:
        tokens = batch.tokens.flatten()[batch.extras["positions"]]
        found += [[int(a), int(b)] for a, b in zip(tokens, batch.extras["targets"], strict=True)]
        if batch.segment_ids is not None:
            assert ((batch.segment_ids == -1) == (batch.tokens == PAD)).all()
    assert sorted(found) == sorted(learnt(sequences))
    assert sum(int((batch.tokens != PAD).sum()) for batch in batches) == sum(len(s.tokens) for s in sequences)


def test_a_rank_without_rollouts_still_takes_part():
    (batch,) = collate_groups([], ParallelConfig(microbatch_tokens=40), pad=PAD, device=CPU)
    assert batch.extras == {}
    assert batch.tokens.shape == (1, 16)
