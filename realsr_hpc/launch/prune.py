"""Find and remove code snapshots that no run refers to any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.files import replace_link
from realsr_hpc.locks import hold

USERS = ".users"
"""File in the folder of snapshots: paths of run folders outside the output root (prepare=DIR), one per line."""


@dataclass(frozen=True)
class Unused:
    """A snapshot that can be removed, with its size."""

    path: Path
    num_bytes: int


def link_code(run_dir: Path, code: Path) -> None:
    """Link the run's folder to the snapshot that it runs from."""
    if run_dir.parent != code.parent.parent:
        with (code.parent / USERS).open("a", encoding="utf-8", errors="surrogateescape") as users:
            users.write(f"{run_dir}\n")
    replace_link(runfolder.code(run_dir), code)


def unused_snapshots(root: Path) -> list[Unused]:
    """Snapshots of an output root that no run folder links to, including incomplete ones."""
    folder = root / "code"
    needed = {runfolder.code(run_dir).resolve() for run_dir in _users(root, folder)}
    found = [path for path in folder.glob("*") if path.is_dir() and path.resolve() not in needed]
    return [Unused(path, _size(path)) for path in sorted(found)]


def remove_snapshots(root: Path) -> list[Unused]:
    """Remove `unused_snapshots` while holding the launch lock; returns the removed ones."""
    with hold(root / f".launch-{os.getuid()}.lock", "removing snapshots", 10.0), hold(root / ".code.lock", "", 10.0):
        found = unused_snapshots(root)
        for item in found:
            shutil.rmtree(item.path)
    return found


def _users(root: Path, folder: Path) -> Iterator[Path]:
    """Runs whose snapshots are needed. OSError where one cannot be looked at: its snapshot may be any of them."""
    yield from runfolder.list_runs(root)
    text = ""
    with suppress(FileNotFoundError):
        text = (folder / USERS).read_text(encoding="utf-8", errors="surrogateescape")
    yield from (path for path in map(Path, text.splitlines()) if path.is_dir())


def _size(path: Path) -> int:
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())
