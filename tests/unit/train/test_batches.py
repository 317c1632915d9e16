"""Rows of training sequences: the position of every token, with shared prompts, packing and padding."""

from __future__ import annotations

import pytest
import torch

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import LossTokens, RolloutTokens, TrainingGroup, TrainingSequence
from realsr_hpc.train.batches import collate, collate_groups, joined_microbatch, plain_sequence

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
            torch.zeros(count, dtype=torch.long),
            torch.arange(count),
            torch.tensor([float(number)]),
            positions / 100,
            token_advantages=positions / 50,
        )
        targets = tokens[positions + 1]
        loss = LossTokens(positions, targets, *drawn_under(targets, guided), rollouts=of_rollout)
        sequences.append(TrainingSequence(tokens, loss, torch.arange(len(tokens)) // 4 if guided else None))
    return TrainingGroup(prompt_tokens, tuple(sequences))


def drawn_under(targets: torch.Tensor, guided: bool) -> tuple[torch.Tensor | None, ...]:
    """Mask, temperature, support and scale of each loss token: numbers that identify the target they belong to."""
    return targets % 7, targets / 10, targets[:, None].byte(), targets / 5 if guided else None


def every_sequence(groups: list[TrainingGroup]) -> list[TrainingSequence]:
    return [sequence for group in groups for sequence in group.sequences]


def learnt(sequences: list[TrainingSequence]) -> list[list[int]]:
    """The predicting and the predicted token of each loss token, in the order of the sequences."""
    return [[int(s.tokens[p]), int(s.tokens[p + 1])] for s in sequences for p in s.loss.positions]


def predicted(batch: Microbatch) -> list[list[int]]:
    """The same from a microbatch: each token with the numbers that it was drawn under."""
    if batch.loss is None:
        return []
    loss, tokens = batch.loss, batch.tokens.flatten()[batch.loss.positions]
    found = (loss.mask_ids, loss.temperature, loss.support, loss.cfg_scale)
    for value, expected in zip(found, drawn_under(loss.targets, batch.image_blocks is not None), strict=True):
        assert (value is None) == (expected is None) and (value is None or torch.equal(value, expected))
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
        assert batch.tokens.numel() <= max(budget, 32)  # of one response: 7 + 10, in steps of 16
    assert found == learnt(every_sequence(groups))
    assert len(batches) == {1: 7, 40: 4, 60: 2, 500: 1}[budget]
    assert sum(int((batch.tokens != PAD).sum()) for batch in batches) == 48 + 7 * num_rows


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_sequence_once(packing):
    sequences = every_sequence([rollouts(0, [9, 3, 10]), rollouts(1, [10, 10, 1, 5])])
    batches = collate(sequences, ParallelConfig(microbatch_tokens=40), packing=packing, pad=PAD, device=CPU)
    found, segments = [], []
    for batch in batches:
        found += predicted(batch)
        assert batch.tokens.shape == (1, 48 if packing else 32)
        assert (batch.segment_ids is not None) == packing
        if batch.segment_ids is not None:
            assert ((batch.segment_ids == -1) == (batch.tokens == PAD)).all()
            [ids] = batch.segment_ids.tolist()
            segments.append(len(set(ids) - {-1}))
            assert ids[: ids.index(-1)] == sorted(ids[: ids.index(-1)])  # one after another
    assert not packing or segments == [3, 3, 1]
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
    assert tokens.rows(tokens.token_advantages)[3].tolist() == pytest.approx([0.12, 0.16, 0.2])


def test_prompts_of_two_lengths_are_refused():
    groups = [rollouts(0, [4]), rollouts(1, [4], prompt_tokens=8)]
    with pytest.raises(ValueError, match=r"prompts of \[7, 8\] tokens"):
        collate_groups(groups, ParallelConfig(), pad=PAD, device=CPU)


def test_microbatches_join_with_their_twins_behind_all_rows():
    groups = [rollouts(number, [4, 4], guided=True) for number in range(3)]
    parts = collate_groups(groups, ParallelConfig(microbatch_tokens=30), pad=PAD, device=CPU)
    assert len(parts) == 3 and all(part.tokens.shape == (2, 16) for part in parts)
    blocks = [0, 0, 0, 0, 1, 1, 1, *[1, 2, 2, 2] * 2, -1]  # the prompt's and each response's own; -1: padding
    assert parts[0].image_blocks.tolist() == [blocks]
    joined = joined_microbatch(parts)
    assert torch.equal(joined.tokens[:3], joined.tokens[3:]) and torch.equal(joined.tokens[1], parts[1].tokens[0])
    assert joined.image_blocks is not None and joined.image_blocks.shape == (3, 16) and joined.segment_ids is None
    assert joined.branches == parts[0].branches is not None
    assert predicted(joined) == learnt(every_sequence(groups))


def test_rows_are_packed_tightly_and_sequences_keep_their_order():
    """Longest first, rows are filled to the last token: two rows, where any other order needs three."""
    sequences = [plain_sequence(torch.arange(10, 10 + length), 1) for length in (10, 30, 38, 18)]
    (batch,) = collate(sequences, ParallelConfig(microbatch_tokens=96), packing=True, pad=PAD, device=CPU)
    assert batch.tokens.shape == (1, 96)
    rows = collate(sequences, ParallelConfig(microbatch_tokens=48), packing=True, pad=PAD, device=CPU)
    held = [torch.cat([sequences[number].tokens for number in numbers]) for numbers in ((1, 3), (0, 2))]
    assert len(rows) == 2 and all(torch.equal(row.tokens[0], tokens) for row, tokens in zip(rows, held, strict=True))
    joined = joined_microbatch(rows)
    assert torch.equal(joined.segment_ids, torch.cat([row.segment_ids for row in rows]))


def test_a_plain_sequence_predicts_each_token_from_the_one_before():
    sequence = plain_sequence(torch.tensor([50, 60, 70, 80]), first=2)
    assert sequence.loss.positions.tolist() == [1, 2] and sequence.loss.targets.tolist() == [70, 80]
    assert sequence.loss.temperature.tolist() == [1, 1] and sequence.loss.mask_ids.tolist() == [0, 0]
    assert sequence.loss.support is None and sequence.loss.rollouts is None


def test_rows_fit_the_layout():
    """Sequence parallelism cuts rows into 16 tokens a rank; interleaved stages take microbatches in rounds."""
    group, halves = rollouts(0, [9, 3, 10]), ParallelConfig(tp=2, sequence_parallel=True, microbatch_tokens=40)
    assert collate_groups([group], halves, pad=PAD, device=CPU)[0].tokens.shape == (1, 64)
    assert collate([group.sequences[1]], halves, packing=False, pad=PAD, device=CPU)[0].tokens.shape == (1, 32)
    rounds = ParallelConfig(pp=2, virtual_pp=2, microbatch_tokens=16)
    *full, last = collate(group.sequences, rounds, packing=False, pad=PAD, device=CPU)
    assert len(full) == 3 and last.loss is None and last.tokens.eq(PAD).all()


def test_twins_count_in_the_budget():
    """Half of it is left for a group: of 48, 4 of 6 responses fit a row, and 3 and 3 fill two; 64 hold one row."""
    for budget, groups, a_row in ((48, 1, 3), (64, 2, 6)):
        given = [rollouts(number, [4] * 6, guided=True) for number in range(groups)]
        batches = collate_groups(given, ParallelConfig(microbatch_tokens=budget), pad=PAD, device=CPU)
        assert [(batch.tokens.shape, batch.branches.count) for batch in batches] == [((2, 32), a_row)] * 2
