# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""The behaviour distribution, from which rollouts are sampled and under which the loss scores them.

A row of logits becomes a distribution in this order: guidance, mask of the grammar, top-k (fixed or entropy-adaptive),
temperature, top-p (of the tempered probabilities that top-k left), softmax. `restricted` is the one place that masks
and tempers; the sampler here and the scorer in `logprobs.py` both call it, so that the two cannot drift apart.

vlcot/grammar.py defines the masks and which position has which; rollout/ has the key-value cache. Truncation needs a
row's whole vocabulary, so only the sampler truncates; the scorer receives the surviving tokens bit-packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from realsr_hpc.behaviour.draws import gumbel

ADAPTIVE_LIMIT = 2000
"""Largest k of the entropy-adaptive top-k."""


@dataclass(frozen=True)
class Truncation:
    """Options that decide which of the allowed tokens survive."""

    top_k: int = 0
    """Number of most probable tokens kept; 0: all."""
    top_p: float = 1.0
    """Smallest set of the most probable tokens whose tempered probability reaches this; 1: all."""
    adaptive: bool = False
    """Choose k from the entropy (see `adaptive_top_k`) instead of `top_k`."""

    @property
    def active(self) -> bool:
        """Whether any token can be dropped."""
        return self.adaptive or self.top_k > 0 or self.top_p < 1.0

    def candidates(self, vocabulary_size: int) -> int:
        """Upper bound on the survivors of one row, independent of the logits."""
        bound = ADAPTIVE_LIMIT if self.adaptive else self.top_k
        return min(bound, vocabulary_size) if bound else vocabulary_size


def project(hidden: Float[Tensor, "n H"], output_weight: Float[Tensor, "V H"]) -> Float[Tensor, "n V"]:
    """Logits of the output layer: the product in the inputs' format, then at least float32.

    Sampler and scorer both call this, so in bf16 the product is rounded the same way on both sides.
    """
    logits = hidden @ output_weight.t()
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def gathered_logits(
    hidden: Float[Tensor, "n H"],
    output_weight: Float[Tensor, "V H"],
    columns: slice,
    tp_group: dist.ProcessGroup | None,
) -> Float[Tensor, "n width"]:
    """Logits of these vocabulary columns on every rank of a tensor-parallel group, each of which holds V/tp rows."""
    if tp_group is None or dist.get_world_size(tp_group) == 1:
        return project(hidden, output_weight[columns])
    local = project(hidden, output_weight).contiguous()
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size(tp_group))]  # [n, V/tp] each, in rank order
    dist.all_gather(shards, local, group=tp_group)
    return torch.cat(shards, -1)[:, columns]


def guided(
    conditional: Float[Tensor, "n V"], unconditional: Float[Tensor, "n V"], scale: float | Float[Tensor, " n"]
) -> Float[Tensor, "n V"]:
    """Classifier-free guidance u + s (c - u) (RealSR-R1); exactly the conditional logits if s = 1."""
    weight = torch.as_tensor(scale, dtype=conditional.dtype, device=conditional.device)
    return torch.lerp(unconditional, conditional, weight[:, None] if weight.ndim else weight)


def restricted(
    logits: Float[Tensor, "n V"],
    allowed: Bool[Tensor, "#n V"] | Float[Tensor, "#n V"],
    temperature: Float[Tensor, " n"],
    support: Bool[Tensor, "n V"] | None = None,
    *,
    overwrite: bool = False,
) -> Float[Tensor, "n V"]:
    """logits / T where allowed and surviving, -inf elsewhere. The only definition of masking and tempering.

    allowed: a mask, or its `penalty_of`, which is faster. overwrite: write the result into the memory of `logits`.
    """
    divisor = temperature[:, None].to(logits.dtype)
    values = logits.div_(divisor) if overwrite else logits / divisor
    values = values.masked_fill_(~allowed, -torch.inf) if allowed.dtype == torch.bool else values.add_(allowed)
    return values if support is None else values.masked_fill_(~support, -torch.inf)


def penalty_of(allowed: Bool[Tensor, "n V"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "n V"]:
    """0 where allowed, -inf elsewhere: on a CPU, adding this takes a fifth of the time of filling by a mask."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def adaptive_top_k(entropy: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """k = round(1 + 1999 sigmoid(H - 5)) with the entropy H in nats clipped to [0, 10] (RealSR-R1)."""
    return (1 + (ADAPTIVE_LIMIT - 1) * torch.sigmoid(entropy.clamp(0, 10) - 5)).round().long()


def row_entropy(masked_logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Entropy in nats of softmax(masked_logits); -inf entries carry none."""
    log_probability = masked_logits.log_softmax(-1)
    return -(log_probability.exp() * log_probability.masked_fill(masked_logits == -torch.inf, 0.0)).sum(-1)


def truncated_support(
    logits: Float[Tensor, "n V"],
    allowed: Bool[Tensor, "n V"],
    truncation: Truncation,
    temperature: Float[Tensor, " n"] | None = None,
) -> Bool[Tensor, "n V"]:
    """Survivors of one truncation among the allowed tokens of each row; never empty.

    The entropy of the adaptive k is that of the guided, masked, untempered logits. top-k keeps exactly k tokens, or
    every allowed token where there are fewer. top-p then looks at the tempered distribution over the tokens that top-k
    kept, and keeps the token that crosses the threshold. Of equal logits those of lower token ids survive, on every
    device. Logits are the guided ones.
    """
    if not truncation.active:
        return allowed
    masked = logits.masked_fill(~allowed, -torch.inf)
    # [n, k] with k the largest number of survivors: what follows never sorts the whole vocabulary
    values = masked.topk(truncation.candidates(logits.shape[-1]), dim=-1).values
    keep = values > -torch.inf
    if truncation.adaptive:
        rank = torch.arange(values.shape[-1], device=values.device)
        keep &= rank < adaptive_top_k(row_entropy(masked))[:, None]
    if truncation.top_p < 1.0:
        tempered = values if temperature is None else values / temperature[:, None].to(values.dtype)
        probability = tempered.masked_fill(~keep, -torch.inf).softmax(-1)
        # Mass before a token: the first is always kept, as is the one that crosses the threshold.
        keep &= probability.cumsum(-1) - probability < truncation.top_p
    # Which of several equal logits topk returns differs between devices, so only the number of survivors is used.
    least = values.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)  # smallest survivor, [n, k] -> [n, 1]
    above, tied = masked > least, masked == least
    room = keep.sum(-1, keepdim=True) - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))  # [n, V]


def sample(
    logits: Float[Tensor, "n V"],
    allowed: Bool[Tensor, "n V"],
    temperature: Float[Tensor, " n"],
    keys: Int[Tensor, "n 2"],
    support: Bool[Tensor, "n V"] | None = None,
    *,
    first: int = 0,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """One token per row and its log-probability under the behaviour distribution (exactly 0 if only one is allowed).

    Takes the token with the largest sum of logit and Gumbel noise, which is a draw from the softmax (Gumbel 1954;
    Maddison et al. 2014). The noise is a function of the row's key and the token (`draws.py`), so it does not depend on
    what the row is batched with. Logits are guided and cover the tokens [first, first + V), which must include every
    allowed token.
    """
    values = restricted(logits, allowed, temperature, support)
    # argmax of value + noise: the token's offset from `first`, [n, V] -> [n]
    columns = (values + gumbel(keys, first, first + values.shape[-1])).argmax(-1)
    logprobs = values.gather(-1, columns[:, None])[:, 0] - values.logsumexp(-1)
    return columns + first, logprobs


def pack_support(support: Bool[Tensor, "n V"]) -> UInt8[Tensor, "n K"]:
    """Bit-pack survivors, K = ceil(V / 8), as `numpy.packbits` does: the first token in the highest bit."""
    padded = torch.nn.functional.pad(support.to(torch.uint8), (0, -support.shape[-1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=support.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)  # [n, 8 K] -> [n, K, 8] -> [n, K]


def unpack_support(packed: UInt8[Tensor, "n K"], start: int, stop: int) -> Bool[Tensor, "n width"]:
    """Survivors of the vocabulary range [start, stop), width = stop - start; it need not be byte-aligned.

    ValueError if the packed bytes do not cover the range.
    """
    if not 0 <= start <= stop <= 8 * packed.shape[-1]:
        raise ValueError(
            f"support range [{start}, {stop}) does not fit {packed.shape[-1]} packed bytes; "
            "pass the vocabulary shard of the policy that made the support"
        )
    first = start // 8
    window = packed[..., first : (stop + 7) // 8]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (window[..., None] >> shifts & 1).flatten(-2)  # bytes [n, w] -> bits [n, w, 8] -> [n, 8 w]
    return bits[..., start - 8 * first : stop - 8 * first].bool()
