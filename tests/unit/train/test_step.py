"""A GRPO step, the held-out evaluation and the run around them, on real parts with rewards that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realsr_hpc.config.learning import RewardsConfig, RewardTerm, SFTConfig
from realsr_hpc.config.schema import DataConfig
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.paths import resolve
from realsr_hpc.records import Candidate, StepReport
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.rollout.policy_restorer import FIRST_ID
from realsr_hpc.train import sft
from realsr_hpc.train.experience import collect, held_out, heldout_due
from realsr_hpc.train.grpo import heldout_images, step, training_source
from realsr_hpc.train.objective import InexactStep
from realsr_hpc.train.parts import clock
from realsr_hpc.train.training_run import TrainingRun
from realsr_hpc.train.updates import grpo_batches, training_group
from tests.distributed.launcher import run_ranks
from tests.steps import Images, number_of, rising, small_parts

torch.set_num_threads(1)
RESAMPLE = {"zero_variance": "resample", "max_resample_rounds": 2}


def dull(*numbers: int) -> Callable[[Sequence[Candidate]], list[float]]:
    """A rule for rewards: all rollouts of these images get the same."""
    return lambda items: [
        0.5 if number_of(item) in numbers else up for item, up in zip(items, rising(items), strict=True)
    ]


def keys(groups) -> list[str]:
    return [group.source.key for group in groups]


def test_groups_that_teach_nothing_are_replaced_by_the_next_images():
    """Images 0 and 1, of which 1 teaches; then 2 and 3 in two rounds, of which the first that is missing is taken."""
    parts, source = small_parts(dull(0, 2), grpo=RESAMPLE), Images([0, 1], advance=True)
    report = step(parts, source, 1)
    assert keys(report.groups) == ["1", "4"] and source.batches == 3
    assert report.metrics["grpo/dropped_groups/mean"] == 0 and report.metrics["optim/grad_norm/step"] > 1e-3


def test_resampling_ends_when_all_teach_or_the_rounds_are_spent():
    parts = small_parts(dull(1, 2, 4, 6), grpo=RESAMPLE)
    every, some = Images([7, 8]), Images([0, 1], advance=True)
    assert keys(collect(parts, every)) == ["7", "8"] and every.batches == 1
    groups = collect(parts, some)
    assert keys(groups) == ["0", "4"] and some.batches == 3
    batch = grpo_batches(parts, groups, parts.sampler.masks)[0]
    assert len(batch.groups) == 1 and batch.num_rollouts_global == 4


def test_without_resampling_a_dull_group_is_dropped_or_kept():
    for choice, left in (("drop", 1), ("keep", 2)):
        parts, source = small_parts(dull(0), grpo={"zero_variance": choice}), Images([0, 1])
        groups = collect(parts, source)
        assert keys(groups) == ["0", "1"] and source.batches == 1
        assert len(grpo_batches(parts, groups, parts.sampler.masks)[0].groups) == left


def test_a_step_that_can_learn_nothing_makes_no_update():
    """An update of zeros would still move the weights, by Adam's momentum, and advance the learning rate."""
    parts = small_parts(dull(0, 1))
    report = step(parts, Images([0, 1]), 1)
    assert report.metrics["grpo/dropped_groups/mean"] == 1 and "grpo/loss/mean" not in report.metrics
    assert parts.optimiser.num_updates == 0


def resampled_on_a_rank() -> tuple[list[str], int, list[int]]:
    """Rank 0's image 0 has equal rewards; rank 1's two do not. Also the rollouts and loss tokens of an update."""
    torch.set_num_threads(1)
    parts = small_parts(dull(0), grpo=RESAMPLE)
    source = Images([0, 1] if parts.groups.dp_rank == 0 else [50, 51], advance=True)
    groups = collect(parts, source)
    [batch] = grpo_batches(parts, groups[: 1 + parts.groups.dp_rank], parts.sampler.masks)
    mine = [len(sequence.loss.positions) for group in batch.groups for sequence in group.sequences]
    outputs = [[{"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}], [{"b": torch.tensor(5.0)}]][parts.groups.dp_rank]
    assert parts.total(outputs) == {"a": 3.0, "b": 5.0}  # microbatches and ranks, also where one has none
    assert parts.slowest({"time/x/s": float(parts.groups.dp_rank)}) == {"time/x/s": 1.0}
    return keys(groups), source.batches, [len(mine), sum(mine), batch.num_rollouts_global, batch.num_tokens_global]


def test_all_ranks_take_as_many_rounds_and_count_the_updates_of_all():
    """All ranks share one order of images: a rank that needs no more reads on with the others and keeps its groups."""
    (first, second) = run_ranks(2, resampled_on_a_rank)
    assert first[:2] == (["1", "2"], 2) and second[:2] == (["50", "51"], 2)
    together = [4 + 8, first[2][1] + second[2][1]]
    assert [first[2], second[2]] == [[4, first[2][1], *together], [8, second[2][1], *together]]


def test_advantages_are_the_rewards_centred_in_their_group():
    parts = small_parts(grpo={"advantage": "mean", "updates_per_step": 2})
    groups = collect(parts, Images([0, 1]))
    for group in groups:
        assert group.advantages is not None
        torch.testing.assert_close(group.advantages, torch.tensor([-0.4, 0.2, -0.2, 0.4]))
        torch.testing.assert_close(group.rewards.total, torch.tensor([0.1, 0.7, 0.3, 0.9]))
    batches = grpo_batches(parts, groups, parts.sampler.masks)
    gains = [
        [round(float(s.loss.rollouts.advantages), 3) for g in batch.groups for s in g.sequences] for batch in batches
    ]
    assert gains == [[-0.4, -0.2, -0.4, -0.2], [0.2, 0.4, 0.2, 0.4]]


def test_several_updates_begin_at_the_rollouts_policy():
    """The first update has ratio 1 and the last one the ratio to the policy before the first."""
    parts = small_parts(grpo={"updates_per_step": 4, "kl_beta": 0.01}, optim={"lr": 3e-3})
    report = step(parts, Images([0, 1]), 1)
    assert abs(report.metrics["grpo/ratio/mean"] - 1) > 1e-4
    assert report.metrics["grpo/kl_reference/mean"] > 1e-7 and report.metrics["rollout/mismatch_kl"] < 1e-9
    assert report.metrics["optim/lr/step"] == parts.optimiser.vendor.param_groups[0]["lr"] > 0


def test_the_policy_is_held_to_its_reference_and_not_to_itself():
    parts = small_parts(grpo={"kl_beta": 0.01})
    assert parts.policies == [parts.policy, parts.reference] and small_parts().policies[1:] == []
    for parameter in parts.reference.parameters():
        parameter.mul_(1.2)
    assert step(parts, Images([0]), 2).metrics["grpo/kl_reference/mean"] > 1e-3
    with pytest.raises(InexactStep, match="their weights differ"):
        step(parts, Images([0]), 1)


def test_a_sampler_that_tells_other_log_probabilities_stops_the_step():
    parts = small_parts()
    generate = parts.sampler.generate

    def drifted(*arguments):
        groups = generate(*arguments)
        return [replace(group, rollout_logprobs=group.rollout_logprobs - 0.1 * ~group.forced) for group in groups]

    parts.sampler.generate = drifted
    with pytest.raises(InexactStep, match="mismatch_kl_gate"):
        step(parts, Images([0]), 1)


def test_every_rollout_has_a_number_of_its_own_for_its_draws():
    parts = small_parts(grpo={"heldout_rollouts": 2})
    generate, numbers = parts.sampler.generate, []

    def told(prompts, group_size, ids):
        numbers.append([number - ids[0] for number in ids] + [ids[0]])
        return generate(prompts, group_size, ids)

    parts.sampler.generate = told
    collect(parts, Images([3, 5]))
    held_out(parts, Images([3, 5]).next(), 0)
    assert numbers == [[0, 1, 2, 3, 8, 9, 10, 11, 12], [0, 1, 4, 5, 2 * (FIRST_ID + 3)]]
    assert parts.sampler.counts.passes == 0  # a step's counts are those of its training rollouts


def test_the_metrics_of_a_step_are_of_its_groups():
    """The reward fails for one of eight rollouts, as if another process computed it; image 1 has equal rewards."""

    def rule(items):
        if any((number_of(item), item.member) == (0, 2) for item in items):
            raise ValueError("breaks")
        return dull(1)(items)

    parts = small_parts(rule)
    terms = {"told": RewardTerm(kind="format", options={"expert": "http", "url": "http://127.0.0.1:9/terms/told"})}
    parts = replace(parts, config=parts.config.model_copy(update={"rewards": RewardsConfig(terms=terms)}))
    report = step(parts, Images([0, 1]), 1)
    lengths = torch.cat([group.rollouts.lengths for group in report.groups]).double()
    assert report.metrics["rewards/failures/count"] == report.metrics["rewards/failures/told"] == 1
    assert report.metrics["grpo/dropped_groups/mean"] == 0.5
    spread = torch.tensor([0.1, 0.7, 0.0, 0.9]).std() / 2
    assert report.metrics["rewards/total/std_in_group"] == pytest.approx(float(spread))
    assert report.metrics["rewards/told/mean"] == pytest.approx((0.1 + 0.7 + 0.9 + 2.0) / 8)
    assert report.metrics["rollout/length/mean"] == pytest.approx(float(lengths.mean()))
    tokens = report.metrics["rollout/tokens_per_s/mean"] * report.metrics["time/rollout/s"]
    assert tokens == pytest.approx(float(lengths.sum()))
    times = {"time/rollout/s": 5.0}
    with clock(times, "rollout"):
        pass
    assert 5 < times["time/rollout/s"] < 6  # rounds of resampling add up


def test_held_out_images_are_the_first_of_their_split_whenever_they_are_due():
    parts = small_parts(grpo={"heldout_every_steps": 4, "num_steps": 6, "heldout_prompts": 3})
    parts = replace(parts, config=parts.config.model_copy(update={"data": DataConfig(mode="lq_only")}))
    names = [entry.key for entry in read_manifest(resolve(parts.config.data.manifest)).split("heldout").entries]
    assert list(heldout_images(parts).keys) == names[:3]
    assert [number for number in range(7) if heldout_due(parts.config.grpo, number)] == [0, 4, 6]
    assert not any(heldout_due(small_parts().config.grpo, number) for number in range(7))


def test_each_rank_reads_images_of_its_own():
    parts = small_parts(grpo={"prompts_per_step": 4, "heldout_prompts": 2})
    config = parts.config.model_copy(update={"data": DataConfig(mode="lq_only"), "sft": SFTConfig(batch_size=4)})
    for rank in range(2):
        one = replace(parts, config=config, groups=replace(parts.groups, dp_rank=rank, dp_size=2))
        for loader in (training_source(one), sft.training_source(one)):
            assert loader.next().index.tolist() == [2 * rank, 2 * rank + 1]
            loader.close()
        assert heldout_images(one).index.tolist() == [rank]
    three = replace(parts, groups=replace(parts.groups, dp_size=3))
    assert three.per_rank(6, "grpo.prompts_per_step") == 2
    with pytest.raises(ValueError, match="grpo.prompts_per_step is 4, which 3 .* choose a multiple of 3"):
        training_source(three)


@pytest.mark.parametrize("lookahead", [1, 5])
def test_guided_rollouts_are_scored_as_they_were_sampled(lookahead):
    """Sampler and loss cut the unconditional stream at the same token: each image block sees only itself."""
    parts = small_parts(rollout={"cfg_scale": 3.0, "lookahead": lookahead})
    assert step(parts, Images([0, 1]), 1).metrics["rollout/mismatch_kl"] < 1e-9


TRUNCATED = {"image_top_k": 5, "text_top_k": 3, "top_p": 0.8, "temperature": 0.7, "text_temperature": 1.3}


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": TRUNCATED},
        {"model": {"num_kv_heads": 2, "rope_theta": 300.0, "norm_epsilon": 0.3}},
        {"model": {"swin_norm": True}},
    ],
    ids=["truncated", "grouped heads", "swin norm"],
)
def test_rollouts_are_scored_as_they_were_sampled(sections):
    """With truncation the scorer normalises over the surviving tokens that the sampler recorded."""
    metrics = step(small_parts(**sections), Images([0, 1]), 1).metrics
    assert metrics["rollout/mismatch_kl"] < 1e-9 and metrics["rollout/mismatch_abs"] < 1e-4


@pytest.mark.parametrize(("number", "weight"), [(10, 1.0), (15, 2.0), (20, 3.0)])
def test_a_ramped_reward_has_the_weight_of_the_step(number, weight):
    parts = small_parts(weight={"weight": 1.0, "final_weight": 3.0, "ramp_steps": (10, 20)})
    report = step(parts, Images([0]), number)
    assert report.metrics["rewards/told/mean"] == pytest.approx(0.5)
    assert report.metrics["rewards/total/mean"] == pytest.approx(0.5 * weight)
    assert report.groups[0].rewards.weights == {"told": weight}


@pytest.mark.parametrize("rollouts", [1, 2])
def test_held_out_images_are_sampled_alike_at_every_step_and_unlike_training(rollouts):
    parts = small_parts(grpo={"heldout_rollouts": rollouts})
    batch = Images([0, 1]).next()
    first, again = held_out(parts, batch, 0), held_out(parts, batch, 7)
    assert (first.step, again.step) == (0, 7)
    assert first.metrics["heldout/total/mean"] == pytest.approx([0.1, 0.4][rollouts - 1])
    assert first.metrics["heldout/told/mean"] == first.metrics["heldout/total/mean"]
    assert first.metrics["heldout/well_formed/mean"] == 1
    assert all(
        torch.equal(a.rollouts.tokens, b.rollouts.tokens) for a, b in zip(first.groups, again.groups, strict=True)
    )
    assert [len(group.traces) for group in first.groups] == [rollouts] * 2
    assert all((group.advantages is None) == (rollouts == 1) for group in first.groups)
    training = small_parts(grpo={"group_size": 2})
    learnt = collect(training, Images([0, 1]))
    for held, group in zip(first.groups, learnt, strict=True):
        longest = min(held.rollouts.tokens.shape[1], group.rollouts.tokens.shape[1])
        assert not torch.equal(held.rollouts.tokens[0, :longest], group.rollouts.tokens[0, :longest])


def test_greedy_text_carries_no_loss():
    """top-k = 1 leaves one token: it is no draw, and only the 4 + 16 + 36 image codes are learnt."""
    parts = small_parts(rollout={"text_top_k": 1})
    (group,) = collect(parts, Images([0]))
    rollouts, image = group.rollouts, parts.sampler.masks.image
    assert rollouts.forced[~image[rollouts.mask_ids]].all() and (rollouts.rollout_logprobs[rollouts.forced] == 0).all()
    assert [len(s.loss.positions) for s in training_group(group, parts.sampler.masks).sequences] == [56] * 4


def test_decoding_in_bf16_takes_log_probabilities_in_float32():
    """From bf16 logits they would be bf16 numbers with three digits."""
    (group,) = collect(small_parts(precision={"params": "bf16"}), Images([0]))
    logprobs = group.rollouts.rollout_logprobs[~group.rollouts.forced]
    assert logprobs.dtype == torch.float32
    assert (logprobs != logprobs.bfloat16().float()).float().mean() > 0.9


def test_in_bf16_positions_are_rotated_by_angles_of_float32():
    """bf16 knows no odd number above 256: neighbours would stand at one place."""
    parts = small_parts(precision={"params": "bf16"}, model={"rope_theta": 500.0})
    cache = Decoder(parts.policy).new_cache(torch.zeros(1, 3, dtype=torch.long), 1, 400, False)
    size = cache.cos.shape[1]
    angles = torch.arange(403).double()[:, None] / 500.0 ** (torch.arange(0, size, 2).double() / size)
    assert cache.cos.dtype == torch.bfloat16
    torch.testing.assert_close(cache.cos.double(), angles.cos().repeat(1, 2), rtol=0.0, atol=4e-3)
    torch.testing.assert_close(cache.sin.double(), torch.cat([-angles.sin(), angles.sin()], 1), rtol=0.0, atol=4e-3)


@pytest.mark.parametrize(("metric", "sign"), [("rewards/total/mean", 1.0), ("sft/loss/mean", -1.0)])
def test_the_best_steps_keep_their_checkpoints(tmp_path: Path, metric, sign):
    """Measured 1, 3, 2, 0.5, 2.5, 0.1 with two best kept and nothing due before the end; a loss: the same negated."""
    parts = small_parts(checkpoint={"every_steps": 100, "keep_last": 1, "keep_best": 2, "best_metric": metric})
    run, saved = TrainingRun(parts, tmp_path / "run", lambda: False, num_steps=6), []
    for number, measured in enumerate([1.0, 3.0, 2.0, 0.5, 2.5, 0.1], 1):
        run.report(StepReport(number, {metric: sign * measured}), "")
        assert not run.must_stop(number, Images([0]))
        saved.append(sorted(int(path.name[-6:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")))
    run.tracker.close("FINISHED")
    assert saved == [[1], [1, 2], [2, 3], [2, 3], [2, 5], [2, 5, 6]]
