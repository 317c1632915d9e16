"""Options of each reward kind, typed and closed, so that a wrong recipe fails before it is submitted.

No torch here: `read_options` is called while launching as well as when the rewards are built.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from realsr_hpc.config.schema import Count, Positive, Probability, RewardTerm, Section


class FormatOptions(Section):
    """Reward `format`."""

    partial: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Reward of a trace with all seven parts but not well formed; 0: the paper's plain 1/0."""
    min_words: Annotated[int, Field(ge=0)] = 1
    max_words: Count = 120
    min_distinct: Probability = 0.4
    """Smallest share of distinct words in a text of eight words or more (repetition guard)."""


class DegradationOptions(Section):
    """Reward `degradation`."""

    neighbour: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Credit of a level one step off (light for medium); 0: the paper's plain match."""


class UnderstandingOptions(Section):
    """Reward `understanding`."""

    similarity: Literal["chrf", "minilm", "none"] = "chrf"
    """Of each text with its caption; none: tags only (the paper)."""
    tags_weight: Probability = 0.5
    """Share of the tag term; the similarity has the rest. Unused with similarity=none."""


class GenerationOptions(Section):
    """Reward `generation`."""

    expert: Literal["niqe", "ranker", "pyiqa"] = "ranker"
    weights: str | None = None
    """File of the expert; None: the one shipped under recipes/assets/tiny."""
    metrics: list[str] = []
    """pyiqa's metric names, averaged; only with expert=pyiqa."""
    weights_dir: str | None = None
    """Folder of staged pyiqa weights with its SHA256SUMS; only with expert=pyiqa."""


class FidelityOptions(Section):
    """Reward `fidelity`."""

    reference: Literal["lq", "gt"] = "lq"
    metric: Literal["psnr", "l1", "ssim"] = "psnr"
    smooth_px: Annotated[float, Field(ge=0.0)] = 1.0
    """Gaussian sigma over both images before comparing with the LQ image, in LQ pixels; 0: none."""
    psnr_low: float = 10.0
    """PSNR in dB that earns 0."""
    psnr_high: Positive = 40.0
    """PSNR in dB that earns 1."""


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
        faults = "; ".join(f"{fault['loc'][0]}={fault['input']!r}: {fault['msg']}" for fault in error.errors())
        valid = ", ".join(section.model_fields)
        raise ValueError(f"rewards.terms.{name}.options (kind {term.kind}): {faults}. Valid options: {valid}") from None
