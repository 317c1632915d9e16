"""Folders of photographs -> a checked manifest: sizes, checksums, splits, captions, and what was found wrong.

Near-duplicates (a difference hash of 64 bits, at most 3 bits apart) are reported and kept on one side of the split,
so that no held-out photograph has its twin in training. Nothing is copied or changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import ManifestEntry, sha256_of, write_manifest

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CAPTION_FIELDS = frozenset(
    {"key", "path", "split", "caption_rough", "caption_middle", "caption_final", "tags", "lq_path", "source"}
)
_DUPLICATE_BITS = 3


@dataclass(frozen=True)
class PrepareReport:
    """What came of a folder."""

    manifest: Path
    entries: tuple[ManifestEntry, ...]
    faults: dict[str, str]
    """By path relative to the source: why the file was left out."""
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of keys that look alike."""
    without_captions: int

    @property
    def splits(self) -> dict[str, int]:
        """Photographs by split."""
        return dict(Counter(entry.split for entry in self.entries))


def find_photographs(source: Path) -> list[Path]:
    """Image files below the folder, sorted.

    Raises:
        ValueError: if there is none.
    """
    if not source.is_dir():
        raise ValueError(f"source {source} is not a folder")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"source {source} holds no photograph; endings looked for: {sorted(SUFFIXES)}")
    return found


def prepare(
    source: Path,
    output: Path,
    captions: Path | None = None,
    heldout_fraction: float = 0.1,
    on_photograph: Callable[[], None] = lambda: None,
) -> PrepareReport:
    """Write `output/manifest.parquet` for the photographs below `source`.

    Captions come from one JSON-lines file (a `path` relative to `source`, or a `key`, in each line) or from
    `<image>.json` beside a photograph. A `split` given there holds; otherwise a hash of the key decides, so adding
    photographs never moves the others (`lq_path` there is relative to `source` too).

    Raises:
        ValueError: for a fraction outside 0..1, an unknown caption field, or a caption without its photograph.
    """
    if not 0.0 <= heldout_fraction <= 1.0:
        raise ValueError(f"heldout_fraction is {heldout_fraction}: give a share between 0 and 1")
    photographs = find_photographs(source)
    notes = _read_captions(captions) if captions else {}
    partners = {source / note["lq_path"] for note in notes.values() if note.get("lq_path")}
    entries, faults, hashes = [], {}, []
    output.mkdir(parents=True, exist_ok=True)
    for path in (path for path in photographs if path not in partners):
        try:
            entry, look = _examine(path, source, output, notes)
            entries.append(entry)
            hashes.append(look)
        except BrokenImage as error:
            faults[path.relative_to(source).as_posix()] = str(error)
        on_photograph()
    _refuse_unused(notes, entries, faults)
    groups = near_duplicates(hashes)
    entries = _assign_splits(entries, groups, heldout_fraction)
    write_manifest(output / "manifest.parquet", entries)
    return PrepareReport(
        manifest=output / "manifest.parquet",
        entries=tuple(entries),
        faults=faults,
        duplicates=tuple(tuple(entries[i].key for i in group) for group in groups),
        without_captions=sum(entry.scene is None for entry in entries),
    )


def difference_hash(image: np.ndarray) -> int:
    """64 bits: is each of 8 x 8 grey cells darker than its right neighbour. `image` is uint8 [H, W, 3]."""
    cells = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def near_duplicates(hashes: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of positions whose hashes differ in at most 3 bits, chains joined.

    Two such hashes agree on at least one of four 16-bit parts, so only those that share a part are compared.
    """
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for shift in (0, 16, 32, 48):
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, value in enumerate(hashes):
            buckets[value >> shift & 0xFFFF].append(i)
        for members in buckets.values():
            for i, j in combinations(members, 2):
                if (hashes[i] ^ hashes[j]).bit_count() <= _DUPLICATE_BITS:
                    low, high = sorted((root(i), root(j)))
                    parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(hashes)):
        groups[root(i)].append(i)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _examine(path: Path, source: Path, output: Path, notes: Mapping[str, dict]) -> tuple[ManifestEntry, int]:
    image = decode_image(path)
    relative = path.relative_to(source)
    note = notes.get(relative.as_posix()) or notes.get(relative.with_suffix("").as_posix()) or _beside(path)
    lq_path = note.get("lq_path")
    entry = ManifestEntry(
        key=note.get("key", relative.with_suffix("").as_posix()),
        path=_relative(path, output),
        split=note.get("split", ""),
        width=image.shape[1],
        height=image.shape[0],
        sha256=sha256_of(path),
        caption_rough=note.get("caption_rough", ""),
        caption_middle=note.get("caption_middle", ""),
        caption_final=note.get("caption_final", ""),
        tags=tuple(note.get("tags", ())),
        lq_path=_relative(source / lq_path, output) if lq_path else None,
        source=note.get("source", ""),
    )
    return entry, difference_hash(image)


def _assign_splits(
    entries: Sequence[ManifestEntry], groups: Sequence[tuple[int, ...]], heldout_fraction: float
) -> list[ManifestEntry]:
    leader = {i: group[0] for group in groups for i in group}
    splits = []
    for i, entry in enumerate(entries):
        first = entries[leader.get(i, i)]
        splits.append(entry.split or first.split or _split_of(first.key, heldout_fraction))
    return [ManifestEntry(**{**vars(entry), "split": split}) for entry, split in zip(entries, splits, strict=True)]


def _split_of(key: str, heldout_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if share < heldout_fraction else "train"


def _read_captions(path: Path) -> dict[str, dict[str, Any]]:
    notes: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        note = _checked(json.loads(line), f"{path}:{number}")
        name = note.get("path") or note.get("key")
        if not name:
            raise ValueError(f"{path}:{number} has neither path nor key; name the photograph it describes")
        notes[name] = note
    return notes


def _beside(path: Path) -> dict[str, Any]:
    note = path.with_name(path.name + ".json")
    return _checked(json.loads(note.read_text(encoding="utf-8")), str(note)) if note.is_file() else {}


def _checked(note: dict[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(set(note) - CAPTION_FIELDS)
    if unknown:
        raise ValueError(f"{where} has the unknown fields {unknown}; known: {sorted(CAPTION_FIELDS)}")
    texts = [note.get(name, "") for name in ("caption_rough", "caption_middle", "caption_final")]
    if any(texts) and not all(texts):
        raise ValueError(f"{where} has some of the three captions; give all of them or none")
    if any("<" in text or ">" in text for text in texts):
        raise ValueError(f"{where} has '<' or '>' in a caption: leave out what closes a trace's fields")
    return note


def _refuse_unused(
    notes: Mapping[str, dict[str, Any]], entries: Sequence[ManifestEntry], faults: Mapping[str, str]
) -> None:
    used = {entry.key for entry in entries} | set(faults) | {str(Path(name).with_suffix("")) for name in faults}
    unused = [name for name, note in notes.items() if name not in used and note.get("key", _stem(name)) not in used]
    if unused:
        raise ValueError(f"captions describe {unused[:5]}, not found below source; correct path or key")


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _relative(path: Path, output: Path) -> str:
    return Path(os.path.relpath(path.resolve(), output.resolve())).as_posix()
