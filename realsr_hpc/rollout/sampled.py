"""The tokens sampled so far in a batch of rollouts, with everything that scoring them needs.

Memory per token on the device: token 8 bytes, log-probability 4, mask id 8, flag 1. Where top-k or top-p truncate, one
bit per vocabulary token in host memory (9.2 KB at 73,728 tokens): a group of 8 rollouts of 5,500 tokens takes 0.4 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from realsr_hpc.behaviour.distribution import pack_support
from realsr_hpc.records import RolloutGroup


@dataclass
class SampledTokens:
    """Columns [n, T] of one batch; positions that are not written hold padding."""

    tokens: Int[Tensor, "n T"]
    logprobs: Float[Tensor, "n T"]
    mask_ids: Int[Tensor, "n T"]
    forced: Bool[Tensor, "n T"]
    lengths: Int[Tensor, " n"]
    vocabulary_size: int
    """Number of tokens that a support covers."""
    support: Tensor | None = None
    """uint8 [n, T, K] in host memory; None: nothing truncates, or another pipeline stage samples."""

    @classmethod
    def empty(cls, rows: int, max_tokens: int, pad: int, vocabulary_size: int, device: torch.device) -> SampledTokens:
        """Nothing sampled yet."""
        shape = (rows, max_tokens)
        return cls(
            torch.full(shape, pad, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.ones(shape, dtype=torch.bool, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            vocabulary_size,
        )

    def write(
        self,
        rows: Int[Tensor, " m"],
        positions: Int[Tensor, " m"],
        tokens: Int[Tensor, " m"],
        logprobs: Float[Tensor, " m"] | None,
        mask_ids: Int[Tensor, " m"],
        forced: Bool[Tensor, " m"] | None,
    ) -> None:
        """Write m final tokens, one per row and position; a column is None if only another pipeline stage has it."""
        self.tokens[rows, positions] = tokens
        self.mask_ids[rows, positions] = mask_ids
        if logprobs is not None and forced is not None:
            self.logprobs[rows, positions] = logprobs
            self.forced[rows, positions] = forced

    def write_support(
        self, rows: Int[Tensor, " m"], positions: Int[Tensor, " m"], support: Bool[Tensor, "m width"], first: int
    ) -> None:
        """Record the tokens that survived truncation at these positions.

        support covers `width` vocabulary columns from `first` on; rows and positions are in host memory.
        """
        whole = F.pad(support, (first, self.vocabulary_size - first - support.shape[-1]))
        packed = pack_support(whole).cpu()
        if self.support is None:
            # NumPy's zeros take no memory until they are written, and most rollouts end early.
            self.support = torch.from_numpy(np.zeros((*self.tokens.shape, packed.shape[-1]), np.uint8))
        self.support[rows, positions] = packed

    def groups(self, prompts: Int[Tensor, "P L"], group_size: int) -> list[RolloutGroup]:
        """One group for each of P prompts of L tokens, on the CPU, cut to the length of its longest rollout."""
        stacked = (self.tokens, self.logprobs, self.mask_ids, self.forced)
        columns, lengths = [column.cpu() for column in stacked], self.lengths.cpu()
        groups = []
        for index, prompt in enumerate(prompts.cpu()):
            # rows are ordered by prompt: [P x G, T] -> [G, longest of the group]
            rows = slice(index * group_size, (index + 1) * group_size)
            last = int(lengths[rows].max())
            tokens, logprobs, mask_ids, forced = (column[rows, :last] for column in columns)
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    tokens=tokens,
                    lengths=lengths[rows],
                    rollout_logprobs=logprobs,
                    forced=forced,
                    mask_ids=mask_ids,
                    support=None if self.support is None else self.support[rows, :last],
                )
            )
        return groups
