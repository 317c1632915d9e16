"""The noise behind every draw: a function of only the run's seed, the rollout's number, the position and the token.

Therefore a token can be drawn again at any time and in any batch. Because each token keeps its noise, two similar rows
of logits usually choose the same token. Look-ahead decoding (rollout/) relies on both properties.

Each position of a rollout has a 64-bit key from NumPy's Philox generator (Salmon et al. 2011). A token's noise is the
key hashed with the token's id: three rounds of multiply and xor-shift with the constants of Wellons' `triple32`, which
his search found to have the least bias (nullprogram.com/blog/2018/07/31).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROUNDS = ((17, 0xED5AD4BB - 2**32), (11, 0xAC4C1B51 - 2**32), (15, 0x31848BAB))
"""Shift, then multiplier, read as int32."""


def stream_keys(seed: int, rollout_id: int, length: int) -> Int[np.ndarray, "length 2"]:
    """Keys of one rollout's first positions, two int32 numbers each."""
    raw = np.random.Philox(key=[seed, rollout_id]).random_raw(length)
    # uint64 [length] -> the same bytes as int32 [length, 2]
    return np.ascontiguousarray(raw).view(np.int32).reshape(length, 2)


def gumbel(keys: Int[Tensor, "n 2"], first: int, stop: int) -> Float[Tensor, "n width"]:
    """Standard Gumbel noise of the tokens [first, stop), float32, finite.

    -log(-log(1 - u)), where u has 31 bits: the largest noise, which decides draws, comes from the smallest u, where
    float32 is finest.
    """
    tokens = torch.arange(first, stop, dtype=torch.int32, device=keys.device)
    bits = tokens + keys[:, :1]  # [width] + [n, 1] -> [n, width]; int32 arithmetic wraps around
    for number, (shift, multiplier) in enumerate(_ROUNDS):
        bits ^= _shifted(bits, shift)
        bits *= multiplier
        if number == 0:
            bits ^= keys[:, 1:]
    bits ^= _shifted(bits, 14)
    u = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift of int32 to the right."""
    return (bits >> by).bitwise_and_((1 << 32 - by) - 1)
