"""Builds a checked manifest from folders or tars of photographs: sizes, checksums, splits, captions, and faults.

1. Every photograph is examined (decoded and hashed) in parallel.
2. Photographs without captions are described, if a captioner is given.
3. The results are joined into the manifest.

The first two passes keep journals in `output/.prepare`, so that a killed preparation continues where it was; a shard (k
of n, a task of a Slurm array) does its share of them and stops. Near-duplicates are reported and assigned to the same
split, so that no held-out photograph has a copy in training. Photographs are neither copied nor changed. A photograph
that cannot be used is reported with the reason, and the others are prepared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from realsr_hpc.data.manifest import ManifestEntry, write_manifest
from realsr_hpc.data.naming import without_endings
from realsr_hpc.data.storage import relative_to
from realsr_hpc.files import printable, write_atomically
from realsr_hpc.locks import sole_writer
from realsr_hpc.prepare.describe import Captioner, ClassTagger, tags_of_captions
from realsr_hpc.prepare.duplicates import near_duplicates
from realsr_hpc.prepare.examine import Examined, Shard, describe_items, examine_all
from realsr_hpc.prepare.notes import Note, Notes, WrongNote, captions_of, note_beside, read_notes
from realsr_hpc.prepare.scan import Item, find_items, folder_splits


@dataclass(frozen=True)
class PrepareOptions:
    """How a source is prepared."""

    captions: Path | None = None
    """A JSON-lines file of notes: see `notes.py`."""
    heldout_fraction: float = 0.1
    """Held-out share (0..1) of the photographs whose split is given neither by a note nor by a folder."""
    captioner: Captioner | None = None
    """Writes captions for photographs without any."""
    tagger: ClassTagger | str | None = None
    """Tags photographs without tags: a model, `captions` (their content words) or `folder` (its name)."""
    num_threads: int = 1
    shard: Shard | None = None
    """Examine and describe only this shard's photographs, and write no manifest."""


@dataclass(frozen=True)
class PrepareReport:
    """Result of preparing a source."""

    manifest: Path | None
    """None after a shard."""
    entries: tuple[ManifestEntry, ...]
    faults: dict[str, str]
    """By path relative to the source: why the file was left out, as `KIND: reason`."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """By file, or file and line: why a note or a part of one was not used, as `KIND: reason`."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of keys whose photographs look alike."""
    reused: int = 0
    """Number of photographs that an earlier call or another shard had already examined."""
    without_captions: int = 0

    @property
    def splits(self) -> dict[str, int]:
        """Number of photographs by split."""
        return dict(Counter(entry.split for entry in self.entries))

    @property
    def fault_counts(self) -> dict[str, int]:
        """Number of photographs left out, by kind of fault."""
        return _kinds(self.faults)

    @property
    def is_clean(self) -> bool:
        """Whether everything was used, except reduced copies and files of other programs."""
        return not {*self.fault_counts, *_kinds(self.passed_over)} - {"reduced", "foreign"}


def prepare(
    source: Path,
    output: Path,
    options: PrepareOptions | None = None,
    on_photograph: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Write `output/manifest.parquet` and `report.json` for the photographs below `source`.

    The split of a photograph is that of its note, else that of a folder named train or test, else it follows from a
    hash of its key, so that adding photographs never moves others.

    on_photograph: called with the number of examined photographs and the total.

    Raises:
        ValueError: for invalid options, if the output cannot be written or another process prepares it (or the same
            shard), or if there is no usable photograph or no note is about one.
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
    passed_over = {**notes.nameless, **notes.unused({*keys, *keys.values(), *left_out})}
    items = _with_partners(items, notes, keys, source)
    splits = dict(zip((item.name for item in items), folder_splits(items), strict=True))
    mine = items[options.shard[0] - 1 :: options.shard[1]] if options.shard else items
    told, wrong, remarks = _notes_of(mine, notes, keys)
    examined, reused = examine_all(mine, output, options.shard, options.num_threads, on_photograph)
    wrong |= {item.name: examined[item.name].fault for item in mine if examined[item.name].fault}
    sound = [item for item in mine if item.name not in wrong]
    _describe_all(sound, told, output, options)
    entries = [_entry(item, examined[item.name], told[item.name], splits[item.name], output) for item in sound]
    wrong |= _repeated(sound, entries)
    sound, entries = _without(wrong, sound, entries)
    found = _Found(left_out | wrong, passed_over | remarks, reused)
    if options.shard:
        return found.report(None, entries, ())
    groups = near_duplicates([int(examined[item.name].look, 16) for item in sound])
    stable = [_stable_name(item, entry.key, keys) for item, entry in zip(sound, entries, strict=True)]
    entries = _assign_splits(entries, stable, groups, options.heldout_fraction)
    write_manifest(output / "manifest.parquet", entries)
    twins = [tuple(entries[i].key for i in group) for group in groups]
    report = found.report(output / "manifest.parquet", entries, twins)
    write_atomically(output / "report.json", json.dumps(_report_json(report), indent=2) + "\n")
    return report


@dataclass(frozen=True)
class _Found:
    """Faults and ignored notes, by name as in the file system, which may not be printable."""

    faults: dict[str, str]
    passed_over: dict[str, str]
    reused: int

    def report(
        self, manifest: Path | None, entries: Sequence[ManifestEntry], duplicates: Sequence[tuple[str, ...]]
    ) -> PrepareReport:
        faults, passed_over = (
            {printable(name): printable(why) for name, why in found.items()}
            for found in (self.faults, self.passed_over)
        )
        lacking = sum(entry.scene is None for entry in entries)
        return PrepareReport(manifest, tuple(entries), faults, passed_over, tuple(duplicates), self.reused, lacking)


def _check(options: PrepareOptions) -> None:
    if not 0.0 <= options.heldout_fraction <= 1.0:
        raise ValueError(f"heldout_fraction is {options.heldout_fraction}: give a share between 0 and 1")
    if options.shard and not 1 <= options.shard[0] <= options.shard[1]:
        raise ValueError(f"shard is {options.shard[0]}/{options.shard[1]}: give k/n with k from 1 to n")
    if isinstance(options.tagger, str) and options.tagger not in ("captions", "folder"):
        raise ValueError(f"tagger is {options.tagger!r}: give captions, folder, or a model's folder")


def _with_partners(items: Sequence[Item], notes: Notes, keys: Mapping[str, str], source: Path) -> list[Item]:
    """Give each item the low-quality partner that its note names, and drop the partners as photographs of their own."""
    empty: Note = {}
    named = {item.name: notes.told.get(notes.name_of(item.name, keys[item.name]) or "", empty) for item in items}
    partner = {name: path for name, note in named.items() if (path := note.get("lq_path"))}
    partners = set(partner.values())
    return [
        replace(item, lq_path=source / partner[item.name]) if item.name in partner else item
        for item in items
        if item.name not in partners
    ]


def _notes_of(
    items: Sequence[Item], notes: Notes, keys: Mapping[str, str]
) -> tuple[dict[str, Note], dict[str, str], dict[str, str]]:
    """By name: the joined notes of each photograph, why a note is invalid, and which parts of notes were ignored."""
    told: dict[str, Note] = {}
    wrong: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    empty: Note = {}
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
        if name is not None and name in notes.wrong:
            wrong[item.name] = notes.wrong[name]
        if item.remarks:
            passed_over[item.name] = f"note: {'; '.join(item.remarks)}"
        listed = notes.told.get(name or "", empty)
        told[item.name] = {"key": printable(keys[item.name]), **item.note, **beside, **listed}
    return told, wrong, passed_over


def _repeated(items: Sequence[Item], entries: Sequence[ManifestEntry]) -> dict[str, str]:
    """By name: the fault of each photograph whose key an earlier photograph already has."""
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


def _describe_all(items: Sequence[Item], told: dict[str, Note], output: Path, options: PrepareOptions) -> None:
    """Add captions and tags to the notes in `told` that lack them."""
    if options.captioner is not None:
        captioner = options.captioner
        lacking = [item for item in items if not told[item.name].get("caption_final")]
        found = describe_items(lacking, output, f"captions-{captioner.name}", captioner, options.shard)
        for name, (rough, middle, final) in found:
            told[name] |= {"caption_rough": rough, "caption_middle": middle, "caption_final": final}
    lacking = [item for item in items if not told[item.name].get("tags")]
    if isinstance(options.tagger, ClassTagger):
        tagger = options.tagger
        for name, tags in describe_items(lacking, output, f"tags-{tagger.name}", tagger, options.shard):
            told[name]["tags"] = tags
    for item in lacking:
        note = told[item.name]
        if options.tagger == "folder" and item.folders:
            note["tags"] = [item.folders[-1].replace("_", " ").lower()]
        elif options.tagger == "captions" and note.get("caption_final"):
            note["tags"] = list(tags_of_captions(captions_of(note)))


def _entry(item: Item, examined: Examined, note: Note, split: str, output: Path) -> ManifestEntry:
    rough, middle, final = captions_of(note)
    return ManifestEntry(
        key=note.get("key", ""),
        path=relative_to(item.path, output),
        split=note.get("split") or split,
        width=examined.width,
        height=examined.height,
        sha256=examined.sha256,
        caption_rough=rough,
        caption_middle=middle,
        caption_final=final,
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
    """Entries with their splits; near-duplicates get the split of the first of their group.

    names: the text to hash for each entry, which does not change when a file of a similar name is added.
    """
    leader = {i: group[0] for group in groups for i in group}
    splits = []
    for i, entry in enumerate(entries):
        first = leader.get(i, i)
        splits.append(entry.split or entries[first].split or _split_of(names[first], heldout_fraction))
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]


def _stable_name(item: Item, key: str, keys: Mapping[str, str]) -> str:
    """The key if a note gave it, else the name without ending."""
    return item.stem if key == printable(keys[item.name]) else key


def _split_of(key: str, heldout_fraction: float) -> str:
    share = int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big") / 2**64
    return "heldout" if share < heldout_fraction else "train"


def _kinds(found: Mapping[str, str]) -> dict[str, int]:
    """Number of reasons by kind, the part before the colon."""
    return dict(Counter(why.split(":")[0] for why in found.values()))


def _report_json(report: PrepareReport) -> dict[str, object]:
    """The content of report.json."""
    return {
        "photographs": len(report.entries),
        "splits": report.splits,
        "without_captions": report.without_captions,
        "left_out": report.fault_counts,
        "faults": report.faults,
        "passed_over": report.passed_over,
        "duplicates": report.duplicates,
    }
