"""Rows of training sequences: what stands where, whatever is shared, packed or padded."""

from __future__ import annotations

import pytest
import torch

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import LossTokens, RolloutTokens, TrainingGroup, TrainingSequence
from realsr_hpc.train.batches import collate, collate_groups, joined_microbatch

CPU = torch.device("cpu")
PAD = 1


def rollouts(prompt_seed: int, lengths: list[int], prompt_tokens: int = 7, guided: bool = False) -> TrainingGroup:
    """Rollouts of one prompt, random tokens from 10; every second token of the response carries loss."""
    generator = torch.Generator().manual_seed(prompt_seed)
    prompt = torch.randint(10, 99, (prompt_tokens,), generator=generator)
    sequences = []
    for number, length in enumerate(lengths):
        tokens = torch.cat([prompt, torch.randint(10, 99, (length,), generator=generator)])
        positions = torch.arange(prompt_tokens - 1, prompt_tokens + length - 1, 2)
        count = len(positions)
        of_rollout = RolloutTokens(
            torch.zeros(count, dtype=torch.long), torch.arange(count), torch.tensor([float(number)]), positions / 100
        )
        zeros = torch.zeros(count)
        loss = LossTokens(positions, tokens[positions + 1], zeros.long(), zeros, rollouts=of_rollout)
        sequences.append(TrainingSequence(tokens, loss, torch.arange(len(tokens)) // 4 if guided else None))
    return TrainingGroup(prompt_tokens, tuple(sequences))


def every_sequence(groups: list[TrainingGroup]) -> list[TrainingSequence]:
    return [sequence for group in groups for sequence in group.sequences]


def learnt(sequences: list[TrainingSequence]) -> list[list[int]]:
    """Token that predicts and token that is predicted, in the order of the sequences."""
    return [[int(s.tokens[p]), int(s.tokens[p + 1])] for s in sequences for p in s.loss.positions]


def predicted(batch: Microbatch) -> list[list[int]]:
    """The same, as a microbatch has it."""
    if batch.loss is None:
        return []
    tokens = batch.tokens.flatten()[batch.loss.positions]
    return [[int(a), int(b)] for a, b in zip(tokens, batch.loss.targets, strict=True)]


@pytest.mark.parametrize(("budget", "a_row"), [(1, 1), (40, 2), (60, 4), (500, 4)])
def test_rollouts_of_a_prompt_share_their_row(budget, a_row):
    num_rows = {1: 7, 2: 4, 4: 2}[a_row]
    groups = [rollouts(0, [9, 3, 10]), rollouts(1, [10, 10, 1, 5])]
    batches = collate_groups(groups, ParallelConfig(microbatch_tokens=budget), pad=PAD, device=CPU)
    shared = batches[0].branches
    assert shared is not None and (shared.prompt, shared.response, shared.count) == (7, 10, a_row)
    found = []
    for batch in batches:
        found += predicted(batch)
    assert found == learnt(every_sequence(groups))
    assert sum(int((batch.tokens != PAD).sum()) for batch in batches) == 48 + 7 * num_rows


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_sequence_once(packing):
    sequences = every_sequence([rollouts(0, [9, 3, 10]), rollouts(1, [10, 10, 1, 5])])
    batches = collate(sequences, ParallelConfig(microbatch_tokens=40), packing=packing, pad=PAD, device=CPU)
    found = []
    for batch in batches:
        found += predicted(batch)
        if batch.segment_ids is not None:
            assert ((batch.segment_ids == -1) == (batch.tokens == PAD)).all()
    assert sorted(found) == sorted(learnt(sequences))
    assert sum(int((batch.tokens != PAD).sum()) for batch in batches) == sum(len(s.tokens) for s in sequences)


def test_a_rank_without_rollouts_still_takes_part():
    (batch,) = collate_groups([], ParallelConfig(microbatch_tokens=40), pad=PAD, device=CPU)
    assert batch.loss is None
    assert batch.tokens.shape == (1, 16)


def test_rollouts_of_a_microbatch_are_numbered_through():
    """Two groups of three and two rollouts in one microbatch: each loss token finds its own rollout's advantage."""
    groups = [rollouts(0, [4, 3, 2]), rollouts(1, [6, 1])]
    (batch,) = collate_groups(groups, ParallelConfig(microbatch_tokens=500), pad=PAD, device=CPU)
    assert batch.loss is not None and batch.loss.rollouts is not None
    tokens = batch.loss.rollouts
    assert tokens.advantages.tolist() == [0.0, 1.0, 2.0, 0.0, 1.0]
    assert tokens.rollout.tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 4]
    assert tokens.mask.sum(1).tolist() == [2, 2, 1, 3, 1]
    assert tokens.rows(tokens.rollout_logprobs)[3].tolist() == pytest.approx([0.06, 0.08, 0.1])


def test_prompts_of_two_lengths_are_refused():
    groups = [rollouts(0, [4]), rollouts(1, [4], prompt_tokens=8)]
    with pytest.raises(ValueError, match=r"prompts of \[7, 8\] tokens"):
        collate_groups(groups, ParallelConfig(), pad=PAD, device=CPU)


def test_microbatches_join_with_their_twins_behind_all_rows():
    groups = [rollouts(number, [4, 4], guided=True) for number in range(3)]
    parts = collate_groups(groups, ParallelConfig(microbatch_tokens=30), pad=PAD, device=CPU)
    assert len(parts) == 3 and all(part.tokens.shape == (2, 16) for part in parts)
    joined = joined_microbatch(parts)
    assert torch.equal(joined.tokens[:3], joined.tokens[3:]) and torch.equal(joined.tokens[1], parts[1].tokens[0])
    assert joined.image_blocks is not None and joined.image_blocks.shape == (3, 16) and joined.segment_ids is None
    assert predicted(joined) == learnt(every_sequence(groups))
