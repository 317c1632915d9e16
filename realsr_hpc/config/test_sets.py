"""The published test sets by name; `realsr_hpc.evaluate.sets` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedSet:
    """Properties of a published test set."""

    title: str
    """Name in the paper's table."""
    paired: bool
    usual_size: int
    """Number of images in the commonly used copy; the report mentions any other number."""


NAMED_SETS = {
    "realsr": NamedSet("RealSR", True, 100),
    "drealsr": NamedSet("DRealSR", True, 93),
    "ost_val": NamedSet("OST-Val", True, 300),
    "div2k_val": NamedSet("DIV2K-Val", True, 3000),
    "reallq250": NamedSet("RealLQ250", False, 250),
    "reallr200": NamedSet("RealLR200", False, 200),
}


def refuse_unknown_set(name: str | None) -> None:
    """ValueError unless the name is one of these, `paired` or `unpaired`."""
    if name not in NAMED_SETS and name not in ("paired", "unpaired"):
        raise ValueError(f"set={name!r} is not one of {', '.join(NAMED_SETS)}, paired, unpaired; name one")
