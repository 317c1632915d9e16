"""The sampling distribution: formulas of the paper, exactness, and frequencies."""

import numpy as np
import pytest
import torch

from realsr_hpc.behaviour.distribution import (
    Truncation,
    adaptive_top_k,
    guided,
    modality_support,
    pack_support,
    restricted,
    row_entropy,
    sample,
    truncated_support,
    unpack_support,
)

torch.set_num_threads(1)
NO_LIMIT = Truncation()


def uniform_logits(num_tokens: int, vocabulary: int) -> torch.Tensor:
    """One row whose entropy is log(num_tokens)."""
    return torch.full((1, vocabulary), -torch.inf).index_fill(1, torch.arange(num_tokens), 0.0)


@pytest.mark.parametrize(("entropy", "k"), [(0.0, 14), (3.0, 239), (5.0, 1000), (7.0, 1762), (40.0, 1987)])
def test_adaptive_top_k_is_the_papers(entropy, k):
    assert adaptive_top_k(torch.tensor([entropy])).tolist() == [k]


def test_adaptive_support_follows_the_entropy_of_the_masked_row():
    vocabulary = 4096
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocabulary, generator=generator) * 2
    allowed = torch.rand(1, vocabulary, generator=generator) < 0.8
    probability = logits.double().masked_fill(~allowed, -torch.inf).softmax(-1)[allowed]
    entropy = float(-(probability * probability.log()).sum())
    expected = round(1 + 1999 / (1 + np.exp(5 - entropy)))
    support = truncated_support(logits, allowed, Truncation(adaptive=True))
    assert support.sum() == expected
    assert logits[support].min() >= logits[allowed & ~support].max()


def test_entropy_ignores_masked_tokens():
    assert row_entropy(uniform_logits(8, 20)).item() == pytest.approx(np.log(8), abs=1e-6)


def test_top_k_keeps_exactly_k_and_never_a_forbidden_token():
    logits = torch.tensor([[9.0, 3.0, 3.0, 3.0, 1.0], [9.0, 1.0, 2.0, 3.0, 4.0]])
    allowed = torch.tensor([[False, True, True, True, True], [False, False, False, True, False]])
    support = truncated_support(logits, allowed, Truncation(top_k=2))
    assert support.sum(-1).tolist() == [2, 1]
    assert not support[:, 0].any()
    assert support[1].tolist() == allowed[1].tolist()


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    allowed = torch.ones(1, 4, dtype=torch.bool)
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4)]:
        assert truncated_support(logits, allowed, Truncation(top_p=top_p)).sum() == kept


def test_top_p_sees_the_tempered_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    allowed = torch.ones(1, 4, dtype=torch.bool)
    cold = truncated_support(logits, allowed, Truncation(top_p=0.6), torch.tensor([0.1]))
    assert cold.sum() == 1


def test_modalities_are_truncated_each_in_its_way():
    logits = torch.arange(10.0).expand(2, 10)
    allowed = torch.ones(2, 10, dtype=torch.bool)
    is_image = torch.tensor([True, False])
    support = modality_support(logits, allowed, is_image, image=Truncation(top_k=5), text=Truncation(top_k=1))
    assert support.sum(-1).tolist() == [5, 1]
    assert modality_support(logits, allowed, is_image, image=NO_LIMIT, text=NO_LIMIT) is None


def test_guidance_is_exact_at_both_ends_and_linear_between():
    c, u = torch.randn(3, 7), torch.randn(3, 7)
    scale = torch.tensor([1.0, 0.0, 0.8])
    result = guided(c, u, scale)
    assert torch.equal(result[0], c[0])
    assert torch.equal(result[1], u[1])
    torch.testing.assert_close(result[2], u[2] + 0.8 * (c[2] - u[2]))
    torch.testing.assert_close(guided(c, u, 3.0), u + 3.0 * (c - u))


def test_a_row_with_one_allowed_token_has_log_probability_exactly_zero():
    logits = torch.randn(16, 50) * 30
    allowed = torch.nn.functional.one_hot(torch.arange(16) * 3, 50).bool()
    tokens, logprobs = sample(logits, allowed, torch.full((16,), 0.7))
    assert tokens.tolist() == [3 * i for i in range(16)]
    assert (logprobs == 0).all()


def test_the_whole_range_of_draws_stays_inside_the_support():
    logits = torch.zeros(3, 6)
    allowed = torch.tensor([[False, True, False, True, False, False]]).expand(3, 6)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    tokens, _ = sample(logits, allowed, torch.ones(3), uniform=uniform)
    assert tokens.tolist() == [1, 3, 3]


def test_sampled_frequencies_match_the_distribution():
    num_draws, vocabulary = 20000, 12
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, vocabulary, generator=generator)
    allowed = torch.ones(1, vocabulary, dtype=torch.bool).index_fill(1, torch.tensor([2, 5]), False)
    support = truncated_support(logits, allowed, Truncation(top_k=7))
    temperature = torch.full((num_draws,), 1.7)
    wide = [tensor.expand(num_draws, -1) for tensor in (logits, allowed, support)]
    tokens, logprobs = sample(wide[0], wide[1], temperature, wide[2], generator)
    kept = support[0]
    weights = np.exp(logits[0, kept].double().numpy() / 1.7)
    expected = weights / weights.sum() * num_draws
    observed = np.bincount(tokens.numpy(), minlength=vocabulary)
    assert observed[~kept.numpy()].sum() == 0
    chi_square = ((observed[kept.numpy()] - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 0.999 quantile for 6 degrees of freedom
    exact = restricted(*wide[:2], temperature, wide[2]).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(logprobs, exact)


def test_a_generator_repeats_and_a_row_keeps_its_draw_in_another_batch():
    logits, temperature = torch.randn(5, 30), torch.ones(5)
    allowed = torch.ones(5, 30, dtype=torch.bool)
    first = sample(logits, allowed, temperature, generator=torch.Generator().manual_seed(3))
    again = sample(logits, allowed, temperature, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first[0], again[0])
    uniform = torch.rand(5, dtype=torch.float64)
    whole = sample(logits, allowed, temperature, uniform=uniform)[0]
    part = sample(logits[3:], allowed[3:], temperature[3:], uniform=uniform[3:])[0]
    assert torch.equal(whole[3:], part)


@pytest.mark.parametrize("vocabulary", [8, 13, 100])
def test_support_packs_as_numpy_and_unpacks_any_range(vocabulary):
    support = torch.rand(4, vocabulary) < 0.5
    packed = pack_support(support)
    assert np.array_equal(packed.numpy(), np.packbits(support.numpy(), axis=-1))
    for start, stop in [(0, vocabulary), (3, vocabulary), (vocabulary // 2, vocabulary), (5, 7)]:
        assert torch.equal(unpack_support(packed, start, stop), support[:, start:stop])


def test_a_range_outside_the_packed_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary shard"):
        unpack_support(torch.zeros(1, 2, dtype=torch.uint8), 10, 20)
