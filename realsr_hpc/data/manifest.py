"""The list of photographs that a run reads: a Parquet table with checksums, captions and tags.

Paths in the table are relative to its folder, so a data set can be moved as a whole. Reading it does not read the
photographs; the loader skips and names those that cannot be used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from realsr_hpc.data.naming import as_text, from_text
from realsr_hpc.files import checksum_fault, with_checksum
from realsr_hpc.records import SceneText

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("caption_rough", pa.string()),
        ("caption_middle", pa.string()),
        ("caption_final", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("lq_path", pa.string()),
        ("source", pa.string()),
        ("word", pa.string()),
    ]
)
LATER = {"word"}
"""Columns that older manifests lack; empty there."""

_PATHS = ("path", "lq_path")
_DIGEST = b"realsr_hpc.rows_sha256"
_MARKS = "<>\ue000\ue001"
"""Characters that captions must not contain: those of a trace's tags, and the internal marks of an image."""


def caption_fault(captions: Iterable[str]) -> str | None:
    """Why captions cannot be used in a trace; None: they can.

    A caption that closes its field's tag could forge the rest of the trace.
    """
    held = [mark for mark in _MARKS if any(mark in text for text in captions)]
    return f"caption: {held[0]!r} in it could close a trace's field; leave it out" if held else None


@dataclass(frozen=True)
class ManifestEntry:
    """One photograph; `path` and `lq_path` relative to the manifest's folder, sizes in px as shown (after rotation)."""

    key: str
    path: str
    split: str
    width: int
    height: int
    sha256: str
    caption_rough: str = ""
    caption_middle: str = ""
    caption_final: str = ""
    tags: tuple[str, ...] = ()
    lq_path: str | None = None
    """A real low-quality photograph of the same scene (paired data)."""
    source: str = ""
    """Origin of the photograph, as free text."""
    word: str = ""
    """A word that the image shows; such an image is taken whole and never mirrored."""

    @property
    def scene(self) -> SceneText | None:
        """Captions and tags; None if the photograph has no captions."""
        if not self.caption_final:
            return None
        return SceneText(self.caption_rough, self.caption_middle, self.caption_final, self.tags, self.word)


@dataclass(frozen=True)
class Manifest:
    """The entries in the order of the table, and the folder that their paths are relative to."""

    root: Path
    entries: tuple[ManifestEntry, ...]

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self.entries)

    def split(self, name: str) -> Manifest:
        """The entries of one split.

        Raises:
            ValueError: if no entry belongs to it.
        """
        chosen = tuple(entry for entry in self.entries if entry.split == name)
        if not chosen:
            known = ", ".join(sorted({entry.split for entry in self.entries}))
            remedy = f"there are {known}: name one" if known else "it is empty: make it with realsr-hpc prepare-data"
            raise ValueError(f"split={name!r}: no photograph of the manifest in {self.root} is in this split; {remedy}")
        return Manifest(self.root, chosen)

    def path(self, entry: ManifestEntry) -> Path:
        """Absolute path of the photograph."""
        return self.root / entry.path

    def lq_path(self, entry: ManifestEntry) -> Path:
        """Absolute path of its low-quality partner.

        Raises:
            ValueError: if the entry has none.
        """
        if entry.lq_path is None:
            raise ValueError(f"lq_path of {entry.key!r} is empty: paired data needs it, or set data.mode=unpaired")
        return self.root / entry.lq_path


def read_manifest(path: Path | str) -> Manifest:
    """Read and check the table (not the photographs).

    Raises:
        ValueError: if the file is damaged or does not match its checksum, a column is missing or of another type, or a
            key occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"manifest {path} does not exist; make one with realsr-hpc prepare-data")
    if fault := checksum_fault(path):
        raise ValueError(f"manifest: {fault}")
    rows, digest = _read_rows(path)
    if digest not in (None, _digest_of(rows)):
        raise ValueError(f"manifest {path} is damaged: its rows differ from those that were written; make it again")
    entries = tuple(_entry(row, path) for row in rows)
    _refuse_repeated_keys(entries)
    return Manifest(path.parent, entries)


class _Row(TypedDict):
    """A row as `SCHEMA` has it; any column may be empty."""

    key: str | None
    path: str | None
    split: str | None
    width: int | None
    height: int | None
    sha256: str | None
    caption_rough: str | None
    caption_middle: str | None
    caption_final: str | None
    tags: list[str | None] | None
    lq_path: str | None
    source: str | None
    word: NotRequired[str | None]


def _read_rows(path: Path) -> tuple[list[_Row], str | None]:
    try:
        with path.open("rb") as stream:  # pyarrow opens no name that is not UTF-8
            table = pq.read_table(stream, page_checksum_verification=True)
        present = [name for name in SCHEMA.names if name in table.column_names]
        absent = [name for name in SCHEMA.names if name not in present and name not in LATER]
        if absent:
            raise ValueError(f"manifest {path} lacks the columns {absent}; make it with realsr-hpc prepare-data")
        metadata = table.schema.metadata or {}
        rows = table.select(present).cast(pa.schema([SCHEMA.field(name) for name in present])).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"manifest {path} is damaged ({reason}); make it again with realsr-hpc prepare-data") from None
    digest = metadata.get(_DIGEST)
    return rows, None if digest is None else digest.decode("ascii", "replace")


def _entry(row: _Row, path: Path) -> ManifestEntry:
    if not (row["key"] and row["path"] and row["split"] and row["width"] and row["height"]):
        raise ValueError(f"manifest {path}: key, path, split or size of {row['key']!r} is empty; make it again")
    return ManifestEntry(
        row["key"],
        from_text(row["path"]),
        row["split"],
        row["width"],
        row["height"],
        row["sha256"] or "",
        caption_rough=row["caption_rough"] or "",
        caption_middle=row["caption_middle"] or "",
        caption_final=row["caption_final"] or "",
        tags=tuple(tag for tag in row["tags"] or () if tag),
        lq_path=row["lq_path"] and from_text(row["lq_path"]),
        source=row["source"] or "",
        word=row.get("word") or "",
    )


def _digest_of(rows: Sequence[_Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_manifest(path: Path | str, entries: Sequence[ManifestEntry]) -> None:
    """Write the table, and its checksum beside it.

    Raises:
        ValueError: if a key occurs twice.
    """
    _refuse_repeated_keys(entries)
    rows = [{name: getattr(entry, name) for name in SCHEMA.names} for entry in entries]
    rows = [{**row, **{name: row[name] and as_text(row[name]) for name in _PATHS}} for row in rows]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    table = table.replace_schema_metadata({_DIGEST: _digest_of(table.to_pylist())})
    with with_checksum(Path(path)) as aside, aside.open("wb") as stream:
        pq.write_table(table, stream, write_page_checksum=True)


def _refuse_repeated_keys(entries: Iterable[ManifestEntry]) -> None:
    repeated = [key for key, count in Counter(entry.key for entry in entries).items() if count > 1]
    if repeated:
        raise ValueError(f"keys {repeated[:5]} occur more than once; give each photograph a unique key")
