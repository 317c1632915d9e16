"""`realsr-hpc jobs watch=true`: the board on a terminal, refreshed every few seconds, with keys.

Up and down (or k and j) select a run, f follows it, c cancels it, r resumes it, q quits the board and ends no run.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live

from realsr_hpc.launch.board import Board, Line, table, title
from realsr_hpc.launch.chain_stage import STAGE_FILE
from realsr_hpc.launch.follow import follow
from realsr_hpc.launch.manage import cancel, resume
from realsr_hpc.launch.rundir import read_job

REFRESH_S = 3.0
LEAVE_S = 10.0
ESCAPE_S = 0.05
"""How long to wait for the bytes of an arrow key after Escape; a terminal sends them together."""
ARROWS = {"A": "up", "B": "down"}
LETTERS = {"k": "up", "j": "down"}


def watch(root: Path, console: Console) -> int:
    """Show the board until q or Ctrl-C; without a terminal, print it once."""
    board = Board(root)
    if not (sys.stdin.isatty() and console.is_terminal):
        lines = board.refresh()
        console.print(table(lines, -1, len(lines) + 7, title(root, lines)))
        return 0
    screen = _Screen(board, console)
    try:
        with _keys() as read_key:
            screen.show(read_key)
    except KeyboardInterrupt:
        pass
    finally:
        for thread in screen.cancelling:
            thread.join(LEAVE_S)  # long enough to send the signal; the run stops without our help
        if screen.word:  # the result of the last key, which the board may not have shown before it was left
            console.print(screen.word, markup=False, highlight=False, soft_wrap=True)
    return 0


class _Screen:
    """The board with the selected run and the message about the last key."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.console = board, console
        self.word = ""
        self.cancelling: list[threading.Thread] = []
        self._lines: list[Line] = []
        self._chosen: Path | None = None
        """The selected run's folder; line numbers change when states change."""

    def show(self, read_key: Callable[[float], str]) -> None:
        """Draw the board and handle keys until q."""
        with Live(console=self.console, screen=True, auto_refresh=False) as live:
            while True:
                self._lines = self.board.refresh()
                self._move(0)
                deadline = time.monotonic() + REFRESH_S
                while (rest := deadline - time.monotonic()) > 0:
                    self._draw(live)
                    key = read_key(rest)
                    if key == "q":
                        return
                    if key in ("up", "down"):
                        self._move(1 if key == "down" else -1)
                    elif key in ("f", "c", "r") and self._chosen is not None:
                        self._act(key, self._chosen, live)
                        break  # refresh at once

    def _draw(self, live: Live) -> None:
        heading = title(self.board.root, self._lines, self.word)
        places = [line.folder for line in self._lines]
        chosen = places.index(self._chosen) if self._chosen in places and self._chosen else -1
        live.update(table(self._lines, chosen, self.console.height, heading), refresh=True)

    def _move(self, by: int) -> None:
        """Select the run above or below, skipping headings."""
        folders = list(dict.fromkeys(line.folder for line in self._lines if line.folder))
        at = folders.index(self._chosen) + by if self._chosen in folders else 0
        self._chosen = folders[min(max(at, 0), len(folders) - 1)] if folders else None

    def _act(self, key: str, folder: Path, live: Live) -> None:
        """Handle f, c or r. Cancelling waits for a checkpoint, so it runs in a thread."""
        try:
            if key == "c":
                self.word = f"{folder.name}: being cancelled"
                thread = threading.Thread(target=self._cancel, args=(folder,), daemon=True)
                thread.start()
                self.cancelling.append(thread)
            elif (folder / STAGE_FILE).exists():
                self.word = f"{folder.name}: a command of a chain; launch the chain again, its output is in log.txt"
            elif key == "r":
                self.word = f"{folder.name}: being resumed"
                self._draw(live)
                submission = resume(folder)
                self.word = f"{folder.name}: {'submitted' if submission.submitted else submission.note}"
            else:
                self._follow(folder, live)
        except (ValueError, OSError) as error:
            self.word = str(error)

    def _follow(self, folder: Path, live: Live) -> None:
        job = read_job(folder)
        live.stop()
        try:
            follow(folder, self.console, slurm=job is not None and job.kind == "slurm")
        finally:
            live.start(refresh=True)

    def _cancel(self, folder: Path) -> None:
        try:
            self.word = cancel(folder)
        except (ValueError, OSError) as error:
            self.word = str(error)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits up to so many seconds for a key: `up`, `down`, a letter, or an empty string.

    Bytes are read from the file descriptor, because sys.stdin would buffer more than one. TCSADRAIN keeps keys that
    were pressed before.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSADRAIN)

    def read_byte(wait_s: float) -> str:
        if not select.select([descriptor], [], [], wait_s)[0]:
            return ""
        byte = os.read(descriptor, 1)
        if not byte:
            raise KeyboardInterrupt  # the terminal was closed
        return byte.decode("ascii", errors="replace")

    def read_key(wait_s: float) -> str:
        key = read_byte(wait_s)
        if key != "\x1b":
            return LETTERS.get(key, key)
        return ARROWS.get(read_byte(ESCAPE_S), "") if read_byte(ESCAPE_S) in ("[", "O") else ""

    try:
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
