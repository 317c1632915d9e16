"""The sampling distribution: formulas of the paper, exactness, and frequencies."""

import numpy as np
import pytest
import torch

from realsr_hpc.behaviour.distribution import (
    Truncation,
    adaptive_top_k,
    guided,
    pack_support,
    project,
    restricted,
    row_entropy,
    sample,
    truncated_support,
    unpack_support,
)
from realsr_hpc.behaviour.draws import gumbel, stream_keys

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
    # top-p is then of what the adaptive k has kept
    kept = logits[support].double().sort(descending=True).values.softmax(-1)
    both = truncated_support(logits, allowed, Truncation(adaptive=True, top_p=0.5))
    assert both.sum() == (kept.cumsum(-1) - kept < 0.5).sum() < expected / 2


def test_entropy_ignores_masked_tokens():
    assert row_entropy(uniform_logits(8, 20)).item() == pytest.approx(np.log(8), abs=1e-6)


def test_top_k_keeps_exactly_k_and_never_a_forbidden_token():
    logits = torch.tensor([[9.0, 3.0, 3.0, 3.0, 1.0], [9.0, 1.0, 2.0, 3.0, 4.0]])
    allowed = torch.tensor([[False, True, True, True, True], [False, False, False, True, False]])
    support = truncated_support(logits, allowed, Truncation(top_k=2))
    assert support.sum(-1).tolist() == [2, 1]
    assert not support[:, 0].any()
    assert support[1].tolist() == allowed[1].tolist()
    assert torch.equal(truncated_support(logits, allowed, Truncation(top_k=9)), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (50, 1.0), (0, 0.4), (50, 0.9)])
def test_of_equal_logits_those_of_lower_ids_survive(dtype, top_k, top_p):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.zeros(1, 999), torch.randn(3, 999, generator=generator).bfloat16().float(), torch.ones(1, 999)]
    logits = torch.cat(rows).to(dtype)
    allowed = torch.rand(5, 999, generator=generator) > 0.3
    found = truncated_support(logits, allowed, Truncation(top_k=top_k, top_p=top_p))
    for row, mask, kept in zip(logits.tolist(), allowed.tolist(), found, strict=True):
        order = sorted((token for token in range(999) if mask[token]), key=lambda token: (-row[token], token))
        assert kept.nonzero()[:, 0].tolist() == sorted(order[: int(kept.sum())])
        assert not top_k or top_p < 1 or int(kept.sum()) == top_k
    assert truncated_support(torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.bool), Truncation(top_k=3)).tolist() == [
        [True] * 3 + [False] * 5
    ]


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


def test_guidance_is_exact_at_both_ends_and_linear_between():
    c, u = torch.randn(3, 7), torch.randn(3, 7)
    scale = torch.tensor([1.0, 0.0, 0.8])
    result = guided(c, u, scale)
    assert torch.equal(result[0], c[0])
    assert torch.equal(result[1], u[1])
    torch.testing.assert_close(result[2], u[2] + 0.8 * (c[2] - u[2]))
    torch.testing.assert_close(guided(c, u, 3.0), u + 3.0 * (c - u))


@pytest.mark.parametrize(
    ("format", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_the_product_in_its_own_format_and_at_least_float32(format, wanted):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(5, 8, generator=generator, dtype=torch.float64).to(format) for _ in range(2))
    logits = project(hidden, weight)
    assert logits.dtype == wanted and torch.equal(logits, (hidden @ weight.T).to(wanted))


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream_keys(seed, 1, count))


def test_a_row_with_one_allowed_token_has_log_probability_exactly_zero():
    logits = torch.randn(16, 50) * 30
    allowed = torch.nn.functional.one_hot(torch.arange(16) * 3, 50).bool()
    tokens, logprobs = sample(logits, allowed, torch.full((16,), 0.7), keys_of(16))
    assert tokens.tolist() == [3 * i for i in range(16)]
    assert (logprobs == 0).all()


def test_sampled_frequencies_match_the_distribution():
    num_draws, vocabulary = 20000, 12
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(7))
    allowed = torch.ones(1, vocabulary, dtype=torch.bool).index_fill(1, torch.tensor([2, 5]), False)
    support = truncated_support(logits, allowed, Truncation(top_k=7))
    temperature = torch.full((num_draws,), 1.7)
    wide = [tensor.expand(num_draws, -1) for tensor in (logits, allowed, support)]
    tokens, logprobs = sample(wide[0], wide[1], temperature, keys_of(num_draws), wide[2])
    kept = support[0]
    weights = np.exp(logits[0, kept].double().numpy() / 1.7)
    expected = weights / weights.sum() * num_draws
    observed = np.bincount(tokens.numpy(), minlength=vocabulary)
    assert observed[~kept.numpy()].sum() == 0
    chi_square = ((observed[kept.numpy()] - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 0.999 quantile for 6 degrees of freedom
    exact = restricted(*wide[:2], temperature, wide[2]).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-6)


def test_a_row_keeps_its_draw_in_another_batch_and_among_fewer_columns():
    logits, temperature, keys = torch.randn(5, 30), torch.ones(5), keys_of(5)
    allowed = torch.zeros(5, 30, dtype=torch.bool)
    allowed[:, 8:20] = True
    tokens, logprobs = sample(logits, allowed, temperature, keys)
    part = sample(logits[3:, 8:20], allowed[3:, 8:20], temperature[3:], keys[3:], first=8)
    assert torch.equal(part[0], tokens[3:])
    torch.testing.assert_close(part[1], logprobs[3:])


def test_gumbel_noise_is_standard_and_belongs_to_key_and_token():
    noise = gumbel(keys_of(2000), 4, 1028)
    uniform = torch.exp(-torch.exp(-noise.double()))
    ordered = uniform.flatten().sort().values
    even = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - even).abs().max() < 1.95 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, 0.999
    centred = uniform - 0.5
    for one, other in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs(float((one * other).mean()) * 12) < 4 / len(ordered) ** 0.5
    # of one token over all keys: each column is uniform by itself
    deviation = (12 * len(uniform)) ** 0.5 * (uniform.mean(0) - 0.5)
    assert abs(float(deviation.var()) - 1) < 0.25 and float(deviation.abs().max()) < 5
    assert torch.equal(gumbel(keys_of(2000)[7:9], 100, 200), noise[7:9, 96:196])


def test_the_noise_of_a_token_is_its_key_hashed_with_its_id():
    """Exact integers: with another hash the same seed would give other draws."""
    keys = stream_keys(3, 9, 6)
    found = gumbel(torch.from_numpy(keys), 500, 504)
    for (first, second), row in zip((keys.astype(np.int64) % (1 << 32)).tolist(), found.tolist(), strict=True):
        for token, noise in enumerate(row, 500):
            bits = (token + first) % (1 << 32)
            bits = (bits ^ (bits >> 17)) * 0xED5AD4BB % (1 << 32) ^ second
            bits = (bits ^ (bits >> 11)) * 0xAC4C1B51 % (1 << 32)
            bits = (bits ^ (bits >> 15)) * 0x31848BAB % (1 << 32)
            u = ((bits ^ (bits >> 14)) % (1 << 31) + 0.5) / (1 << 31)
            assert noise == pytest.approx(-np.log(-np.log1p(-u)), rel=1e-4, abs=1e-5)


def key_of(bits: int) -> torch.Tensor:
    """The key for which token 0 gets noise from these bits; computed by inverting the hash."""

    def unmixed(value: int, by: int) -> int:
        start = value
        for _ in range(32 // by):
            value = start ^ (value >> by)
        return value

    state = unmixed(bits, 14)
    for shift, multiplier in ((15, 0x31848BAB), (11, 0xAC4C1B51)):
        state = unmixed(state * pow(multiplier, -1, 1 << 32) % (1 << 32), shift)
    return torch.tensor([[0, state - (1 << 32) if state >= 1 << 31 else state]], dtype=torch.int32)


def test_the_largest_and_the_smallest_noise_are_finite():
    """With noise of -inf an allowed token could never be drawn; with noise of +inf no other token could be."""
    largest, smallest = (float(gumbel(key_of(bits), 0, 1)) for bits in (0, 0x7FFFFFFF))
    assert largest == pytest.approx(32 * np.log(2), rel=1e-5)  # of u = 2^-32
    assert smallest == pytest.approx(-np.log(24 * np.log(2)), rel=1e-5)  # of 1 - u = 2^-24, float32's


def test_streams_differ_by_seed_and_rollout_and_positions_do_not_depend_on_the_length():
    assert np.array_equal(stream_keys(3, 9, 50)[:20], stream_keys(3, 9, 20))
    streams = [stream_keys(*pair, 20).tobytes() for pair in ((3, 9), (3, 10), (4, 9), (3, 9 + (1 << 40)))]
    assert len(set(streams)) == 4
    # another key would be another run from the same seed
    assert stream_keys(3, 9, 2).tolist() == [[1433213821, 448920206], [1323938316, 104828565]]


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
