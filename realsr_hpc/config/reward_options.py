"""Options of each reward kind, typed and closed, so that a wrong recipe fails before it is submitted.

No torch here: `read_options` is called while launching as well as when the rewards are built.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.config.section import Count, NonNegative, Positive, Probability, Section


class FormatOptions(Section):
    """Reward `format`."""

    partial: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Reward of a trace with all seven parts but not well formed; 0: the paper's plain 1/0."""
    min_words: Annotated[int, Field(ge=0)] = 1
    """Fewest words of a text for the full reward."""
    max_words: Count = 120
    """Most words of a text for the full reward."""
    min_distinct: Probability = 0.4
    """Smallest share of distinct words in a text of eight words or more (repetition guard)."""


class DegradationOptions(Section):
    """Reward `degradation`."""

    neighbour: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Credit of a level one step off (light for medium); 0: the paper's plain match."""
    blur_weight: NonNegative = 1.0
    """Share of a slot in the whole; the five are divided by their sum. The paper: all alike."""
    resize1_weight: NonNegative = 0.0
    """0: no probe reads the first resize from the LQ image (docs/rewards.md)."""
    noise_weight: NonNegative = 1.0
    """As `blur_weight`."""
    compression_weight: NonNegative = 1.0
    """As `blur_weight`."""
    resize2_weight: NonNegative = 1.0
    """As `blur_weight`."""

    @property
    def slot_weights(self) -> tuple[float, ...]:
        """In the order of the degradation's words."""
        return (
            self.blur_weight,
            self.resize1_weight,
            self.noise_weight,
            self.compression_weight,
            self.resize2_weight,
        )

    @model_validator(mode="after")
    def some_slot_counts(self) -> Self:
        """Not every slot weighs nothing."""
        if not any(self.slot_weights):
            raise ValueError("every slot's weight is 0: give blur_weight or another more, or drop the term")
        return self


class UnderstandingOptions(Section):
    """Reward `understanding`."""

    similarity: Literal["chrf", "minilm", "none"] = "chrf"
    """Of each text with its caption; none: tags only (the paper)."""
    tags_weight: Probability = 0.5
    """Share of the tag term; the similarity has the rest. Unused with similarity=none."""
    word_weight: Probability = 0.5
    """Share of the word where an image shows a known one (made signs); tags and similarity have the rest."""
    word_credit: Literal["exact", "letters"] = "exact"
    """exact: 1 where the rough text names the word; letters: 1 less the share of letters to change."""
    synonyms: Literal["none", "wordnet", "minilm"] = "none"
    """What else names a tag: the other words of its WordNet senses, or a word or two that mean nearly the same."""
    wordnet_dir: str = "/usr/share/wordnet"
    """Folder with WordNet's index.noun and data.noun; only with synonyms=wordnet."""
    min_cosine: Probability = 0.7
    """Similarity from which words mean nearly the same; only with synonyms=minilm."""


class GenerationOptions(Section):
    """Reward `generation`."""

    expert: Literal["niqe", "ranker", "pyiqa"] = "ranker"
    """What rates the final image."""
    weights: str | None = None
    """File of the expert; None: the one shipped under recipes/assets/tiny."""
    metrics: list[str] = []
    """pyiqa's metric names, averaged; only with expert=pyiqa."""
    weights_dir: str | None = None
    """Folder of staged pyiqa weights with its SHA256SUMS, None: weights/iqa; only with expert=pyiqa."""
    stripe_guard: bool = True
    """Images of stripes and grids earn less, down to nothing (rewards/stripes.py)."""

    @model_validator(mode="after")
    def metrics_are_pyiqas(self) -> Self:
        """Metrics are named for pyiqa, and only for it."""
        if (self.expert == "pyiqa") != bool(self.metrics):
            raise ValueError(f"expert={self.expert} with metrics={self.metrics}: name metrics with expert=pyiqa only")
        return self


class FidelityOptions(Section):
    """Reward `fidelity`."""

    reference: Literal["lq", "gt"] = "lq"
    """What the final image is held against."""
    degradation: Literal["downscale", "known"] = "downscale"
    """What the final image undergoes before it is compared with the LQ image: area averaging to its size, or the blurs,
    resizes and JPEGs that made this LQ image of its truth. known scores 0 where they are not recorded."""
    metric: Literal["psnr", "l1", "ssim", "pyiqa"] = "psnr"
    """pyiqa: its full-reference metrics by name, at full size (reference=gt)."""
    metrics: list[str] = []
    """pyiqa's names such as lpips, dists, topiq_fr, averaged; only with metric=pyiqa."""
    weights_dir: str | None = None
    """Folder of staged pyiqa weights with its SHA256SUMS, None: weights/iqa; only with metric=pyiqa."""
    smooth_px: Annotated[float, Field(ge=0.0)] = 1.0
    """Gaussian sigma over both images before comparing with the LQ image, in LQ pixels; 0: none."""
    psnr_low: float = 10.0
    """PSNR in dB that earns 0."""
    psnr_high: Positive = 40.0
    """PSNR in dB that earns 1."""

    @model_validator(mode="after")
    def options_belong_together(self) -> Self:
        """pyiqa compares with the truth; PSNR's ends are in order."""
        if (self.metric == "pyiqa") != bool(self.metrics):
            raise ValueError(f"metric={self.metric} with metrics={self.metrics}: name metrics with metric=pyiqa only")
        if self.metric == "pyiqa" and self.reference != "gt":
            raise ValueError("metric=pyiqa compares at full size: set reference=gt")
        if self.degradation == "known" and self.reference != "lq":
            raise ValueError("degradation=known compares with the LQ image: set reference=lq")
        if self.psnr_low >= self.psnr_high:
            raise ValueError(f"psnr_low={self.psnr_low} must be below psnr_high={self.psnr_high}; swap or widen them")
        return self


OPTIONS: dict[str, type[Section]] = {
    "format": FormatOptions,
    "degradation": DegradationOptions,
    "understanding": UnderstandingOptions,
    "generation": GenerationOptions,
    "fidelity": FidelityOptions,
}


def read_options(name: str, term: RewardTerm) -> Section:
    """Options of the term called `name`, as the typed section of its kind.

    Raises ValueError naming every unknown or wrong option, its value and the valid names.
    """
    section = OPTIONS[term.kind]
    try:
        return section.model_validate(term.options)
    except ValidationError as error:
        faults = "; ".join(
            f"{fault['loc'][0]}={fault['input']!r}: {fault['msg']}" if fault["loc"] else fault["msg"]
            for fault in error.errors()
        )
        valid = ", ".join(section.model_fields)
        raise ValueError(f"rewards.terms.{name}.options (kind {term.kind}): {faults}. Valid options: {valid}") from None
