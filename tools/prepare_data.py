"""Folders of photographs -> a checked manifest.

python tools/prepare_data.py source=DIR output=DIR [captions=FILE.jsonl] [heldout_fraction=.1]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from realsr_hpc.data.prepare import PrepareReport, find_photographs, prepare

KNOWN = ("source", "output", "captions", "heldout_fraction")


def parse_arguments(arguments: list[str]) -> dict[str, str]:
    """`key=value` words to a table.

    Raises:
        ValueError: for a word without `=`, an unknown key, or a missing source or output.
    """
    pairs = dict(word.split("=", 1) if "=" in word else (word, "") for word in arguments)
    unknown = sorted(set(pairs) - set(KNOWN))
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; give key=value with one of {', '.join(KNOWN)}")
    absent = [key for key in ("source", "output") if not pairs.get(key)]
    if absent:
        raise ValueError(f"{absent[0]} is missing; give {absent[0]}=DIR")
    return pairs


def heldout_fraction(text: str) -> float:
    """The number in a word.

    Raises:
        ValueError: if it is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"heldout_fraction is {text!r}: give a share such as 0.1") from error


def show(report: PrepareReport, console: Console) -> None:
    """Print what was written and what was found wrong."""
    console.print(f"{report.manifest}: {len(report.entries)} photographs, {report.splits}")
    if report.without_captions:
        console.print(f"without captions: {report.without_captions}")
    for group in report.duplicates:
        console.print(f"look alike: {', '.join(group)}")
    for path, fault in report.faults.items():
        console.print(f"left out: {path}: {fault}", style="yellow")


def main() -> int:
    """Run the command; 2 for wrong arguments or data."""
    console = Console()
    try:
        pairs = parse_arguments(sys.argv[1:])
        source = Path(pairs["source"])
        ticks = iter(track(find_photographs(source), description="reading", console=console))
        report = prepare(
            source,
            Path(pairs["output"]),
            Path(pairs["captions"]) if pairs.get("captions") else None,
            heldout_fraction(pairs.get("heldout_fraction", "0.1")),
            on_photograph=lambda: next(ticks, None),
        )
        next(ticks, None)
    except ValueError as error:
        console.print(f"error: {error}", style="red")
        return 2
    show(report, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
