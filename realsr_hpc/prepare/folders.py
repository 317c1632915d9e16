"""Folders of photographs or tars -> a checked manifest: sizes, checksums, splits, captions, and what was found wrong.

Three passes: every photograph is examined (decoded, hashed) in parallel; those without captions are described, if a
captioner is given; then all is joined. The first two keep journals in `output/.prepare`, so that a killed run goes on
where it stood, and a shard (k of n, a task of a Slurm array) does its share of them and stops. Near-duplicates are
reported and kept on one side of the split, so that no held-out photograph has its twin in training. Nothing is copied
or changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import ManifestEntry, write_manifest
from realsr_hpc.data.samples import MIN_PHOTOGRAPH_PX
from realsr_hpc.data.storage import sha256_of, stamp
from realsr_hpc.prepare.describe import Captioner, ClassTagger, tags_of_captions
from realsr_hpc.prepare.duplicates import difference_hash, near_duplicates
from realsr_hpc.prepare.journal import Journal
from realsr_hpc.prepare.notes import CAPTIONS, Note, note_beside, read_notes, refuse_unused
from realsr_hpc.prepare.sources import Item, find_items, folder_splits

_DESCRIBED_AT_ONCE = 8


@dataclass(frozen=True)
class PrepareOptions:
    """How a source is prepared."""

    captions: Path | None = None
    """JSON lines: see `notes.py`."""
    heldout_fraction: float = 0.1
    """Share of the photographs whose split neither a note nor a folder tells."""
    captioner: Captioner | None = None
    """Describes photographs without captions."""
    tagger: ClassTagger | str | None = None
    """Tags photographs without tags: a model, `captions` (their content words) or `folder` (its name)."""
    num_threads: int = 1
    shard: tuple[int, int] | None = None
    """(k, n), k from 1: examine and describe every n-th photograph only and write no manifest."""


@dataclass(frozen=True)
class PrepareReport:
    """What came of a source."""

    manifest: Path | None
    """None after a shard."""
    entries: tuple[ManifestEntry, ...]
    faults: dict[str, str]
    """By path relative to the source: why the file was left out, the kind of fault first."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of keys that look alike."""
    reused: int = 0
    """Photographs that an earlier run or another shard had examined."""
    without_captions: int = 0

    @property
    def splits(self) -> dict[str, int]:
        """Photographs by split."""
        return dict(Counter(entry.split for entry in self.entries))

    @property
    def fault_counts(self) -> dict[str, int]:
        """Photographs left out, by kind of fault."""
        return dict(Counter(fault.split(":")[0] for fault in self.faults.values()))


def prepare(
    source: Path,
    output: Path,
    options: PrepareOptions | None = None,
    on_photograph: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Write `output/manifest.parquet` and `report.json` for the photographs below `source`.

    A `split` in a note holds; then folders called train and test; then a hash of the key decides, so adding
    photographs never moves the others. `on_photograph` is told how many of how many are examined.

    Raises:
        ValueError: for wrong options, an unknown caption field, or a caption without its photograph.
    """
    options = options or PrepareOptions()
    _check(options)
    items, left_out = find_items(source)
    notes = read_notes(options.captions) if options.captions else {}
    items = _with_partners(items, notes, source)
    splits = dict(zip((item.name for item in items), folder_splits(items), strict=True))
    mine = items[options.shard[0] - 1 :: options.shard[1]] if options.shard else items
    rows, reused = _examine_all(mine, output, options, on_photograph)
    told = {item.name: _note(item, notes) for item in mine}
    sound = [item for item in mine if "fault" not in rows[item.name]]
    _describe_all(sound, told, output, options)
    faults = left_out | {item.name: rows[item.name]["fault"] for item in mine if "fault" in rows[item.name]}
    entries = [_entry(item, rows[item.name], told[item.name], splits[item.name], output) for item in sound]
    if options.shard:
        return PrepareReport(None, tuple(entries), faults, (), reused, _without_captions(entries))
    refuse_unused(notes, [*_keys(entries), *faults, *(str(Path(name).with_suffix("")) for name in faults)])
    groups = near_duplicates([int(rows[item.name]["look"], 16) for item in sound])
    entries = _assign_splits(entries, groups, options.heldout_fraction)
    write_manifest(output / "manifest.parquet", entries)
    duplicates = tuple(tuple(entries[i].key for i in group) for group in groups)
    report = PrepareReport(
        output / "manifest.parquet", tuple(entries), faults, duplicates, reused, _without_captions(entries)
    )
    (output / "report.json").write_text(json.dumps(_told(report), indent=2) + "\n", encoding="utf-8")
    return report


def _check(options: PrepareOptions) -> None:
    if not 0.0 <= options.heldout_fraction <= 1.0:
        raise ValueError(f"heldout_fraction is {options.heldout_fraction}: give a share between 0 and 1")
    if options.shard and not 1 <= options.shard[0] <= options.shard[1]:
        raise ValueError(f"shard is {options.shard[0]}/{options.shard[1]}: give k/n with k from 1 to n")
    if isinstance(options.tagger, str) and options.tagger not in ("captions", "folder"):
        raise ValueError(f"tagger is {options.tagger!r}: give captions, folder, or a model's folder")


def _with_partners(items: Sequence[Item], notes: Mapping[str, Note], source: Path) -> list[Item]:
    """Notes' partners joined, and the partners themselves no photographs of their own."""
    partners = {note["lq_path"] for note in notes.values() if note.get("lq_path")}
    kept = [item for item in items if item.name not in partners]
    named = {item.name: notes.get(item.name) or notes.get(item.stem) or {} for item in kept}
    return [
        replace(item, lq_path=source / named[item.name]["lq_path"]) if named[item.name].get("lq_path") else item
        for item in kept
    ]


def _note(item: Item, notes: Mapping[str, Note]) -> Note:
    given = notes.get(item.name) or notes.get(item.stem) or (note_beside(item.path) if not item.note else {})
    return {**item.note, **given}


def _examine_all(
    items: Sequence[Item], output: Path, options: PrepareOptions, on_photograph: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows by name, from the journal where it has them, and how many it had."""
    journal = Journal(output / ".prepare", "examined", options.shard)
    rows = {item.name: row for item in items if (row := journal.get(item.name, _stamp(item))) is not None}
    todo = [item for item in items if item.name not in rows]
    reused = len(rows)
    on_photograph(reused, len(items))
    # Threads are enough: decoding and hashing release the interpreter.
    with ThreadPoolExecutor(options.num_threads) as pool:
        for item, row in zip(todo, pool.map(_examine, todo), strict=True):
            rows[item.name] = journal.add(item.name, _stamp(item), row)
            on_photograph(len(rows), len(items))
    journal.close()
    return rows, reused


def _examine(item: Item) -> dict[str, Any]:
    try:
        image = decode_image(item.path)
        if min(image.shape[:2]) < MIN_PHOTOGRAPH_PX:
            raise BrokenImage(
                f"small: {image.shape[1]}x{image.shape[0]} px, at least {MIN_PHOTOGRAPH_PX} px are needed"
            )
        if item.lq_path is not None:
            decode_image(item.lq_path)
    except BrokenImage as error:
        return {"fault": str(error)}
    look = f"{difference_hash(image):016x}"
    return {"width": image.shape[1], "height": image.shape[0], "sha256": sha256_of(item.path), "look": look}


def _stamp(item: Item) -> str:
    """Of the photograph and its partner: a row examined without the partner is examined again with it."""
    return stamp(item.path) if item.lq_path is None else f"{stamp(item.path)}+{item.lq_path.name}"


def _describe_all(items: Sequence[Item], told: dict[str, Note], output: Path, options: PrepareOptions) -> None:
    """Add captions and tags to the notes that lack them."""
    if options.captioner is not None:
        captioner = options.captioner
        lacking = [item for item in items if not told[item.name].get("caption_final")]
        found = _described(lacking, output, f"captions-{captioner.name}", captioner, options.shard)
        for name, texts in found:
            told[name] |= dict(zip(CAPTIONS, texts, strict=True))
    lacking = [item for item in items if not told[item.name].get("tags")]
    if isinstance(options.tagger, ClassTagger):
        for name, tags in _described(lacking, output, f"tags-{options.tagger.name}", options.tagger, options.shard):
            told[name]["tags"] = tags
    for item in lacking:
        note = told[item.name]
        if options.tagger == "folder" and item.folders:
            note["tags"] = [item.folders[-1].replace("_", " ").lower()]
        elif options.tagger == "captions" and note.get("caption_final"):
            note["tags"] = list(tags_of_captions(tuple(note[name] for name in CAPTIONS)))


def _described(
    items: Sequence[Item], output: Path, kind: str, model: Callable, shard: tuple[int, int] | None
) -> Iterable[tuple[str, list[str]]]:
    """(name, texts) of each item, a batch at a time, through the model's own journal."""
    journal = Journal(output / ".prepare", kind, shard)
    todo = []
    for item in items:
        row = journal.get(item.name, _stamp(item))
        if row is None:
            todo.append(item)
        else:
            yield item.name, row["texts"]
    for start in range(0, len(todo), _DESCRIBED_AT_ONCE):
        batch = todo[start : start + _DESCRIBED_AT_ONCE]
        for item, texts in zip(batch, model([decode_image(item.path) for item in batch]), strict=True):
            yield item.name, journal.add(item.name, _stamp(item), {"texts": list(texts)})["texts"]
    journal.close()


def _entry(item: Item, row: Mapping[str, Any], note: Note, split: str, output: Path) -> ManifestEntry:
    return ManifestEntry(
        key=note.get("key", item.stem),
        path=_relative(item.path, output),
        split=note.get("split", split),
        width=row["width"],
        height=row["height"],
        sha256=row["sha256"],
        **{name: note.get(name, "") for name in CAPTIONS},
        tags=tuple(note.get("tags", ())),
        lq_path=_relative(item.lq_path, output) if item.lq_path else None,
        source=note.get("source", ""),
    )


def _keys(entries: Sequence[ManifestEntry]) -> list[str]:
    return [entry.key for entry in entries]


def _without_captions(entries: Sequence[ManifestEntry]) -> int:
    return sum(entry.scene is None for entry in entries)


def _assign_splits(
    entries: Sequence[ManifestEntry], groups: Sequence[tuple[int, ...]], heldout_fraction: float
) -> list[ManifestEntry]:
    leader = {i: group[0] for group in groups for i in group}
    splits = []
    for i, entry in enumerate(entries):
        first = entries[leader.get(i, i)]
        splits.append(entry.split or first.split or _split_of(first.key, heldout_fraction))
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]


def _split_of(key: str, heldout_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if share < heldout_fraction else "train"


def _relative(path: Path, output: Path) -> str:
    return Path(os.path.relpath(path.resolve(), output.resolve())).as_posix()


def _told(report: PrepareReport) -> dict[str, Any]:
    """The report as a person or a script reads it later."""
    return {
        "photographs": len(report.entries),
        "splits": report.splits,
        "without_captions": report.without_captions,
        "left_out": report.fault_counts,
        "faults": report.faults,
        "duplicates": report.duplicates,
    }
