"""Scored groups become updates: each loss token has its sampling conditions and the inputs of the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from realsr_hpc.parallel.pipeline import run_pipeline
from realsr_hpc.records import Case, GroupRewards, RolloutGroup, ScoredGroup
from realsr_hpc.train.experience import collect
from realsr_hpc.train.grpo import score_before_updates
from realsr_hpc.train.objective import objective
from realsr_hpc.train.scoring import with_columns
from realsr_hpc.train.updates import every_nth_rollout, grpo_batches, training_group
from tests.steps import Images, small_parts

torch.set_num_threads(1)
GUIDED = {"cfg_scale": 3.0, "temperature": 0.9, "text_temperature": 0.5}


def test_a_rollouts_loss_tokens_carry_what_they_were_drawn_under():
    masks = small_parts(rollout=GUIDED).sampler.masks
    image, text = int(masks.image.int().argmax()), int(masks.image.int().argmin())
    inside, outside = int(masks.continues_block.int().argmax()), int(masks.continues_block.int().argmin())
    rollouts = RolloutGroup(
        prompt=torch.tensor([outside, outside, inside]),
        tokens=torch.tensor([[outside, inside, outside, inside], [outside, inside, 1, 1], [outside, 1, 1, 1]]),
        lengths=torch.tensor([4, 2, 1]),
        rollout_logprobs=torch.tensor([[0.0, -0.1, 0.0, -0.3], [-0.4, -0.5, 0.0, 0.0], [0.0] * 4]),
        forced=torch.tensor([[True, False, True, False], [False, False, True, True], [True] * 4]),
        mask_ids=torch.tensor([[text, image, text, text], [image, text, text, text], [text] * 4]),
        support=torch.arange(12, dtype=torch.uint8).view(3, 4, 1),
    )
    rewards = GroupRewards(torch.zeros(3), {}, {})
    scored = ScoredGroup(Case("x", torch.zeros(1).numpy()), rollouts, (), (), rewards, torch.tensor([0.7, -0.3, -0.4]))
    credit = torch.arange(12.0).view(3, 4)
    group = training_group(scored, masks, credit)
    assert group.prompt_tokens == 3 and len(group.sequences) == 2  # nothing of the third was chosen
    first, second = group.sequences
    assert first.tokens.tolist() == [outside, outside, inside, outside, inside, outside, inside]
    assert second.tokens.tolist() == [outside, outside, inside, outside, inside]  # without its padding
    assert first.image_blocks.tolist() == [1, 2, 2, 3, 3, 4, 4] and second.image_blocks.tolist() == [1, 2, 2, 3, 3]
    for sequence, row, places, warmth, scales in (
        (first, 0, [1, 3], [0.9, 0.5], [3.0, 1.0]),
        (second, 1, [0, 1], [0.9, 0.5], [3.0, 1.0]),
    ):
        loss, of_rollout = sequence.loss, sequence.loss.rollouts
        assert loss.positions.tolist() == [place + 2 for place in places]
        assert loss.targets.tolist() == rollouts.tokens[row, places].tolist()
        assert loss.mask_ids.tolist() == rollouts.mask_ids[row, places].tolist()
        assert loss.temperature.tolist() == pytest.approx(warmth) and loss.cfg_scale.tolist() == scales
        assert loss.support.tolist() == rollouts.support[row, places].tolist()
        assert (of_rollout.rollout.tolist(), of_rollout.column.tolist()) == ([0, 0], [0, 1])
        assert of_rollout.advantages.tolist() == scored.advantages[row : row + 1].tolist()
        assert of_rollout.rollout_logprobs.tolist() == rollouts.rollout_logprobs[row, places].tolist()
        assert of_rollout.token_advantages.tolist() == credit[row, places].tolist()
    assert training_group(scored, small_parts().sampler.masks).sequences[0].loss.cfg_scale is None


def test_updates_take_every_nth_rollout_of_all_groups():
    parts = small_parts()
    groups = [training_group(group, parts.sampler.masks) for group in collect(parts, Images([0, 1]))]
    parts_of_three = [every_nth_rollout(groups, first, 3) for first in range(3)]
    assert [[len(group.sequences) for group in share] for share in parts_of_three] == [[2, 1], [1, 2], [1, 1]]
    assert parts_of_three[1][1].sequences[1] is groups[1].sequences[3]
    assert [len(every_nth_rollout(groups, first, 8)) for first in range(8)] == [1] * 8  # without empty groups


def test_the_loss_is_that_of_the_whole_update():
    """Old policy and reference shifted by known numbers: every term of the loss and its metrics, by hand."""
    parts = small_parts(
        grpo={"kl_beta": 0.3, "entropy_weight": 0.2, "aggregation": "dr_grpo", "updates_per_step": 2},
        parallel={"microbatch_tokens": 300},
    )
    batch = grpo_batches(parts, collect(parts, Images([0, 1])), parts.sampler.masks)[0]
    assert batch.num_rollouts_global == 4
    scored = score_before_updates(parts, parts.group_microbatches(batch.groups))
    assert len(scored) > 1
    moved = []
    for microbatch in scored:
        logprobs = microbatch.loss.rollouts.old_logprobs
        assert torch.equal(logprobs, microbatch.loss.rollouts.reference_logprobs)  # at the start they are one
        moved.append(with_columns(microbatch, old_logprobs=logprobs + 0.2, reference_logprobs=logprobs - 0.3))
    loss = objective(parts.config, parts.policy, batch, parts.sampler.masks)
    found = parts.total(run_pipeline(parts.policy, moved, loss, forward_only=True))
    of_rollouts = [sequence.loss for group in batch.groups for sequence in group.sequences]
    num_tokens, scale = sum(len(each.positions) for each in of_rollouts), 4 * parts.config.rollout.max_new_tokens
    divergence, ratio = math.exp(-0.3) - 1 + 0.3, math.exp(-0.2)
    gains = sum(float(each.rollouts.advantages) * len(each.positions) for each in of_rollouts)
    entropy = found["grpo/entropy/mean"]
    assert num_tokens == batch.num_tokens_global and 0.5 < entropy < math.log(parts.vocabulary.size)
    assert found["grpo/ratio/mean"] == pytest.approx(ratio, rel=1e-4)
    assert found["grpo/kl_reference/mean"] == pytest.approx(divergence, rel=1e-3)
    assert found["grpo/policy_loss/mean"] == pytest.approx(-ratio * gains / scale, rel=1e-3, abs=1e-6)
    others = (0.3 * divergence - 0.2 * entropy) * num_tokens / scale
    assert found["grpo/loss/mean"] == pytest.approx(others - ratio * gains / scale, rel=1e-3, abs=1e-6)
    # the sampler is compared with the policy that sampled, here 0.2 above it
    assert found["rollout/mismatch_abs"] == pytest.approx(0.2, rel=1e-3)
    assert found["rollout/mismatch_kl"] == pytest.approx(math.exp(0.2) - 1 - 0.2, rel=1e-3)


def test_microbatches_are_scored_together_as_alone(monkeypatch):
    """Three microbatches of guided rollouts, two per pass: a microbatch without loss fills the second pass."""
    from realsr_hpc.train import scoring

    parts = small_parts(rollout=GUIDED, parallel={"microbatch_tokens": 700})
    batch = grpo_batches(parts, collect(parts, Images([0, 1, 2])), parts.sampler.masks)[0]
    microbatches = parts.group_microbatches(batch.groups)[:3]
    rows, row_tokens = microbatches[0].tokens.shape
    passes: list[torch.Size] = []
    run = run_pipeline

    def watched(policy, given, *rest, **options):
        passes.extend(microbatch.tokens.shape for microbatch in given)
        return run(policy, given, *rest, **options)

    monkeypatch.setattr(scoring, "run_pipeline", watched)
    allowed = parts.sampler.masks.allowed
    alone = scoring.logprobs_of(parts.policy, microbatches, allowed)
    assert passes == [(rows, row_tokens)] * 3
    for options, expected in (
        ({"at_once": 2}, [(2 * rows, row_tokens)] * 2),
        ({"multiple": 2}, [(rows, row_tokens)] * 4),
    ):
        passes.clear()
        found = scoring.logprobs_of(parts.policy, microbatches, allowed, **options)
        assert passes == expected and len(found) == 3
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            assert not one.requires_grad
    without_loss = replace(microbatches[1], loss=None)
    [first, nothing] = scoring.logprobs_of(parts.policy, [microbatches[0], without_loss], allowed, at_once=2)
    assert nothing is None and len(first) == len(alone[0])
    assert scoring.logprobs_of(parts.policy, [without_loss] * 2, allowed, at_once=2) == [None, None]
