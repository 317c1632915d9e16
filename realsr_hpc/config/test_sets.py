"""Test sets of the field by name; `realsr_hpc.evaluate.sets` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedSet:
    """What a test set of this name is."""

    title: str
    """As the paper's table has it."""
    paired: bool
    usual_size: int
    """Images that the field's copy has; another number is said in the report."""


NAMED_SETS = {
    "realsr": NamedSet("RealSR", True, 100),
    "drealsr": NamedSet("DRealSR", True, 93),
    "ost_val": NamedSet("OST-Val", True, 300),
    "div2k_val": NamedSet("DIV2K-Val", True, 3000),
    "reallq250": NamedSet("RealLQ250", False, 250),
    "reallr200": NamedSet("RealLR200", False, 200),
}


def refuse_unknown_set(name: str | None) -> None:
    """ValueError for a name that is not one of these, nor `paired` or `unpaired`."""
    if name not in NAMED_SETS and name not in ("paired", "unpaired"):
        raise ValueError(f"set={name!r} is not one of {', '.join(NAMED_SETS)}, paired, unpaired; name one")
