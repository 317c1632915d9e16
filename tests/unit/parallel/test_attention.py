"""Attention with its log-sum-exp: the CPU's fused kernel, and the plain version for other devices."""

import pytest
import torch

from realsr_hpc.parallel import backend


def plain(q, keys, values, bias):
    """Attention in float64, by definition."""
    q, keys, values, bias = (x.double() for x in (q, keys, values, bias))
    scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("attention", [backend.attention, backend.plain_attention])
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_output_and_log_sum_exp_are_those_of_the_definition(attention, dtype, within):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    q, keys, values = draw(3, 2, 5, 8), draw(3, 2, 11, 8), draw(3, 2, 11, 8)
    hidden = torch.rand(3, 1, 5, 11, generator=generator) < 0.4
    hidden[..., 0] = False
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))
    out, lse = attention(q, keys, values, bias)
    expected, expected_lse = plain(q, keys, values, bias)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=within)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=max(within, 2e-6))
