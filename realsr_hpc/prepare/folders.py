"""Folders of photographs or tars -> a checked manifest: sizes, checksums, splits, captions, and what was found wrong.

Three passes: every photograph is examined (decoded, hashed) in parallel; those without captions are described, if a
captioner is given; then all is joined. The first two keep journals in `output/.prepare`, so that a killed run goes on
where it stood, and a shard (k of n, a task of a Slurm array) does its share of them and stops. Near-duplicates are
reported and kept on one side of the split, so that no held-out photograph has its twin in training. Nothing is copied
or changed. What cannot be used is named with its reason, and the rest is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import ManifestEntry, write_manifest
from realsr_hpc.data.naming import without_endings
from realsr_hpc.data.samples import MIN_PHOTOGRAPH_PX
from realsr_hpc.data.storage import photograph_sha256, relative_to, stamp
from realsr_hpc.files import printable, write_atomically
from realsr_hpc.locks import sole_writer
from realsr_hpc.prepare.describe import Captioner, ClassTagger, tags_of_captions
from realsr_hpc.prepare.duplicates import difference_hash, near_duplicates
from realsr_hpc.prepare.journal import Journal
from realsr_hpc.prepare.notes import CAPTIONS, Note, Notes, WrongNote, note_beside, read_notes
from realsr_hpc.prepare.scan import Item, find_items, folder_splits

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
    """Result of preparing a source."""

    manifest: Path | None
    """None after a shard."""
    entries: tuple[ManifestEntry, ...]
    faults: dict[str, str]
    """By path relative to the source: why the file was left out, the kind of fault first."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """By file, or file and line: notes, or parts of them, that were not used, the kind first."""
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
        return _kinds(self.faults)

    @property
    def is_clean(self) -> bool:
        """Whether everything was used, apart from reduced copies and files of other programs."""
        return not {*self.fault_counts, *_kinds(self.passed_over)} - {"reduced", "foreign"}


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
        ValueError: for wrong options, an output that cannot be written or that another process prepares (of a shard:
            the same one), and where no photograph or note is of use.
    """
    options = options or PrepareOptions()
    _check(options)
    items, left_out = find_items(source)
    with sole_writer(output, part="{}-of-{}".format(*options.shard) if options.shard else ""):
        return _prepared(items, left_out, source, output, options, on_photograph)


def _prepared(
    items: list[Item],
    left_out: dict[str, str],
    source: Path,
    output: Path,
    options: PrepareOptions,
    on_photograph: Callable[[int, int], None],
) -> PrepareReport:
    keys = dict(zip((item.name for item in items), without_endings([item.name for item in items]), strict=True))
    notes = read_notes(options.captions) if options.captions else Notes()
    passed_over = notes.nameless | notes.unused({*keys, *keys.values(), *left_out})
    items = _with_partners(items, notes, keys, source)
    splits = dict(zip((item.name for item in items), folder_splits(items), strict=True))
    mine = items[options.shard[0] - 1 :: options.shard[1]] if options.shard else items
    told, wrong, remarks = _notes_of(mine, notes, keys)
    rows, reused = _examine_all(mine, output, options, on_photograph)
    wrong |= {item.name: rows[item.name]["fault"] for item in mine if "fault" in rows[item.name]}
    sound = [item for item in mine if item.name not in wrong]
    _describe_all(sound, told, output, options)
    entries = [_entry(item, rows[item.name], told[item.name], splits[item.name], output) for item in sound]
    wrong |= _repeated(sound, entries)
    sound, entries = _without(wrong, sound, entries)
    found = _Found(entries, left_out | wrong, passed_over | remarks, reused)
    if options.shard:
        return found.report(None, ())
    groups = near_duplicates([int(rows[item.name]["look"], 16) for item in sound])
    stable = [_stable_name(item, entry.key, keys) for item, entry in zip(sound, entries, strict=True)]
    found.entries = _assign_splits(entries, stable, groups, options.heldout_fraction)
    write_manifest(output / "manifest.parquet", found.entries)
    report = found.report(output / "manifest.parquet", [tuple(entries[i].key for i in group) for group in groups])
    write_atomically(output / "report.json", json.dumps(_told(report), indent=2) + "\n")
    return report


@dataclass
class _Found:
    """What a call came to; names as the file system has them."""

    entries: Sequence[ManifestEntry]
    faults: dict[str, str]
    passed_over: dict[str, str]
    reused: int

    def report(self, manifest: Path | None, duplicates: Sequence[tuple[str, ...]]) -> PrepareReport:
        faults, passed_over = (
            {printable(name): printable(why) for name, why in found.items()}
            for found in (self.faults, self.passed_over)
        )
        lacking = sum(entry.scene is None for entry in self.entries)
        return PrepareReport(
            manifest, tuple(self.entries), faults, passed_over, tuple(duplicates), self.reused, lacking
        )


def _check(options: PrepareOptions) -> None:
    if not 0.0 <= options.heldout_fraction <= 1.0:
        raise ValueError(f"heldout_fraction is {options.heldout_fraction}: give a share between 0 and 1")
    if options.shard and not 1 <= options.shard[0] <= options.shard[1]:
        raise ValueError(f"shard is {options.shard[0]}/{options.shard[1]}: give k/n with k from 1 to n")
    if isinstance(options.tagger, str) and options.tagger not in ("captions", "folder"):
        raise ValueError(f"tagger is {options.tagger!r}: give captions, folder, or a model's folder")


def _with_partners(items: Sequence[Item], notes: Notes, keys: Mapping[str, str], source: Path) -> list[Item]:
    """Notes' partners joined, and the partners themselves no photographs of their own."""
    named = {item.name: notes.told.get(notes.name_of(item.name, keys[item.name]) or "", {}) for item in items}
    partners = {note["lq_path"] for note in named.values() if note.get("lq_path")}
    return [
        replace(item, lq_path=source / named[item.name]["lq_path"]) if named[item.name].get("lq_path") else item
        for item in items
        if item.name not in partners
    ]


def _notes_of(
    items: Sequence[Item], notes: Notes, keys: Mapping[str, str]
) -> tuple[dict[str, Note], dict[str, str], dict[str, str]]:
    """By name: what is told of each photograph, why its note is wrong, and what of a note was passed over."""
    told, wrong, passed_over = {}, {}, {}
    for item in items:
        name = notes.name_of(item.name, keys[item.name])
        beside: Note = {}
        try:
            if name is None and not item.note:
                beside, is_foreign = note_beside(item.path)
                if is_foreign:
                    passed_over[item.name + ".json"] = "foreign: another program's, without captions of ours"
        except WrongNote as error:
            wrong[item.name] = str(error)
        if name in notes.wrong:
            wrong[item.name] = notes.wrong[name]
        if item.remarks:
            passed_over[item.name] = f"note: {'; '.join(item.remarks)}"
        told[item.name] = {"key": printable(keys[item.name]), **item.note, **beside, **notes.told.get(name or "", {})}
    return told, wrong, passed_over


def _repeated(items: Sequence[Item], entries: Sequence[ManifestEntry]) -> dict[str, str]:
    """Why by name for all but the first photograph of a key."""
    first: dict[str, str] = {}
    for item, entry in zip(items, entries, strict=True):
        first.setdefault(entry.key, item.name)
    return {
        item.name: f"key: {entry.key} is also the key of {first[entry.key]}; give each photograph its own"
        for item, entry in zip(items, entries, strict=True)
        if first[entry.key] != item.name
    }


def _without(
    wrong: Mapping[str, str], items: Sequence[Item], entries: Sequence[ManifestEntry]
) -> tuple[list[Item], list[ManifestEntry]]:
    kept = [place for place, item in enumerate(items) if item.name not in wrong]
    return [items[place] for place in kept], [entries[place] for place in kept]


def _examine_all(
    items: Sequence[Item], output: Path, options: PrepareOptions, on_photograph: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows by name, from the journal where it has them, and how many it had."""
    journal = Journal(output / ".prepare", "examined", options.shard)
    known = {item.name: journal.get(item.name, _stamp(item)) for item in items}
    rows = {name: row for name, row in known.items() if row is not None and _is_whole(row)}
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


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row is one that `_examine` wrote; a journal may be damaged."""
    if isinstance(row.get("fault"), str):
        return True
    sizes, digests = [row.get(name) for name in ("width", "height")], [row.get(name) for name in ("sha256", "look")]
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    return whole and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]+", digest) for digest in digests)


def _examine(item: Item) -> dict[str, Any]:
    try:
        image = decode_image(item.path)
        if min(image.shape[:2]) < MIN_PHOTOGRAPH_PX:
            raise BrokenImage(
                f"small: {image.shape[1]}x{image.shape[0]} px, at least {MIN_PHOTOGRAPH_PX} px are needed"
            )
        if item.lq_path is not None:
            decode_image(item.lq_path)
        digest = photograph_sha256(item.path)
    except (BrokenImage, OSError) as error:
        return {"fault": str(error) if isinstance(error, BrokenImage) else f"broken: {error}"}
    look = f"{difference_hash(image):016x}"
    return {"width": image.shape[1], "height": image.shape[0], "sha256": digest, "look": look}


def _stamp(item: Item) -> str:
    """Of the photograph and its partner: a row examined without the partner is examined again with it."""
    partner = "" if item.lq_path is None else f"+{printable(item.lq_path.name)}-{_stamp_of(item.lq_path)}"
    return _stamp_of(item.path) + partner


def _stamp_of(path: Path) -> str:
    try:
        return stamp(path)
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return "missing"


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
        texts = row.get("texts") if row else None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            yield item.name, texts
        else:
            todo.append(item)
    for start in range(0, len(todo), _DESCRIBED_AT_ONCE):
        batch = [
            (item, image) for item in todo[start : start + _DESCRIBED_AT_ONCE] if (image := _decoded(item)) is not None
        ]
        for (item, _), texts in zip(batch, model([image for _, image in batch]) if batch else [], strict=True):
            yield item.name, journal.add(item.name, _stamp(item), {"texts": list(texts)})["texts"]
    journal.close()


def _decoded(item: Item) -> Any:
    """None where the file was removed or altered since it was examined: training will skip and name it."""
    try:
        return decode_image(item.path)
    except BrokenImage:
        return None


def _entry(item: Item, row: Mapping[str, Any], note: Note, split: str, output: Path) -> ManifestEntry:
    return ManifestEntry(
        key=note["key"],
        path=relative_to(item.path, output),
        split=note.get("split") or split,
        width=row["width"],
        height=row["height"],
        sha256=row["sha256"],
        **{name: note.get(name, "") for name in CAPTIONS},
        tags=tuple(note.get("tags", ())),
        lq_path=relative_to(item.lq_path, output) if item.lq_path else None,
        source=note.get("source", ""),
    )


def _assign_splits(
    entries: Sequence[ManifestEntry],
    names: Sequence[str],
    groups: Sequence[tuple[int, ...]],
    heldout_fraction: float,
) -> list[ManifestEntry]:
    """names: what the hash is of, and does not change when a file of nearly the same name comes in."""
    leader = {i: group[0] for group in groups for i in group}
    splits = []
    for i, entry in enumerate(entries):
        first = leader.get(i, i)
        splits.append(entry.split or entries[first].split or _split_of(names[first], heldout_fraction))
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]


def _stable_name(item: Item, key: str, keys: Mapping[str, str]) -> str:
    """A key that a note gave, else the name without ending."""
    return item.stem if key == printable(keys[item.name]) else key


def _split_of(key: str, heldout_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big") / 2**64
    return "heldout" if share < heldout_fraction else "train"


def _kinds(found: Mapping[str, str]) -> dict[str, int]:
    return dict(Counter(why.split(":")[0] for why in found.values()))


def _told(report: PrepareReport) -> dict[str, Any]:
    """The report as a person or a script reads it later."""
    return {
        "photographs": len(report.entries),
        "splits": report.splits,
        "without_captions": report.without_captions,
        "left_out": report.fault_counts,
        "faults": report.faults,
        "passed_over": report.passed_over,
        "duplicates": report.duplicates,
    }
