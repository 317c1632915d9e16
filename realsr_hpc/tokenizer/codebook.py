"""Learns the codebook by moving averages of the features assigned to each entry (VQ-VAE, appendix A.1).

Entries with almost no assigned features are moved onto features of the current batch; otherwise a small data set uses
only a fraction of the codebook. The averages are not part of the tokenizer module, so that its weights stay those that
transformers expects. Source: van den Oord et al. 2017 (arXiv 1711.00937).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class CodebookAverages:
    """Moving averages of assignment counts [K] and feature sums [K, E], whose ratio is the codebook [K, E]."""

    def __init__(self, codebook: Float[Tensor, "K E"], decay: float, dead_share: float = 0.03) -> None:
        """`dead_share`: an entry below this share of the mean count is moved."""
        self.decay, self.dead_share = decay, dead_share
        self.counts = torch.zeros(len(codebook), device=codebook.device)
        self.sums = torch.zeros_like(codebook)

    @torch.no_grad()
    def update(
        self,
        codebook: Float[Tensor, "K E"],
        features: Float[Tensor, "N E"],
        codes: Int[Tensor, " N"],
        generator: torch.Generator,
    ) -> int:
        """Write the new averages into `codebook` in place; returns how many entries were moved."""
        # assignments of this batch: counts [K], sums of features [K, E]
        counts = torch.bincount(codes, minlength=len(codebook)).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, features)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean_count = self.counts.mean()
        dead = torch.nonzero(self.counts < self.dead_share * mean_count).flatten()
        if len(dead):
            chosen = torch.randint(len(features), (len(dead),), generator=generator).to(features.device)
            # with the mean count they are not dead again at the next update
            self.counts[dead] = mean_count
            self.sums[dead] = features[chosen] * mean_count
        codebook.copy_(self.sums / self.counts.unsqueeze(1))
        return len(dead)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts and sums."""
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
