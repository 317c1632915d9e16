# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false
"""The records that rooms pass to each other.

In one GRPO step: LQBatch -> RolloutGroup -> ScoredGroup -> TrainingGroup -> GRPOBatch -> StepReport. All are frozen
dataclasses of tensors and strings, with no methods beyond views of their own fields. A record is never changed:
`dataclasses.replace` makes the next one. Shapes use B images, G rollouts of one prompt (a group), L prompt tokens, T
response tokens (right-padded), S tokens of prompt and response, n tokens that carry loss, N rollouts, K bytes of
packed vocabulary. P is the number of prompts, in rollout/.

A group through one step, with G = 2 and a prompt of L = 4 tokens:

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
    """The five slots of the degradation text (RealSR-R1). What they describe depends on `degradation.labels`."""

    blur: Level
    resize1: Resize
    noise: Level
    compression: Level
    resize2: Resize

    @property
    def phrase(self) -> str:
        """The text between the tags: `B blur, R1, N noise, C compression, R2`."""
        return f"{self.blur} blur, {self.resize1}, {self.noise} noise, {self.compression} compression, {self.resize2}"


@dataclass(frozen=True, eq=False)
class Blur:
    """Correlation with a kernel; borders are reflected without repeating the edge pixel (BORDER_REFLECT_101)."""

    kernel: Float[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class ResizeTo:
    """Resize of a square image, without antialiasing."""

    side_px: int
    mode: ResizeMode


@dataclass(frozen=True)
class JPEG:
    """JPEG compression at a quality of 1..100."""

    quality: int


Operators = tuple[Blur | ResizeTo | JPEG, ...]
"""The operations that turned the truth into the LQ image, in order, without the noise."""


@dataclass(frozen=True)
class SceneText:
    """Captions of the truth at 1/4, 1/2 and full size, and its content tags."""

    rough: str
    middle: str
    final: str
    tags: tuple[str, ...]
    word: str = ""
    """The word that the image shows, if it is known exactly (generated signs)."""

    @property
    def captions(self) -> tuple[str, str, str]:
        """Rough, middle, final."""
        return (self.rough, self.middle, self.final)


@dataclass(frozen=True)
class LQBatch:
    """A batch of degraded images with their truths; RGB, 0..255."""

    lq: UInt8[Tensor, "B 3 h w"]
    gt: UInt8[Tensor, "B 3 H W"] | None
    labels: tuple[DegradationLabel | None, ...]
    """None: the degradation is unknown (paired and LQ-only data)."""
    scenes: tuple[SceneText | None, ...]
    keys: tuple[str, ...]
    """The image's name in the manifest."""
    index: Int[Tensor, " B"]
    """Global sample index. Together with the seed it determines crop and degradation."""
    operators: tuple[Operators | None, ...] | None = None
    """The operations that made each LQ image from its truth; None: unknown."""

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
    """One image to restore, with what is known about it; images are RGB uint8 [h, w, 3]."""

    key: str
    """The image's name in its manifest or test set."""
    lq: np.ndarray
    gt: np.ndarray | None = None
    label: DegradationLabel | None = None
    scene: SceneText | None = None
    index: int = 0
    """Determines a model's random draws for this case, in any batch and on any rank."""
    operators: Operators | None = None
    """The operations that made `lq` from `gt`, if known; the rollouts of a group share this object."""

    def candidate(self, trace: ParsedTrace, image: np.ndarray | None, member: int = 0) -> Candidate:
        """This case with one result: its trace and final image."""
        known = {item.name: getattr(self, item.name) for item in fields(Case)}
        return Candidate(**known, trace=trace, image=image, member=member)


@dataclass(frozen=True, kw_only=True)
class Candidate(Case):
    """A case and one restored image of it, the input of rewards and metrics."""

    trace: ParsedTrace
    image: np.ndarray | None
    """Final image, uint8 [H, W, 3]; None if the trace has none."""
    member: int = 0
    """Number of the rollout within its group, from 0."""


def lq_pixels(cases: Sequence[Case]) -> UInt8[Tensor, "B 3 h w"]:
    """The LQ images of cases of one size, stacked as models expect them."""
    return torch.from_numpy(np.stack([case.lq for case in cases])).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class ParsedTrace:
    """The well-formed parts of a response; a malformed or missing part is None."""

    degradation: str | None
    texts: tuple[str | None, str | None, str | None]
    images: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    """Code grids, int64 [rows, columns] of codebook indices."""
    faults: tuple[str, ...]
    """Descriptions of what is malformed; empty for a well-formed trace."""

    @property
    def well_formed(self) -> bool:
        """Whether the trace has exactly the seven tags in order, and every image is complete and of the right size."""
        return not self.faults


@dataclass(frozen=True)
class RestoredImage:
    """One restored image with its reasoning; images are RGB uint8 [H, W, 3]."""

    trace: ParsedTrace
    images: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    """Rough, middle and final image; None if the trace has none, or it was not decoded."""

    @property
    def image(self) -> np.ndarray | None:
        """The final image."""
        return self.images[-1]


@dataclass(frozen=True)
class RolloutGroup:
    """Sampled responses to one prompt, with everything needed to score them under the sampling distribution.

    Example, G = 2 and T = 3; the second response ends after two tokens, the grammar forced the first of each:

        tokens            [[71, 305, 2], [71, 2, PAD]]
        lengths           [3, 2]
        rollout_logprobs  [[0, -1.2, -0.1], [0, -2.3, 0]]
        forced            [[True, False, False], [True, False, True]]
    """

    prompt: Int[Tensor, " L"]
    tokens: Int[Tensor, "G T"]
    lengths: Int[Tensor, " G"]
    """Number of response tokens, including the end-of-turn token if it was reached."""
    rollout_logprobs: Float[Tensor, "G T"]
    """Log-probability under the behaviour distribution, float32; 0 where forced or padded."""
    forced: Bool[Tensor, "G T"]
    """Positions without a choice, and padding: they carry no loss."""
    mask_ids: Int[Tensor, "G T"]
    """Row of the grammar's mask table that applied at the position."""
    support: UInt8[Tensor, "G T K"] | None = None
    """Bit-packed (numpy.packbits, vocabulary order) survivors of top-k / top-p; None: no truncation."""


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of one group.

    Example, G = 2: weights {"format": 1, "fidelity": 2} and breakdown {"format": [1, 1], "fidelity": [0.3, 0.5]} give
    total [1.6, 2.0].
    """

    total: Float[Tensor, " G"]
    """Weighted sum of the breakdown."""
    breakdown: dict[str, Float[Tensor, " G"]]
    """Unweighted, higher is better, by the recipe's term names."""
    weights: dict[str, float]
    """Weights of the terms at this step (a ramp changes them)."""
    failures: dict[str, int] = field(default_factory=dict[str, int])
    """Number of rollouts on which a term failed, by name."""
    places: dict[str, Float[Tensor, "G places"]] = field(default_factory=dict[str, Tensor])
    """Scores of the single places of a term's part: each code of the final image in reading order, or each slot of the
    degradation. Only some terms have them. Higher is better; NaN for a rollout without them. Empty unless `grpo.credit`
    is part."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its traces, final images, rewards and advantages."""

    source: Case
    """The image that all rollouts restore."""
    rollouts: RolloutGroup
    traces: tuple[ParsedTrace, ...]
    images: tuple[np.ndarray | None, ...]
    """Decoded final images, uint8 [H, W, 3]; None: the trace has none."""
    rewards: GroupRewards
    advantages: Float[Tensor, " G"] | None
    """The rewards, centred within the group by the recipe's method; None for a group of one."""


@dataclass(frozen=True)
class RolloutTokens:
    """The inputs of GRPO's loss for n loss tokens of N rollouts, except for their distribution.

    Example, N = 2 rollouts with three and one loss tokens: rollout [0, 0, 0, 1], column [0, 1, 2, 0], and `rows` puts
    values [a, b, c, d] at [[a, b, c], [d, 0, 0]].
    """

    rollout: Int[Tensor, " n"]
    """Number of the token's rollout, from 0."""
    column: Int[Tensor, " n"]
    """Number of the token among its rollout's loss tokens, from 0."""
    advantages: Float[Tensor, " N"]
    """Advantage of each rollout."""
    rollout_logprobs: Float[Tensor, " n"]
    """From the sampler."""
    reference_logprobs: Float[Tensor, " n"] | None = None
    """From the frozen reference; None without a KL term, before scoring, and on all but the last pipeline stage."""
    old_logprobs: Float[Tensor, " n"] | None = None
    """From the policy before the step's first update; None with one update per step, before scoring, and on all but the
    last pipeline stage."""
    token_advantages: Float[Tensor, " n"] | None = None
    """Advantage of each token, used instead of its rollout's (`grpo.credit=part`)."""

    def rows(self, values: Tensor) -> Tensor:
        """Compact values [n] laid out as [N, longest]; 0 after a rollout's last loss token."""
        shape = (len(self.advantages), int(self.column.max()) + 1)
        return values.new_zeros(shape).index_put((self.rollout, self.column), values)

    @property
    def mask(self) -> Bool[Tensor, "N longest"]:
        """True where `rows` places a value, False for padding."""
        return self.rows(torch.ones_like(self.rollout)).bool()


@dataclass(frozen=True)
class LossTokens:
    """The n tokens that carry loss, in order, of one sequence or of all rows of a microbatch.

    Example: a prompt of 3 tokens and a response [a, b, c] whose b was forced: positions [2, 4], targets [a, c].
    """

    positions: Int[Tensor, " n"]
    """Position that predicts the target, one before it: in the sequence, or in the flattened [rows x S] of a
    microbatch."""
    targets: Int[Tensor, " n"]
    """Token ids."""
    mask_ids: Int[Tensor, " n"]
    """Row of the mask table that applied."""
    temperature: Float[Tensor, " n"]
    support: UInt8[Tensor, "n K"] | None = None
    """As in `RolloutGroup`."""
    cfg_scale: Float[Tensor, " n"] | None = None
    """None: no guidance."""
    rollouts: RolloutTokens | None = None
    """None in supervised training."""


@dataclass(frozen=True)
class TrainingSequence:
    """One prompt and response to train on."""

    tokens: Int[Tensor, " S"]
    loss: LossTokens
    """Its positions count from the first token of the prompt; in `loss.rollouts` this rollout has the number 0."""
    image_blocks: Int[Tensor, " S"] | None = None
    """With guidance: number of the image block that each token belongs to; a token outside image blocks is a separate
    block. In the unconditional stream a token sees only its own block."""


@dataclass(frozen=True)
class TrainingGroup:
    """Rollouts of one prompt that carry loss; their common prompt is computed once."""

    prompt_tokens: int
    """Number of leading tokens that all sequences share."""
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
    """Metrics of one step; keys are `room/quantity/reduction`."""

    step: int
    metrics: dict[str, float]
    groups: tuple[ScoredGroup, ...] = ()
    """This rank's rollouts."""
