"""Content of the live board of an output root: chains as trees, sweeps with their best run, and all other runs.

A refresh queries Slurm once and reads only the new events of each run. The screen and its keys are in watch.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from realsr_hpc import runfolder
from realsr_hpc.config.load import RecipeError
from realsr_hpc.config.metrics import best_is_highest, best_metric, is_measured
from realsr_hpc.files import read_json
from realsr_hpc.launch.feed import Feed
from realsr_hpc.launch.rundir import ALIVE, Queue, Status, current_status, queue_of
from realsr_hpc.tracking import read_progress, recipe_of, sweep_of

BARS = "▁▂▃▄▅▆▇█"
KEYS = "up/down choose, f follow, c cancel, r resume, q quit"
HEADERS = ("run", "state", "step", "value", "", "tokens/s", "left", "mismatch KL", "skipped", "message")
NO_CELLS = ("",) * 8


@dataclass(frozen=True)
class Listed:
    """One stage in a chain's chain.json."""

    stage: str
    folder: str
    after: list[str]


@dataclass(frozen=True)
class Line:
    """One run or command on the board, or the heading of a sweep or chain."""

    label: str
    state: str
    cells: tuple[str, ...]
    """The columns after run and state, in the order of `HEADERS`."""
    folder: Path | None = None
    """None for a heading, which cannot be selected."""


@dataclass(frozen=True)
class Block:
    """A heading with its runs, or a single run."""

    lines: tuple[Line, ...]

    @property
    def alive(self) -> int:
        """Number of its runs that are queued or running."""
        return sum(line.folder is not None and line.state in ALIVE for line in self.lines)


class Board:
    """All runs of an output root. Keeps what was read of their events between refreshes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.feeds: dict[Path, Feed] = {}
        self._measures: dict[str, tuple[str, bool]] = {}
        """By sweep: the metric that its runs are compared by, and whether the highest value is best."""

    def refresh(self) -> list[Line]:
        """Query Slurm once, read each run's state and new events, and return the lines; active runs come first."""
        runs = runfolder.list_runs(self.root)
        chains = dict(self._chains())
        known = {*runs, *(stage for stages in chains.values() for stage, *_ in stages)}
        queue = queue_of(known)
        lines = {folder: self._line(folder, queue) for folder in known}
        blocks = [self._chain(name, stages, lines) for name, stages in chains.items()]
        rest = set(runs) - {stage for stages in chains.values() for stage, *_ in stages}
        sweeps: dict[str, list[Path]] = {}
        for run in (run for run in runs if run in rest):
            sweeps.setdefault(sweep_of(run) or f"/{run.name}", []).append(run)
        for name, members in sweeps.items():
            one = name.startswith("/")
            blocks.append(Block((lines[members[0]],)) if one else self._sweep(name, members, lines))
        return [line for block in sorted(blocks, key=lambda block: not block.alive) for line in block.lines]

    def _chains(self) -> Iterator[tuple[str, list[tuple[Path, str, int]]]]:
        """Yields each chain with its stages in depth-first order: folder, name, depth."""
        for path in sorted(self.root.glob("chains/*/chain.json")):
            listed = read_json(path, list[Listed]) or []
            places = {item.folder: self._place(item.folder) for item in listed}
            children: dict[str, list[Listed]] = {}
            for item in listed:
                children.setdefault((item.after or [""])[-1], []).append(item)

            def below(folder: str, depth: int, places=places, children=children) -> Iterator[tuple[Path, str, int]]:
                for item in children.get(folder, []):
                    yield places[item.folder], item.stage, depth
                    yield from below(item.folder, depth + 1)

            yield path.parent.name, list(below("", 0))

    def _place(self, written: str) -> Path:
        """The stage's folder under the present output root, which may have been moved since the launch."""
        path = Path(written)
        return self.root / "stages" / path.name if path.parent.name == "stages" else self.root / path.name

    def _chain(self, name: str, stages: list[tuple[Path, str, int]], lines: dict[Path, Line]) -> Block:
        found = [
            Line(f"{'  ' * depth}└ {stage}: {folder.name}", lines[folder].state, lines[folder].cells, folder)
            for folder, stage, depth in stages
        ]
        return Block((Line(f"chain {name}", _summary(found), NO_CELLS), *found))

    def _sweep(self, name: str, runs: list[Path], lines: dict[Path, Line]) -> Block:
        found = [lines[run] for run in sorted(runs, key=lambda run: lines[run].state not in ALIVE)]
        cells = NO_CELLS
        if measured := self._best(name, runs):
            run, metric, value = measured
            cells = ("", f"{value:.3f}", *NO_CELLS[2:-1], f"best by {metric}: {run.name}")
        own = [Line(f"└ {line.label}", line.state, line.cells, line.folder) for line in found]
        return Block((Line(f"sweep {name}", _summary(found), cells), *own))

    def _best(self, name: str, runs: list[Path]) -> tuple[Path, str, float] | None:
        """Run, metric and value of a sweep's best last measurement; None before the first measurement."""
        if name not in self._measures:
            try:
                config = recipe_of(runs[0])
            except RecipeError:
                return None
            self._measures[name] = best_metric(config), best_is_highest(config)
        metric, highest = self._measures[name]
        values = {run: self.feeds[run].last.get(metric) for run in runs}
        measured = {run: value for run, value in values.items() if value is not None and is_measured(value)}
        if not measured:
            return None
        best = (max if highest else min)(measured, key=lambda run: measured[run])
        return best, metric, measured[best]

    def _line(self, folder: Path, queue: Queue) -> Line:
        feed = self.feeds.setdefault(folder, Feed(folder))
        feed.read()
        status, progress = current_status(folder, queue), read_progress(folder)
        total = progress.total if progress else 0
        word = (status.message if status else "") or (progress.text if progress else "")
        last, values = feed.last, [value for _, value in feed.history]
        cells = (
            f"{feed.step}/{total}" if total else "-",
            f"{values[-1]:.3f}" if values else "-",
            sparkline(values),
            number(last.get("rollout/tokens_per_s/mean"), ".0f"),
            _left(status, total - feed.step, feed.median_step_s),
            number(last.get("rollout/mismatch_kl"), ".1e"),
            number(last.get("optim/skipped_updates/count"), ".0f"),
            word.strip().splitlines()[-1] if word.strip() else "",
        )
        return Line(folder.name, status.state if status else "to do", cells, folder)


def _summary(lines: Sequence[Line]) -> str:
    """`2 running, 1 done`."""
    states = [line.state for line in lines]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _left(status: Status | None, steps: int, step_s: float | None) -> str:
    """Remaining time of a run that has not ended, `-` if unknown."""
    over = status is not None and status.state in ("done", "failed")
    return "-" if over or step_s is None or steps < 1 else duration(steps * step_s)


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last `width` values as bars, scaled between their minimum and maximum."""
    shown = [value for value in values if is_measured(value)][-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def number(value: float | None, form: str) -> str:
    """The formatted value, `-` for None."""
    return "-" if value is None else f"{value:{form}}"


def title(root: Path, lines: Sequence[Line], word: str = "") -> str:
    """Title of the board; `word` is the message about the last key."""
    folders = {line.folder: line.state for line in lines if line.folder}
    alive = sum(state in ALIVE for state in folders.values())
    return f"{root}: {len(folders)} runs, {alive} alive" + (f"; {word}" if word else "")


def table(lines: Sequence[Line], chosen: int, height: int, heading: str) -> Table:
    """The board as a table, with as many lines around the selected one as fit on a terminal of `height` rows."""
    room = max(height - 6, 1)
    first = min(max(chosen - room // 2, 0), max(len(lines) - room, 0))
    board = Table(*HEADERS, box=None, title=Text(heading), caption=KEYS, expand=True)
    for column in board.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for place, line in enumerate(lines[first : first + room], start=first):
        cells = [Text(cell) for cell in (line.label, line.state, *line.cells)]
        board.add_row(*cells, style="reverse" if place == chosen else "" if line.folder else "bold")
    return board
