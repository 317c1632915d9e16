"""Options that the commands share which restore: what each takes, told without loading what restores.

realsr_hpc.restore acts on them; a chain asks here when it is launched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import ValidationError

from realsr_hpc.config.arguments import read_choice, read_count
from realsr_hpc.config.learning import RestoreConfig

ColourFix = Literal["none", "wavelet", "adain"]
COLOUR_FIXES: tuple[ColourFix, ...] = get_args(ColourFix)
CHOICES = ("ranker", "niqe", "fidelity", "mean")
"""What chooses among candidates and needs nothing staged; besides them pyiqa:METRIC."""
RESTORING: dict[str, str | None] = {
    "candidates": "1",
    "choose": "ranker",
    "weights_dir": None,
    "colour": "none",
    "overlap_px": "8",
    **dict.fromkeys(RestoreConfig.model_fields),
}
"""Each option's default."""


def check_restoring(given: Mapping[str, str | None]) -> None:
    """ValueError for a value that no recipe makes right."""
    read_choice(given, "colour", COLOUR_FIXES)
    read_count(given, "candidates", 1)
    read_count(given, "overlap_px")
    refuse_unknown_choice(given["choose"] or "")
    sampling(RestoreConfig(), given)


def refuse_unknown_choice(choice: str) -> None:
    """ValueError for what chooses among candidates and is none of `CHOICES`, nor pyiqa:METRIC."""
    kind, _, metric = choice.partition(":")
    if choice not in CHOICES and not (kind == "pyiqa" and metric):
        raise ValueError(f"choose={choice!r} is none of {', '.join(CHOICES)}, pyiqa:METRIC; name one")


def sampling(base: RestoreConfig, given: Mapping[str, str | None]) -> RestoreConfig:
    """`base` with those of its fields that `given` names. ValueError for a value out of range."""
    chosen = {name: given[name] for name in RestoreConfig.model_fields if given.get(name) is not None}
    try:
        return RestoreConfig.model_validate({**base.model_dump(), **chosen})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}={fault['input']}: {fault['msg']}" for fault in error.errors())
        raise ValueError(faults) from None
