"""Options shared by all commands that restore images, and their checks.

The checks load no model, so a chain can refuse a wrong option when it is launched. `realsr_hpc.restore` acts on the
options.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from realsr_hpc.config.arguments import read_count
from realsr_hpc.config.learning import RestoreConfig
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import pyiqa_needs

CHOICES = ("ranker", "niqe", "fidelity", "mean")
"""Experts that choose among candidates and need no staged weights; pyiqa:METRIC is valid too."""
RESTORING: dict[str, str | None] = {
    "candidates": "1",
    "choose": "ranker",
    "weights_dir": None,
    "overlap_px": "4",
    **dict.fromkeys(RestoreConfig.model_fields),
}
"""The options with their defaults; None: as the recipe says, or not needed."""


def check_restoring(given: Mapping[str, str | None]) -> None:
    """ValueError for a value that is wrong for every recipe."""
    read_count(given, "candidates", 1)
    read_count(given, "overlap_px")
    refuse_unknown_choice(given["choose"] or "")
    sampling(RestoreConfig(), given)


def refuse_what_does_not_fit(given: Mapping[str, str | None], config: RunConfig) -> None:
    """ValueError for a recipe without a policy, and for options that the model or this machine does not support."""
    if config.task == "tokenizer":
        raise ValueError(f"{config.name} trained tokenizers, not a policy: name a run that uses them")
    refuse_wide_overlap(read_count(given, "overlap_px"), config.vlcot.image_sizes_px[-1] // config.vlcot.upscale)
    kind, _, metric = (given["choose"] or "").partition(":")
    if kind == "pyiqa" and read_count(given, "candidates", 1) > 1:
        absent = [need for need in pyiqa_needs("choose", [metric], given["weights_dir"]) if not need.files()]
        if absent:
            raise ValueError(f"choose=pyiqa:{metric}: {absent[0].path} is not there; stage it from {absent[0].origin}")


def refuse_wide_overlap(overlap_px: int, tile_px: int) -> None:
    """ValueError if tiles of `tile_px` would overlap by more than half."""
    if overlap_px > tile_px // 2:
        raise ValueError(f"overlap_px={overlap_px} must be in 0..{tile_px // 2} (half a tile)")


def refuse_unknown_choice(choice: str) -> None:
    """ValueError unless `choice` is one of `CHOICES` or pyiqa:METRIC."""
    kind, _, metric = choice.partition(":")
    if choice not in CHOICES and not (kind == "pyiqa" and metric):
        raise ValueError(f"choose={choice!r} is not one of {', '.join(CHOICES)}, pyiqa:METRIC; name one")


def sampling(base: RestoreConfig, given: Mapping[str, str | None]) -> RestoreConfig:
    """`base` with the fields that `given` sets. ValueError for a value out of range."""
    chosen = {name: given[name] for name in RestoreConfig.model_fields if given.get(name) is not None}
    try:
        return RestoreConfig.model_validate({**base.model_dump(), **chosen})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}={fault['input']}: {fault['msg']}" for fault in error.errors())
        raise ValueError(faults) from None
