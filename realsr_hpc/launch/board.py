"""`tools/jobs.py watch=true`: a live board of an output root's runs; and `report=true`, planned against used.

Each refresh asks Slurm once and reads what is new of each run. Keys where the terminal gives them one by one: up and
down choose a run, f follows it, c cancels it, r resumes it, q leaves; runs are left alone.
"""

from __future__ import annotations

import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from realsr_hpc.config.load import RecipeError, from_yaml
from realsr_hpc.launch.feed import Feed
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.manage import cancel, resume
from realsr_hpc.launch.rundir import ALIVE, Queue, current_status, list_runs, read_job, slurm_queue
from realsr_hpc.plan import plan
from realsr_hpc.tracking import read_progress

REFRESH_S = 3.0
LEAVE_S = 10.0
BARS = "▁▂▃▄▅▆▇█"
KEYS = "up/down choose, f follow, c cancel, r resume, q leave"
HEADERS = ("run", "state", "step", "value", "", "tokens/s", "left", "mismatch KL", "skipped", "last word")


@dataclass(frozen=True)
class Line:
    """One run on the board."""

    run_dir: Path
    state: str
    cells: tuple[str, ...]
    """After run and state, in the order of `HEADERS`."""


class Board:
    """The runs of an output root, refreshed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.feeds: dict[Path, Feed] = {}
        self.word = ""
        """What became of the last key."""
        self.cancelling: list[threading.Thread] = []

    def refresh(self) -> list[Line]:
        """Look again: the queue once, of each run its state and its new events. Oldest first, those alive on top."""
        runs = list_runs(self.root)
        jobs = [read_job(run) for run in runs]
        queue = slurm_queue() if any(job and job.kind == "slurm" for job in jobs) else Queue({})
        lines = [self._line(run, queue) for run in runs]
        return sorted(lines, key=lambda line: line.state not in ALIVE)

    def _line(self, run_dir: Path, queue: Queue) -> Line:
        feed = self.feeds.setdefault(run_dir, Feed(run_dir))
        feed.read()
        status, progress = current_status(run_dir, queue), read_progress(run_dir)
        total = progress.total if progress else 0
        word = (status.message if status else "") or (progress.text if progress else "")
        last, values = feed.last, [value for _, value in feed.history]
        cells = (
            f"{feed.step}/{total}" if total else "-",
            f"{values[-1]:.3f}" if values else "-",
            sparkline(values),
            _number(last.get("rollout/tokens_per_s/mean"), ".0f"),
            duration((total - feed.step) * feed.median_step_s) if total and feed.median_step_s else "-",
            _number(last.get("rollout/mismatch_kl"), ".1e"),
            _number(last.get("optim/skipped_updates/count"), ".0f"),
            word.strip().splitlines()[-1] if word.strip() else "",
        )
        return Line(run_dir, status.state if status else "stopped", cells)


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last values as bars between their smallest and largest."""
    shown = [value for value in values if value == value and abs(value) != float("inf")][-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def table(lines: Sequence[Line], chosen: int, height: int, title: str) -> Table:
    """As many lines around the chosen one as a terminal of `height` rows holds."""
    room = max(height - 6, 1)
    first = min(max(chosen - room // 2, 0), max(len(lines) - room, 0))
    board = Table(*HEADERS, box=None, title=Text(title), caption=KEYS, expand=True)
    for column in board.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for number, line in enumerate(lines[first : first + room], start=first):
        cells = [Text(cell) for cell in (line.run_dir.name, line.state, *line.cells)]
        board.add_row(*cells, style="reverse" if number == chosen else "")
    return board


def watch(root: Path, console: Console) -> int:
    """Until q or Ctrl-C; without a terminal the board once."""
    board = Board(root)
    if not (sys.stdin.isatty() and console.is_terminal):
        lines = board.refresh()
        console.print(table(lines, -1, len(lines) + 7, _title(root, lines, "")))
        return 0
    chosen = 0
    try:
        while True:
            key, chosen, lines = _look(board, chosen, console)
            if key == "q":
                return 0
            if lines:
                _act(key, lines[chosen].run_dir, board, console)
    except KeyboardInterrupt:
        return 0
    finally:
        for thread in board.cancelling:
            thread.join(LEAVE_S)  # its signal is sent by then; the rest is the run's own work


def _look(board: Board, chosen: int, console: Console) -> tuple[str, int, list[Line]]:
    """Show the board until a key other than up and down is pressed."""
    with _keys() as read_key, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            lines = board.refresh()
            chosen = min(chosen, max(len(lines) - 1, 0))
            deadline = time.monotonic() + REFRESH_S
            while (rest := deadline - time.monotonic()) > 0:
                title = _title(board.root, lines, board.word)
                live.update(table(lines, chosen, console.height, title), refresh=True)
                key = read_key(rest)
                if key in ("up", "down"):
                    chosen = min(max(chosen + (1 if key == "down" else -1), 0), max(len(lines) - 1, 0))
                elif key in ("q", "f", "c", "r"):
                    return key, chosen, lines


def _title(root: Path, lines: Sequence[Line], word: str) -> str:
    alive = sum(line.state in ALIVE for line in lines)
    return f"{root}: {len(lines)} runs, {alive} alive" + (f"; {word}" if word else "")


def _act(key: str, run_dir: Path, board: Board, console: Console) -> None:
    """Do what a key asks; `board.word` says what became of it. Cancelling waits for a checkpoint, behind the board."""
    try:
        if key == "c":
            board.word = f"{run_dir.name}: being cancelled"
            thread = threading.Thread(target=_cancel, args=(run_dir, board), daemon=True)
            thread.start()
            board.cancelling.append(thread)
        elif key == "r":
            submission = resume(run_dir)
            board.word = f"{run_dir.name}: {'submitted' if submission.submitted else submission.note}"
        else:
            job = read_job(run_dir)
            follow(run_dir, console, slurm=job is not None and job.kind == "slurm")
    except (ValueError, OSError) as error:
        board.word = str(error)


def _cancel(run_dir: Path, board: Board) -> None:
    try:
        board.word = cancel(run_dir)
    except (ValueError, OSError) as error:
        board.word = str(error)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits some seconds for a key: `up`, `down`, a letter, or nothing."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def read_key(wait_s: float) -> str:
        if not select.select([descriptor], [], [], wait_s)[0]:
            return ""
        key = sys.stdin.read(1)
        if key != "\x1b":
            return {"k": "up", "j": "down"}.get(key, key)
        rest = sys.stdin.read(2) if select.select([descriptor], [], [], 0.05)[0] else ""
        return {"[A": "up", "[B": "down"}.get(rest, "")

    try:
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def report(root: Path) -> Table:
    """Planned against used of every run: so that one sees where the plan is wrong."""
    found = Table("run", "device-hours", "planned", "step s", "planned", "memory GiB", "planned", box=None)
    found.title = "measured beside planned; a device is a GPU, or a process of a run without GPUs"
    for run_dir in list_runs(root):
        feed = Feed(run_dir)
        feed.read()
        try:
            config = from_yaml(run_dir / "recipe.yaml")
        except RecipeError:
            continue  # of another version: nothing to hold it against
        estimate, gpus = plan(config), config.cluster.gpus_per_node
        memory = [value for name, value in feed.peak.items() if name.startswith("system/gpu") and "_memory" in name]
        used = max(memory) if memory else None if gpus else feed.peak.get("system/memory/gib")
        found.add_row(
            run_dir.name,
            f"{feed.computed_s * estimate.world_size / 3600:.2f}",
            f"{estimate.gpu_hours:.2f}" if gpus else "-",
            _number(feed.median_step_s, ".1f"),
            f"{estimate.step_s:.1f}" if gpus else "-",
            _number(used, ".1f"),
            f"{estimate.total_gib:.1f}",
        )
    return found
