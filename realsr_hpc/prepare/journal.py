"""Completed work as JSON lines: a killed preparation continues from it, and shards share their results."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any


class Journal:
    """Rows by name; new ones are appended to this process's own file, those of all others are read once.

    A row counts only while its `stamp` is that of the photograph.
    """

    def __init__(self, folder: Path, kind: str, shard: tuple[int, int] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = f"-{shard[0]}-of-{shard[1]}" if shard else ""
        self._path = folder / f"{kind}{part}.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        for path in sorted({*folder.glob(f"{kind}.jsonl"), *folder.glob(f"{kind}-*-of-*.jsonl")}):
            self._rows |= {row["name"]: row for row in _whole_lines(path)}
        self._file = self._path.open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # ends a line that a kill cut short

    def get(self, name: str, stamp: str) -> dict[str, Any] | None:
        """The row of a name, or None if there is none for this stamp."""
        row = self._rows.get(name)
        return row if row is not None and row["stamp"] == stamp else None

    def add(self, name: str, stamp: str, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row to the file and return it. Thread-safe."""
        whole = {"name": name, "stamp": stamp, **row}
        with self._lock:
            self._file.write(json.dumps(whole) + "\n")
            self._file.flush()
            self._rows[name] = whole
        return whole

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # empty, or cut short by a kill: that photograph is done again
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str) and "stamp" in row]
