"""What rooms hand to each other: LQBatch -> RolloutGroup -> ScoredGroup -> GRPOBatch -> StepReport.

Plain frozen dataclasses of tensors and strings; no behaviour but what follows from the fields. Shapes use
B images, G rollouts of one prompt (a group), T response tokens (right-padded), P prompt tokens, N rollouts of
a batch, S = P + T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Level = Literal["light", "medium", "heavy"]
Resize = Literal["upsample", "downsample", "keep"]
ResizeMode = Literal["area", "bilinear", "bicubic"]


@dataclass(frozen=True)
class DegradationLabel:
    """The five slots of the degradation text (PAPER section 1), true to the applied parameters."""

    blur: Level
    resize1: Resize
    noise: Level
    compression: Level
    resize2: Resize

    @property
    def phrase(self) -> str:
        """As it stands between the tags: `B blur, R1, N noise, C compression, R2`."""
        return f"{self.blur} blur, {self.resize1}, {self.noise} noise, {self.compression} compression, {self.resize2}"


@dataclass(frozen=True, eq=False)
class Blur:
    """Correlation with a kernel, borders reflected (101)."""

    kernel: Float[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class ResizeTo:
    """Of a square image, without antialiasing."""

    side_px: int
    mode: ResizeMode


@dataclass(frozen=True)
class JPEG:
    """Quality 1..100."""

    quality: int


Operators = tuple[Blur | ResizeTo | JPEG, ...]
"""What was done to the truth, in this order, noise left out."""


@dataclass(frozen=True)
class SceneText:
    """Captions of the truth at 1/4, 1/2 and full size, and its content tags."""

    rough: str
    middle: str
    final: str
    tags: tuple[str, ...]

    @property
    def captions(self) -> tuple[str, str, str]:
        """Rough, middle, final."""
        return (self.rough, self.middle, self.final)


@dataclass(frozen=True)
class LQBatch:
    """Degraded images with their truths; RGB, 0..255."""

    lq: UInt8[Tensor, "B 3 h w"]
    gt: UInt8[Tensor, "B 3 H W"] | None
    labels: tuple[DegradationLabel | None, ...]
    """None where the degradation is unknown (paired and LQ-only data)."""
    scenes: tuple[SceneText | None, ...]
    keys: tuple[str, ...]
    """The image's name in the manifest."""
    index: Int[Tensor, " B"]
    """Global sample index: with the seed it decides crop and degradation."""
    operators: tuple[Operators | None, ...] | None = None
    """What made each LQ image of its truth; None where it is unknown, as `labels`."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class ParsedTrace:
    """What is well formed of a response; a field is None where it is not."""

    degradation: str | None
    texts: tuple[str | None, str | None, str | None]
    images: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    """Code grids, int64 [rows, columns] of codebook indices."""
    faults: tuple[str, ...]

    @property
    def well_formed(self) -> bool:
        """All seven tags in order, every image complete and of its size, nothing beside them."""
        return not self.faults


@dataclass(frozen=True)
class RestoredImage:
    """One restored image with its reasoning; images are RGB uint8 [H, W, 3]."""

    image: np.ndarray | None
    """Final image; None when the trace holds none."""
    trace: ParsedTrace
    stages: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    """Rough, middle and final image."""


@dataclass(frozen=True)
class RolloutGroup:
    """Sampled responses of one prompt, with what is needed to score them exactly as sampled."""

    prompt: Int[Tensor, " P"]
    tokens: Int[Tensor, "G T"]
    lengths: Int[Tensor, " G"]
    """Response tokens, the end-of-turn token included when it was reached."""
    rollout_logprobs: Float[Tensor, "G T"]
    """Log-probability under the behaviour distribution, float32; 0 where forced or padded."""
    forced: Bool[Tensor, "G T"]
    """The grammar left one choice, or padding: no loss."""
    mask_ids: Int[Tensor, "G T"]
    """Row of the grammar's mask table that was allowed at the position."""
    support: UInt8[Tensor, "G T K"] | None = None
    """Bit-packed (numpy.packbits, vocabulary order) survivors of top-k / top-p; None: no truncation."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards."""

    rollouts: RolloutGroup
    rewards: Float[Tensor, " G"]
    reward_breakdown: dict[str, Float[Tensor, " G"]]
    """Unweighted, higher is better, by the recipe's term names."""
    weights: dict[str, float]
    traces: tuple[ParsedTrace, ...]
    images: tuple[np.ndarray | None, ...]
    """Decoded final images, uint8 [H, W, 3]."""
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSequence:
    """One prompt and response to train on; L loss tokens, in order of position.

    SFT leaves the rollout fields empty: its loss tokens are the whole response, under the plain distribution.
    """

    tokens: Int[Tensor, " S"]
    positions: Int[Tensor, " L"]
    """Where the prediction is made: the target is `tokens[positions + 1]`."""
    mask_ids: Int[Tensor, " L"]
    temperature: Float[Tensor, " L"]
    rollout_logprobs: Float[Tensor, " L"]
    prompt_length: int = 0
    """The first tokens, which a group's rollouts have in common."""
    advantage: float = 0.0
    support: UInt8[Tensor, "L K"] | None = None
    cfg_scale: Float[Tensor, " L"] | None = None
    """None: no guidance."""
    blocks: Int[Tensor, " S"] | None = None
    """Number of the image block (or lone token) a token belongs to: context of the unconditional stream."""


@dataclass(frozen=True)
class GRPOBatch:
    """The rollouts of one step on this data-parallel rank, with the counts over all ranks."""

    sequences: tuple[TrainingSequence, ...]
    num_tokens_global: int
    """Loss tokens over all ranks."""
    num_rollouts_global: int
    """Rollouts that carry loss, over all ranks."""


@dataclass(frozen=True)
class StepReport:
    """Numbers of one step; keys are `room/quantity/reduction`."""

    step: int
    metrics: dict[str, float]
