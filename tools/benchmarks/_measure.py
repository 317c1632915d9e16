"""What every benchmark needs: timing several ways in turns, and the table of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one way, seconds."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    """CPU time of this process over all its threads: steadier than wall time where the machine is shared."""

    @property
    def median_wall_s(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall_s)

    @property
    def median_cpu_s(self) -> float:
        """Median CPU time."""
        return statistics.median(self.cpu_s)


def alternately(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each way `rounds` times in turns, so that whatever else the machine does meets all of them alike.

    Nothing is thrown away: warm up before calling.
    """
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in ways}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table; the first column is text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
