"""Losses and gradients against the published objectives, written here with loops in float64."""

import math

import pytest
import torch

from realsr_hpc.config.learning import GRPOConfig
from realsr_hpc.grpo.loss import GlobalCounts, LossTerms, kl_estimate, mismatch, policy_loss

torch.set_num_threads(1)
N, T = 6, 9


class Batch:
    """Rollouts of several lengths, with a forced token inside each."""

    def __init__(self, seed: int = 0, spread: float = 0.3):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.old = -normal(N, T).abs() - 0.5
        self.policy = (self.old + spread * normal(N, T)).requires_grad_()
        self.rollout = self.old + 0.05 * normal(N, T)
        self.reference = self.old + spread * normal(N, T)
        self.entropy = normal(N, T).abs()
        self.advantages = normal(N)
        lengths = torch.tensor([9, 4, 1, 7, 9, 3])
        self.mask = torch.arange(T) < lengths[:, None]
        self.mask[:, 1] = False
        self.counts = GlobalCounts(int(self.mask.sum()), N, max_tokens=12)

    def terms(self, config: GRPOConfig, rows=slice(None), *, width: int = T, old: bool = True) -> LossTerms:
        cut = (rows, slice(0, width))
        return policy_loss(
            self.policy[cut],
            self.rollout[cut],
            self.advantages[rows],
            self.mask[cut],
            self.reference[cut],
            counts=self.counts,
            config=config,
            old_logprobs=self.old[cut] if old else None,
            entropy=self.entropy[cut],
        )

    def rollouts(self):
        """Per rollout: policy, old, reference, rollout log-probs of its loss tokens, and its advantage."""
        for n in range(N):
            keep = self.mask[n]
            yield (
                self.policy[n][keep],
                self.old[n][keep],
                self.reference[n][keep],
                self.rollout[n][keep],
                self.advantages[n],
            )


def clip_surrogate(policy, old, advantage, low, high):
    ratio = torch.exp(policy - old)
    bounded = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.min(ratio * advantage, bounded * advantage)


def reference_grpo(batch, beta=0.04, epsilon=0.2):
    """DeepSeekMath eq. 3 and 4: mean over rollouts of the token mean of (surrogate - beta k3)."""
    total = 0.0
    for policy, old, reference, _, advantage in batch.rollouts():
        kl = torch.exp(reference - policy) - (reference - policy) - 1
        total = total + (clip_surrogate(policy, old, advantage, epsilon, epsilon) - beta * kl).mean()
    return -total / N


def reference_dr_grpo(batch, epsilon=0.2):
    """Sum over tokens; the length of the rollout appears nowhere."""
    terms = [clip_surrogate(p, o, a, epsilon, epsilon).sum() for p, o, _, _, a in batch.rollouts()]
    return -sum(terms) / (N * batch.counts.max_tokens)


def reference_dapo(batch, low=0.2, high=0.28):
    """Token mean with clip-higher, no KL."""
    terms = [clip_surrogate(p, o, a, low, high) for p, o, _, _, a in batch.rollouts()]
    return -torch.cat(terms).mean()


def reference_gspo(batch, low=3e-2, high=4e-2):
    """GSPO eq. 5 and 7."""
    total = 0.0
    for policy, old, _, _, advantage in batch.rollouts():
        ratio = torch.exp((policy.sum() - old.sum()) / len(policy))
        total = total + torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -total / N


PUBLISHED = {
    "grpo": (reference_grpo, dict(aggregation="sequence", kl_beta=0.04)),
    "dr_grpo": (reference_dr_grpo, dict(aggregation="dr_grpo", kl_beta=0.0)),
    "dapo": (reference_dapo, dict(aggregation="token", kl_beta=0.0, clip_high=0.28)),
    "gspo": (
        reference_gspo,
        dict(aggregation="sequence", importance="sequence", kl_beta=0.0, clip_low=3e-2, clip_high=4e-2),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_loss_and_gradient_equal_the_publication(name):
    reference, options = PUBLISHED[name]
    batch = Batch()
    ours, published = batch.terms(GRPOConfig(**options)).loss, reference(batch)
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad(loss, batch.policy)[0] for loss in (ours, published))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert batch.terms(GRPOConfig(**options)).metrics["grpo/clip_fraction/mean"] > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_split_into_microbatches_gives_the_same_loss_and_gradient(name):
    batch, config = Batch(), GRPOConfig(**PUBLISHED[name][1])
    whole = batch.terms(config)
    (expected,) = torch.autograd.grad(whole.loss, batch.policy)
    split = [batch.terms(config, [1, 2, 5], width=4), batch.terms(config, [0]), batch.terms(config, [4, 3])]
    torch.testing.assert_close(sum(part.loss for part in split), whole.loss, rtol=1e-12, atol=1e-12)
    (got,) = torch.autograd.grad(sum(part.loss for part in split), batch.policy)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[key] for part in split), value, rtol=1e-12, atol=1e-12)


def test_first_update_is_the_plain_policy_gradient():
    batch = Batch()
    terms = batch.terms(GRPOConfig(kl_beta=0.0), old=False)
    (got,) = torch.autograd.grad(terms.loss, batch.policy)
    expected = -(batch.advantages[:, None] * batch.mask) / batch.counts.num_tokens
    torch.testing.assert_close(got, expected)
    assert terms.metrics["grpo/ratio/mean"].item() == pytest.approx(1.0, abs=1e-15)
    assert terms.metrics["grpo/clip_fraction/mean"] == 0


def test_without_bounds_nothing_is_clipped():
    batch = Batch(spread=2.0)
    terms = batch.terms(GRPOConfig(kl_beta=0.0, clip_low=None, clip_high=None))
    ratio = (batch.policy - batch.old).exp()
    expected = -(ratio * batch.advantages[:, None])[batch.mask].mean()
    torch.testing.assert_close(terms.loss, expected)
    assert terms.metrics["grpo/clip_fraction/mean"] == 0


def test_one_open_side_still_clips_the_other():
    batch = Batch(spread=2.0)
    terms = batch.terms(GRPOConfig(kl_beta=0.0, clip_low=None, clip_high=0.2))
    ratio, advantage = (batch.policy - batch.old).exp(), batch.advantages[:, None]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(max=1.2) * advantage)[batch.mask].mean()
    torch.testing.assert_close(terms.loss, expected)


def test_dual_clip_bounds_the_loss_of_bad_rollouts_only():
    batch = Batch(seed=1, spread=2.0)
    terms = batch.terms(GRPOConfig(kl_beta=0.0, dual_clip=1.5))
    total = 0.0
    for policy, old, _, _, advantage in batch.rollouts():
        surrogate = clip_surrogate(policy, old, advantage, 0.2, 0.2)
        total = total + (torch.max(surrogate, 1.5 * advantage) if advantage < 0 else surrogate).sum()
    torch.testing.assert_close(terms.loss, -total / batch.counts.num_tokens)
    assert terms.loss < batch.terms(GRPOConfig(kl_beta=0.0)).loss


MISMATCHES = {
    "truncated": (dict(mismatch_cap=1.02), lambda k: k.clamp(max=1.02)),
    "masked": (dict(mismatch_bounds=(0.97, 1.02)), lambda k: ((k >= 0.97) & (k <= 1.02)).double()),
    "icepop": (
        dict(mismatch_bounds=(0.97, 1.02), mismatch_cap=1.02),
        lambda k: torch.where((k < 0.97) | (k > 1.02), 0.0, k),
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_weights_are_the_published_ones_and_carry_no_gradient(name):
    options, definition = MISMATCHES[name]
    batch = Batch()
    terms = batch.terms(GRPOConfig(kl_beta=0.0, clip_low=None, clip_high=None, **options))
    weight = definition((batch.old - batch.rollout).exp())
    assert 0.1 < weight[batch.mask].mean() < 1.0
    objective = weight * (batch.policy - batch.old).exp() * batch.advantages[:, None]
    expected = -objective[batch.mask].mean()
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["grpo/mismatch_weight/mean"], weight[batch.mask].mean())
    got, wanted = (torch.autograd.grad(loss, batch.policy)[0] for loss in (terms.loss, expected))
    torch.testing.assert_close(got, wanted)


def test_entropy_is_rewarded():
    batch = Batch()
    plain, bonus = (batch.terms(GRPOConfig(kl_beta=0.0, entropy_weight=w)) for w in (0.0, 0.01))
    mean = batch.entropy[batch.mask].mean()
    torch.testing.assert_close(plain.loss - bonus.loss, 0.01 * mean)
    torch.testing.assert_close(bonus.metrics["grpo/entropy/mean"], mean)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_are_schulmans(estimator):
    policy, reference = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    expected = {
        "k1": lambda p, q: math.log(p / q),
        "k2": lambda p, q: math.log(p / q) ** 2 / 2,
        "k3": lambda p, q: q / p - 1 - math.log(q / p),
    }[estimator]
    pairs = zip(policy.exp().tolist(), reference.exp().tolist(), strict=True)
    got = kl_estimate(policy, reference, estimator)
    assert got.tolist() == pytest.approx([expected(p, q) for p, q in pairs])
    assert kl_estimate(policy, policy, estimator).eq(0).all()


def test_k1_and_k3_are_unbiased_under_samples_of_the_policy():
    p, q = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)


def test_whatever_stands_outside_the_mask_reaches_neither_loss_nor_gradient():
    batch, config = Batch(), GRPOConfig()
    clean = batch.terms(config)
    (expected,) = torch.autograd.grad(clean.loss, batch.policy)
    for name in ("old", "rollout", "reference", "entropy"):
        getattr(batch, name)[~batch.mask] = -torch.inf
    batch.policy = batch.policy.detach().masked_fill(~batch.mask, -torch.inf).requires_grad_()
    dirty = batch.terms(config)
    (got,) = torch.autograd.grad(dirty.loss, batch.policy)
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(got, expected)


def test_mismatch_sums_differences_and_divergence_inside_the_mask():
    rollout = torch.tensor([[-1.0, -2.0, -torch.inf]])
    policy = torch.tensor([[-1.1, -1.8, 0.0]])
    mask = torch.tensor([[True, True, False]])
    got = mismatch(rollout, policy, mask)
    assert got.abs_sum.item() == pytest.approx(0.3)
    expected = math.exp(-0.1) - 1 + 0.1 + math.exp(0.2) - 1 - 0.2
    assert got.kl_sum.item() == pytest.approx(expected, rel=1e-5)
    same = mismatch(policy, policy, mask)
    assert (same.abs_sum, same.kl_sum) == (0, 0)
    assert mismatch(rollout[:0], policy[:0], mask[:0]).kl_sum == 0


@pytest.mark.parametrize("name", ["old", "reference", "rollout"])
def test_only_the_policy_gets_a_gradient(name):
    """Metrics hold no graph either, because they are summed over microbatches."""
    batch = Batch()
    setattr(batch, name, getattr(batch, name).requires_grad_())
    terms = batch.terms(GRPOConfig(kl_beta=0.1, mismatch_cap=2.0, entropy_weight=0.1))
    assert not any(value.requires_grad for value in terms.metrics.values())
    terms.loss.backward()
    assert batch.policy.grad is not None and batch.policy.grad.abs().sum() > 0
    assert getattr(batch, name).grad is None


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_update_without_loss_tokens_is_refused(counts):
    batch = Batch()
    batch.counts = GlobalCounts(*counts)
    with pytest.raises(ValueError, match="skip the update"):
        batch.terms(GRPOConfig())


def test_missing_inputs_are_named():
    batch = Batch()
    arguments = (batch.policy, batch.rollout, batch.advantages, batch.mask)
    with pytest.raises(ValueError, match="kl_beta is 0.01 but reference_logprobs is None"):
        policy_loss(*arguments, counts=batch.counts, config=GRPOConfig())
    with pytest.raises(ValueError, match="entropy is None"):
        policy_loss(*arguments, counts=batch.counts, config=GRPOConfig(kl_beta=0.0, entropy_weight=0.1))
    with pytest.raises(ValueError, match="skip the update"):
        policy_loss(*arguments, counts=GlobalCounts(0, 0, 1), config=GRPOConfig(kl_beta=0.0))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [25.0, 120.0, -300.0])
def test_a_ratio_beyond_e20_is_clamped_counted_and_without_gradient(importance, log_ratio):
    """In float32 e^120 is inf, and inf times an advantage of 0 or a mask of 0 is NaN."""
    policy = torch.tensor([[log_ratio - 1.0, 0.0], [0.1, 0.2]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, False], [True, True]])
    config = GRPOConfig(kl_beta=0.0, clip_low=None, clip_high=None, importance=importance)
    terms = policy_loss(
        policy, old, torch.tensor([-1.0, 0.5]), mask, counts=GlobalCounts(3, 2, 2), config=config, old_logprobs=old
    )
    terms.loss.backward()
    small = [0.1, 0.2] if importance == "token" else [0.15, 0.15]
    clamped = math.exp(20 if log_ratio > 0 else -20)
    assert terms.loss.item() == pytest.approx((clamped - 0.5 * sum(map(math.exp, small))) / 3, rel=1e-5)
    assert policy.grad[0].tolist() == [0.0, 0.0] and policy.grad.isfinite().all() and (policy.grad[1] < 0).all()
    assert terms.metrics["grpo/ratio_clamped/count"] == 1


def test_a_reference_far_away_gives_a_finite_kl_that_is_counted():
    policy = torch.tensor([[-200.0, -1.0, -30.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.5, -1.0]])
    mask = torch.tensor([[True, True, False]])
    config = GRPOConfig(kl_beta=0.1)
    terms = policy_loss(
        policy, policy.detach(), torch.zeros(1), mask, reference, counts=GlobalCounts(2, 1, 3), config=config
    )
    terms.loss.backward()
    near = math.exp(-0.5) - 1 + 0.5
    assert terms.metrics["grpo/kl_reference/mean"].item() == pytest.approx((math.exp(20) - 21 + near) / 2, rel=1e-5)
    assert terms.metrics["grpo/kl_clamped/count"] == 1
    assert policy.grad[0, 0] == 0 and policy.grad[0, 1].item() == pytest.approx(
        0.1 * (1 - math.exp(-0.5)) / 2, rel=1e-5
    )


def test_up_to_e20_the_gradient_is_the_ratio_itself():
    policy = torch.tensor([[19.9]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    config = GRPOConfig(kl_beta=0.0, clip_low=None, clip_high=None)
    terms = policy_loss(
        policy, old, torch.tensor([-1.0]), mask, counts=GlobalCounts(1, 1, 1), config=config, old_logprobs=old
    )
    terms.loss.backward()
    assert policy.grad.item() == pytest.approx(math.exp(19.9)) and terms.metrics["grpo/ratio_clamped/count"] == 0


def test_a_token_the_trainer_finds_impossible_fails_the_mismatch_gate():
    never = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-torch.inf, -2.0]), torch.ones(2, dtype=torch.bool))
    assert not never.kl_sum <= 1e6
