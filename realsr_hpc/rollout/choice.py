"""Draw the tokens of a window: hidden states to logits, truncation, one draw and its log-probability per position.

The output layer is only evaluated at positions with a choice. Image codes, which are most of a response, need only its
image columns; text needs only the conditional stream, as it is never guided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from realsr_hpc.behaviour.distribution import Truncation, guided, sample, truncated_support
from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.config.derived import DRAWN_AT_ONCE
from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.rollout.decoder import Decoder


@dataclass
class Drawn:
    """Draws of m = n W positions, flattened; forced ones have log-probability 0."""

    tokens: Int[Tensor, " m"]
    logprobs: Float[Tensor, " m"]
    forced: Bool[Tensor, " m"]
    supports: list[tuple[Int[Tensor, " c"], Bool[Tensor, "c V"], int]]
    """For each draw of several: c positions, which vocabulary columns survived truncation there, the first column."""


class Choice:
    """Draws tokens under one grammar and one set of sampling options."""

    def __init__(self, masks: MaskTable, config: RolloutConfig):
        self.masks = masks
        image = Truncation(config.image_top_k, config.top_p, config.image_adaptive_top_k)
        text = Truncation(config.text_top_k, config.top_p)
        everything = slice(0, masks.allowed.shape[-1])
        self._modalities = ((True, image, masks.image_columns), (False, text, everything))
        self.truncates = image.active or text.active
        self._only = masks.allowed.int().argmax(-1)
        """[masks]: the first allowed token, which is the only one of a mask that forces its token."""
        self._forced, self._image = masks.forced.cpu().numpy(), masks.image.cpu().numpy()

    def in_images(self, mask_ids: Int[np.ndarray, " n"]) -> bool:
        """Whether most of these positions draw an image code."""
        return bool(2 * self._image[mask_ids].sum() > len(mask_ids))

    def __call__(
        self,
        decoder: Decoder,
        hidden: Float[Tensor, "streams m H"],
        mask_ids: Int[np.ndarray, " m"],
        choosing: Bool[np.ndarray, " m"],
        keys: Int[Tensor, "m 2"],
    ) -> Drawn:
        """Draw at the positions where `choosing` is True; a token is forced elsewhere and where only one is allowed."""
        device = hidden.device
        masks = torch.from_numpy(mask_ids).to(device)
        free = choosing & ~self._forced[mask_ids]
        forced = torch.from_numpy(~free).to(device)
        drawn = Drawn(self._only[masks], torch.zeros(len(mask_ids), device=device), forced, [])
        for is_image, truncation, columns in self._modalities:
            here = np.flatnonzero(free & (self._image[mask_ids] == is_image))
            for start in range(0, len(here), DRAWN_AT_ONCE):
                positions = torch.from_numpy(here[start : start + DRAWN_AT_ONCE]).to(device)
                streams = hidden[:, positions] if is_image else hidden[:1, positions]
                self._draw(drawn, decoder, streams, positions, masks[positions], keys[positions], truncation, columns)
        return drawn

    def _draw(
        self,
        drawn: Drawn,
        decoder: Decoder,
        streams: Tensor,
        positions: Tensor,
        masks: Tensor,
        keys: Tensor,
        truncation: Truncation,
        columns: slice,
    ) -> None:
        """Draw at c positions of one modality, from their hidden states [1 or 2 streams, c, H]."""
        table = self.masks
        logits = decoder.logits(streams[0], columns)  # [c, columns]
        if len(streams) > 1:
            logits = guided(logits, decoder.logits(streams[1], columns), table.cfg_scale[masks])
        allowed, temperature = table.allowed[:, columns][masks], table.temperature[masks]
        support = truncated_support(logits, allowed, truncation, temperature) if truncation.active else None
        tokens, logprobs = sample(logits, allowed, temperature, keys, support, first=columns.start)
        drawn.tokens[positions] = tokens
        if self.truncates:
            kept = allowed if support is None else support
            alone = kept.sum(-1) == 1  # truncation left no choice (greedy text): no loss, not counted
            drawn.forced[positions] |= alone
            logprobs = logprobs.masked_fill(alone, 0.0)
            drawn.supports.append((positions, kept, columns.start))
        drawn.logprobs[positions] = logprobs.float()
