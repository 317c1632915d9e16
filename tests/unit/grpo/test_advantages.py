"""Advantages against the formulas written out by hand, and their edges."""

import math

import pytest
import torch

from realsr_hpc.config.learning import GRPOConfig
from realsr_hpc.grpo.advantages import (
    configured_advantages,
    contributions,
    group_advantages,
    mixed_advantages,
    place_advantages,
    zero_variance,
)

torch.set_num_threads(1)
REWARDS = [1.0, 0.0, 0.5, 0.25]


def by_hand(kind: str, unbiased: bool, epsilon: float) -> list[float]:
    mean = sum(REWARDS) / 4
    variance = sum((r - mean) ** 2 for r in REWARDS) / (3 if unbiased else 4)
    if kind == "mean_std":
        return [(r - mean) / (variance**0.5 + epsilon) for r in REWARDS]
    if kind == "mean":
        return [r - mean for r in REWARDS]
    return [r - (sum(REWARDS) - r) / 3 for r in REWARDS]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kind", ["mean_std", "mean", "leave_one_out"])
def test_advantages_are_the_published_formulas(kind, unbiased):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    got = group_advantages(rewards, kind=kind, unbiased_std=unbiased, epsilon=1e-4)
    assert got.tolist() == pytest.approx(by_hand(kind, unbiased, 1e-4), abs=1e-12)


def test_groups_do_not_see_each_other():
    rewards = torch.rand(3, 5)
    together = group_advantages(rewards)
    for row, expected in zip(rewards, together, strict=True):
        assert torch.equal(group_advantages(row), expected)


@pytest.mark.parametrize("kind", ["mean_std", "mean", "leave_one_out"])
def test_equal_rewards_give_exactly_nothing(kind):
    assert group_advantages(torch.full((2, 7), 0.1), kind=kind).eq(0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


def test_normalising_each_reward_frees_the_mixture_from_their_scales():
    small, large = torch.tensor([0.0, 0.01, 0.0, 0.0]), torch.tensor([0.0, 0.0, 100.0, 0.0])
    weights = {"small": 1.0, "large": 1.0}
    each = mixed_advantages({"small": small, "large": large}, weights, epsilon=1e-9)
    assert each[1].item() == pytest.approx(each[2].item(), rel=1e-4)
    summed = mixed_advantages({"small": small, "large": large}, weights, normalise_each=False, epsilon=1e-9)
    assert summed[1].item() == pytest.approx(summed[0].item(), abs=1e-3)


def test_weights_scale_each_normalised_reward_and_not_their_sum():
    breakdown = {"a": torch.tensor([0.0, 1.0, 0.5]), "b": torch.tensor([3.0, 1.0, 1.0])}
    weights = {"a": 2.0, "b": 0.5}
    expected = 2.0 * group_advantages(breakdown["a"]) + 0.5 * group_advantages(breakdown["b"])
    torch.testing.assert_close(mixed_advantages(breakdown, weights), expected)
    total = 2.0 * breakdown["a"] + 0.5 * breakdown["b"]
    torch.testing.assert_close(mixed_advantages(breakdown, weights, normalise_each=False), group_advantages(total))


def test_a_constant_reward_does_not_touch_the_others():
    varied = torch.tensor([0.0, 1.0, 0.5])
    mixed = mixed_advantages({"a": varied, "b": torch.ones(3)}, {"a": 1.0, "b": 10.0})
    torch.testing.assert_close(mixed, group_advantages(varied))


def test_recipe_options_reach_the_formula():
    breakdown = {"a": torch.tensor([0.0, 1.0, 0.5])}
    config = GRPOConfig(advantage="leave_one_out", normalise_each_reward=False)
    got = configured_advantages(breakdown, {"a": 1.0}, config)
    torch.testing.assert_close(got, group_advantages(breakdown["a"], kind="leave_one_out"))
    for normalise in (True, False):
        config = GRPOConfig(unbiased_std=False, advantage_epsilon=0.3, normalise_each_reward=normalise)
        expected = group_advantages(breakdown["a"], unbiased_std=False, epsilon=0.3)
        torch.testing.assert_close(configured_advantages(breakdown, {"a": 1.0}, config), expected)
        shares = contributions(breakdown, {"a": 1.0}, config)
        torch.testing.assert_close(shares["a"].float(), expected, rtol=1e-5, atol=1e-6)


def test_contributions_of_a_group_whose_sum_ties_are_nothing():
    """Each reward varies but their weighted sum is constant: without normalising each, all advantages are 0."""
    breakdown = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0])}
    config = GRPOConfig(normalise_each_reward=False)
    assert all(share.eq(0).all() for share in contributions(breakdown, {"a": 2.0, "b": 2.0}, config).values())


def test_unweighted_rewards_are_refused():
    with pytest.raises(ValueError, match="one weight"):
        mixed_advantages({"a": torch.ones(2)}, {"b": 1.0})


def test_zero_variance_is_a_verdict_per_group():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.9]])
    assert zero_variance(rewards).tolist() == [True, False]


def test_differences_up_to_a_millionth_are_rounding():
    """Within the tolerance the advantages of a group are exactly 0, not small; beyond it they are not 0."""
    rewards = 0.5 + torch.tensor([[0.0, 0.9e-6], [0.0, 1.1e-6]], dtype=torch.float64)
    assert zero_variance(rewards).tolist() == [True, False]
    got = group_advantages(rewards, kind="mean")
    assert got[0].eq(0).all() and got[1].ne(0).all()


def test_advantages_of_float32_rewards_are_computed_in_float64():
    """Far from 0 the group's mean cannot be represented in float32."""
    rewards = 1000 + torch.arange(6) * 0.01
    expected = group_advantages(rewards.double(), kind="mean")
    torch.testing.assert_close(group_advantages(rewards, kind="mean"), expected.float(), rtol=1e-5, atol=0)


def test_places_share_one_divisor_with_its_epsilon_and_teach_nothing_where_rollouts_agree():
    """Two rollouts, three places: the variances are 2, 0, and 0 where only one rollout has a score."""
    scores = torch.tensor([[1.0, 5.0, torch.nan], [3.0, 5.0, 2.0]])
    step = 1 / (math.sqrt(2 / 3) + 0.5)
    expected = torch.tensor([[-step, 0.0, torch.nan], [step, 0.0, 0.0]])
    torch.testing.assert_close(place_advantages(scores, epsilon=0.5), expected, equal_nan=True)
    assert place_advantages(torch.ones(3, 4)).eq(0).all()
    far = 1000 + torch.arange(6).view(2, 3) * 0.01  # no float32 number is the mean
    torch.testing.assert_close(place_advantages(far), place_advantages(far.double()).float(), rtol=1e-5, atol=0)
