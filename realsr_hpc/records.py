"""What rooms hand to each other: LQBatch -> RolloutGroup -> ScoredGroup -> TrainingGroup -> GRPOBatch -> StepReport.

Plain frozen dataclasses of tensors and strings; no behaviour but what follows from the fields. A record is never
changed: `dataclasses.replace` makes the next one. Shapes use B images, G rollouts of one prompt (a group), T response
tokens (right-padded), P prompt tokens, S tokens of prompt and response, L of them that carry loss, N rollouts.

A group through one step, with G = 2 and a prompt of P = 4 tokens:

    RolloutGroup   prompt [4]; tokens [2, 5], lengths [5, 3]: the second rollout ended early and is padded
    ScoredGroup    rewards.total [0.9, 0.4] -> advantages [0.7, -0.7]
    TrainingGroup  two sequences of 9 and 7 tokens that begin with the same 4; their loss tokens without the forced ones
    GRPOBatch      the groups of one update, and how many loss tokens and rollouts all ranks have together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Level = Literal["light", "medium", "heavy"]
LEVELS: tuple[Level, ...] = get_args(Level)
Resize = Literal["upsample", "downsample", "keep"]
ResizeMode = Literal["area", "bilinear", "bicubic"]


@dataclass(frozen=True)
class DegradationLabel:
    """The five slots of the degradation text (RealSR-R1), true to the applied parameters."""

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
    word: str = ""
    """The word that the image shows, where it is known exactly (made signs)."""

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

    def cases(self) -> list[Case]:
        """Each image by itself: [B, 3, h, w] -> [h, w, 3]."""
        lqs, gts = _hwc(self.lq), [None] * len(self) if self.gt is None else _hwc(self.gt)
        operators = self.operators or (None,) * len(self)
        rows = zip(self.keys, lqs, gts, self.labels, self.scenes, self.index.tolist(), operators, strict=True)
        return [Case(*row) for row in rows]


def _hwc(images: Tensor) -> list[np.ndarray]:
    return list(images.cpu().permute(0, 2, 3, 1).numpy())  # views: nothing of a training batch is copied


@dataclass(frozen=True)
class Case:
    """One image to restore, with what is known of it; images are RGB uint8 [h, w, 3]."""

    key: str
    """The image's name in its manifest or test set; can be a file's name."""
    lq: np.ndarray
    gt: np.ndarray | None = None
    label: DegradationLabel | None = None
    scene: SceneText | None = None
    index: int = 0
    """Decides a model's draws, whatever batch and rank the case falls to."""
    operators: Operators | None = None
    """What made `lq` of `gt`, where it is known; siblings of a group share the object."""

    def candidate(self, trace: ParsedTrace, image: np.ndarray | None, member: int = 0) -> Candidate:
        """The case with what was made of it."""
        known = {item.name: getattr(self, item.name) for item in fields(Case)}
        return Candidate(**known, trace=trace, image=image, member=member)


@dataclass(frozen=True, kw_only=True)
class Candidate(Case):
    """A case and one restored image of it, as rewards and metrics see it."""

    trace: ParsedTrace
    image: np.ndarray | None
    """Final image, uint8 [H, W, 3]; None when the trace has none."""
    member: int = 0
    """Place among the rollouts of its prompt."""


def lq_pixels(cases: Sequence[Case]) -> UInt8[Tensor, "B 3 h w"]:
    """The LQ images of cases of one size, as a model takes them."""
    return torch.from_numpy(np.stack([case.lq for case in cases])).permute(0, 3, 1, 2).contiguous()


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

    trace: ParsedTrace
    images: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    """Rough, middle and final image; None where the trace holds none, or it was not decoded."""

    @property
    def image(self) -> np.ndarray | None:
        """The final one."""
        return self.images[-1]


@dataclass(frozen=True)
class RolloutGroup:
    """Sampled responses of one prompt, with what is needed to score them exactly as sampled.

    Example, G = 2 and T = 3; the second response ends after two tokens, the grammar forced the first of each:

        tokens            [[71, 305, 2], [71, 2, PAD]]
        lengths           [3, 2]
        rollout_logprobs  [[0, -1.2, -0.1], [0, -2.3, 0]]
        forced            [[True, False, False], [True, False, True]]
    """

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
class GroupRewards:
    """What the rollouts of one group earned.

    Example, G = 2: weights {"format": 1, "fidelity": 2} and breakdown {"format": [1, 1], "fidelity": [0.3, 0.5]} give
    total [1.6, 2.0].
    """

    total: Float[Tensor, " G"]
    """Weighted sum of the breakdown."""
    breakdown: dict[str, Float[Tensor, " G"]]
    """Unweighted, higher is better, by the recipe's term names."""
    weights: dict[str, float]
    """Of the step: ramped terms change."""
    failures: dict[str, int] = field(default_factory=dict)
    """Rollouts on which a term broke, by name."""
    places: dict[str, Float[Tensor, "G places"]] = field(default_factory=dict)
    """Of terms that also score every place of their part by itself, higher is better: each code of the final image in
    reading order, each slot of the degradation; NaN for a rollout without them. Empty unless `grpo.credit` is part."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group with what it restored and what it earned."""

    source: Case
    """The image that all rollouts restore."""
    rollouts: RolloutGroup
    traces: tuple[ParsedTrace, ...]
    images: tuple[np.ndarray | None, ...]
    """Decoded final images, uint8 [H, W, 3]; None where the trace has none."""
    rewards: GroupRewards
    advantages: Float[Tensor, " G"] | None
    """The rewards centred in the group as the recipe says; None for a group of one, which has no siblings."""


@dataclass(frozen=True)
class RolloutTokens:
    """What GRPO's loss needs of n loss tokens beside their distribution; they belong to N rollouts.

    Example, N = 2 rollouts with three and one loss tokens: rollout [0, 0, 0, 1], column [0, 1, 2, 0], and `rows` puts
    values [a, b, c, d] at [[a, b, c], [d, 0, 0]].
    """

    rollout: Int[Tensor, " n"]
    """Number of the token's rollout, from 0."""
    column: Int[Tensor, " n"]
    """Number of the token among its rollout's loss tokens, from 0."""
    advantages: Float[Tensor, " N"]
    """Of each rollout."""
    rollout_logprobs: Float[Tensor, " n"]
    """The sampler's."""
    reference_logprobs: Float[Tensor, " n"] | None = None
    """The frozen reference's; None without a KL term, before scoring, and off the last pipeline stage."""
    old_logprobs: Float[Tensor, " n"] | None = None
    """The policy's before the step's first update; None: this is the first, or as above."""
    token_advantages: Float[Tensor, " n"] | None = None
    """Of each token, in place of its rollout's (`grpo.credit`: part)."""

    def rows(self, values: Tensor) -> Tensor:
        """[n] as [N, longest], 0 where a rollout has no such token."""
        shape = (len(self.advantages), int(self.column.max()) + 1)
        return values.new_zeros(shape).index_put((self.rollout, self.column), values)

    @property
    def mask(self) -> Bool[Tensor, "N longest"]:
        """Where `rows` put a value."""
        return self.rows(torch.ones_like(self.rollout)).bool()


@dataclass(frozen=True)
class LossTokens:
    """The n tokens that carry loss, in order, of one sequence or of all rows of a microbatch.

    Example: a prompt of 3 tokens and a response [a, b, c] whose b was forced: positions [2, 4], targets [a, c].
    """

    positions: Int[Tensor, " n"]
    """Where the prediction is made, the place before the target: in the sequence, or in the flattened [rows x S]."""
    targets: Int[Tensor, " n"]
    """Token ids."""
    mask_ids: Int[Tensor, " n"]
    """Row of the mask table that was allowed."""
    temperature: Float[Tensor, " n"]
    support: UInt8[Tensor, "n K"] | None = None
    """As of `RolloutGroup`."""
    cfg_scale: Float[Tensor, " n"] | None = None
    """None: no guidance."""
    rollouts: RolloutTokens | None = None
    """None in supervised training."""


@dataclass(frozen=True)
class TrainingSequence:
    """One prompt and response to train on."""

    tokens: Int[Tensor, " S"]
    loss: LossTokens
    """Positions count from the first token of the prompt; a rollout's own number is 0."""
    image_blocks: Int[Tensor, " S"] | None = None
    """With guidance: number of the image block (or lone token) a token belongs to, all that the unconditional stream
    sees."""


@dataclass(frozen=True)
class TrainingGroup:
    """Rollouts of one prompt that carry loss; what they have in common is computed once."""

    prompt_tokens: int
    """So many first tokens all sequences share."""
    sequences: tuple[TrainingSequence, ...]


@dataclass(frozen=True)
class GRPOBatch:
    """The rollouts of one update on this data-parallel rank, with the counts over all ranks."""

    groups: tuple[TrainingGroup, ...]
    num_tokens_global: int
    """Loss tokens over all ranks."""
    num_rollouts_global: int
    """Rollouts that carry loss, over all ranks."""


@dataclass(frozen=True)
class StepReport:
    """Numbers of one step; keys are `room/quantity/reduction`."""

    step: int
    metrics: dict[str, float]
    groups: tuple[ScoredGroup, ...] = ()
    """This rank's rollouts that the numbers are of."""
