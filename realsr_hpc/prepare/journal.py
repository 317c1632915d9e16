"""Completed work as JSON lines: a killed preparation continues from it, and shards share their results."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

Row = Mapping[str, object]
"""A JSON object."""


class Journal:
    """Rows by the name of a photograph. New rows are appended to this process's file; the files of all shards are read.

    Each row has the stamp of the photograph's files; it counts only while they have that stamp.
    """

    def __init__(self, folder: Path, kind: str, shard: tuple[int, int] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = f"-{shard[0]}-of-{shard[1]}" if shard else ""
        self._path = folder / f"{kind}{part}.jsonl"
        self._rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        for path in sorted({*folder.glob(f"{kind}.jsonl"), *folder.glob(f"{kind}-*-of-*.jsonl")}):
            self._rows |= dict(_whole_lines(path))
        self._file = self._path.open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # ends a line that was cut short when the process was killed

    def get(self, name: str, stamp: str) -> Row | None:
        """The row of a photograph; None if there is none with this stamp."""
        row = self._rows.get(name)
        return row if row is not None and row["stamp"] == stamp else None

    def add(self, name: str, stamp: str, row: Row) -> None:
        """Append a row to the file. Thread-safe."""
        whole = {"name": name, "stamp": stamp, **row}
        with self._lock:
            self._file.write(json.dumps(whole) + "\n")
            self._file.flush()
            self._rows[name] = whole

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[tuple[str, Row]]:
    """Name and row of each line; empty, incomplete and damaged lines are left out, and their photographs done again."""
    rows: list[tuple[str, Row]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row: object = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(name := row.get("name"), str) and "stamp" in row:
            rows.append((name, row))
    return rows
