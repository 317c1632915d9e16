"""Scans a source for photographs and their low-quality partners, and interprets the names of its folders.

| layout | how it is read |
|---|---|
| any folder | every image below it |
| LSDIR, DIV2K | `HR` is read; its reduced copies beside it (`X2`, `X3`, `X4`, `*_LR_*`) are left out |
| FFHQ | `images1024x1024`; the thumbnails beside it are left out |
| OST | `*Train*` and `*Test*` decide the split; the category folder can be the tag (`tagger=folder`) |
| RealSR, DRealSR | `NAME_HR.png` with `NAME_LR4.png` (or `_GT`, `_LQ`) beside it: a pair |
| pair folders | `gt`/`HR`/`test_HR` with `lq`/`LR`/`test_LR` beside it, equal names (tags like `_x4` aside): pairs |
| WebDataset | `*.tar`, uncompressed: members that are images; `.json`, `.txt` of the same name are their notes |

Linked folders are entered once each. Files that look like photographs but cannot be read are left out and reported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from realsr_hpc.data.decoding import SUFFIXES, UNREAD_SUFFIXES
from realsr_hpc.data.naming import LOW_NAME, TRUTH_NAME, files_below, matched, split_of
from realsr_hpc.data.storage import Member, open_bytes, tar_members
from realsr_hpc.prepare.notes import Note, note_in_tar, sound_name

_TRUTH_FOLDERS = frozenset({"gt", "hr", "test_hr"})
_LOW_FOLDERS = frozenset({"lq", "lr", "test_lr"})
_COMPRESSED = re.compile(r".*\.(?:tgz|tar\.\w+)", re.IGNORECASE)
_REDUCED = re.compile(r"x[2348]|.*_LR_.*|thumbnails\d+x\d+", re.IGNORECASE)
_FULL = re.compile(r"HR|.*_HR|images\d+x\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One photograph of a source."""

    path: Path
    """A file, or a member of a tar in the notation of `data.storage`."""
    name: str
    """Path relative to the source, with ending."""
    lq_path: Path | None = None
    """Its low-quality partner."""
    note: Note = field(default_factory=Note)
    """The note beside it in the tar."""
    remarks: tuple[str, ...] = ()
    """Why parts of the tar's note were ignored."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Its folders, from the source down."""
        return PurePosixPath(self.name).parts[:-1]

    @property
    def stem(self) -> str:
        """Name without ending: the key unless a note gives one."""
        return PurePosixPath(self.name).with_suffix("").as_posix()


def find_items(source: Path) -> tuple[list[Item], dict[str, str]]:
    """Photographs below a folder (or in one tar) sorted by name, and by name the reason for each file left out.

    Raises:
        ValueError: if there is no photograph.
    """
    if not source.exists():
        raise ValueError(f"source {source} does not exist; give a folder or a .tar")
    items, unread = _all_items(source)
    items, reduced = _without_reduced(sorted(items, key=lambda item: item.name))
    items, lonely = _paired(items)
    if not items:
        why = f" ({next(iter((unread | lonely).values()))})" if unread | lonely else ""
        raise ValueError(
            f"source {source} holds no photograph{why}; endings looked for: {', '.join(sorted(SUFFIXES))}, .tar"
        )
    return items, unread | reduced | lonely


def folder_splits(items: Sequence[Item]) -> list[str]:
    """Split of each item from a folder named train or test/val, else empty. All are empty unless both kinds of folder
    occur."""
    splits = [split_of(item.folders) for item in items]
    return splits if {"train", "heldout"} <= set(splits) else [""] * len(items)


def _all_items(source: Path) -> tuple[list[Item], dict[str, str]]:
    """All photographs, and by name the reason for each file that looks like one and is left out."""
    if source.is_file():
        return _tar_items(source, "")
    items: list[Item] = []
    files, faults = files_below(source)
    faults = {Path(name).relative_to(source).as_posix(): fault for name, fault in faults.items()}
    for path in files:
        name, ending = path.relative_to(source).as_posix(), path.suffix.lower()
        if ending in SUFFIXES:
            items.append(Item(path, name))
        elif ending == ".tar":
            members, wrong = _tar_items(path, name + "/")
            items, faults = [*items, *members], faults | wrong
        elif ending in UNREAD_SUFFIXES:
            faults[name] = _format_fault(ending)
        elif _COMPRESSED.fullmatch(path.name):
            faults[name] = "tar: compressed; unpack it, or re-pack it without compression"
    return items, faults


def _format_fault(ending: str) -> str:
    return f"format: {ending} is not read; convert it to PNG or JPEG"


def _tar_items(tar: Path, prefix: str) -> tuple[list[Item], dict[str, str]]:
    """Photographs in a tar. As in WebDataset, members with the same name up to its first dot belong together."""
    notes: dict[str, Note] = {}
    remarks: dict[str, list[str]] = defaultdict(list)
    photographs: dict[str, tuple[str, Member]] = {}
    faults: dict[str, str] = {}
    try:
        for member in tar_members(tar):
            path = PurePosixPath(member.name)
            sample, ending = (path.parent / path.name.split(".")[0]).as_posix(), path.suffix.lower()
            if not member.is_file:
                if ending in SUFFIXES or ending in (".json", ".txt"):
                    faults[prefix + member.name] = (
                        "link: the tar holds a link or device there; re-pack it with the file"
                    )
            elif ending in SUFFIXES and sound_name(member.name.encode("utf-8", "replace").decode()):
                if member.name in photographs:
                    faults[f"{prefix}{member.name} (the first)"] = "name: the tar holds it again; the last counts"
                photographs[member.name] = (sample, member)
            elif ending in SUFFIXES:
                faults[prefix + member.name] = "name: '..', a leading '/' or a control character; re-pack the tar"
            elif ending in UNREAD_SUFFIXES:
                faults[prefix + member.name] = _format_fault(ending)
            elif ending in (".json", ".txt"):
                with open_bytes(member.path) as stream:
                    note, wrong = note_in_tar(stream.read(), ending)
                notes[sample] = notes.get(sample, {}) | note
                remarks[sample] += [f"{path.name}: {fault}" for fault in wrong]
    except ValueError as error:
        faults[prefix.rstrip("/") or tar.name] = f"tar: {error}"
    items = [
        Item(member.path, prefix + member.name, note=notes.get(sample, {}), remarks=tuple(remarks[sample]))
        for sample, member in photographs.values()
    ]
    return items, faults


def _without_reduced(items: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """Leave out reduced copies whose full-size folder lies beside them."""
    parents = {item.folders[:depth] for item in items for depth in range(1, len(item.folders) + 1)}
    full_beside = {folders[:-1] for folders in parents if _FULL.fullmatch(folders[-1])}
    kept, left_out = [], {}
    for item in items:
        levels = [n for n, name in enumerate(item.folders) if _REDUCED.fullmatch(name)]
        if any(item.folders[:n] in full_beside for n in levels):
            left_out[item.name] = "reduced: a smaller copy of a photograph beside it"
        else:
            kept.append(item)
    return kept, left_out


def _paired(items: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """Join ground truths with their low-quality partners; leaves out partners without a truth and ambiguous ones."""
    sides: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: {"truth": [], "low": []})
    for place, item in enumerate(items):
        side, common = _pair_side(item)
        if side:
            sides[common][side].append(place)
    partners: dict[int, int] = {}
    faults: dict[int, str] = {}
    for group in sides.values():
        lows, truths = group["low"], group["truth"]
        pairs, several = matched(*([PurePosixPath(items[place].name) for place in part] for part in (lows, truths)))
        partners |= {truths[truth]: lows[low] for low, truth in pairs}
        faults |= {lows[low]: why for low, why in several.items()}
    if not partners and not faults:  # folders named LR without truths: an unpaired set of low-quality photographs
        return list(items), {}
    taken = set(partners.values())
    alone = {place for group in sides.values() for place in group["low"]} - taken
    kept = [
        replace(item, lq_path=items[partners[place]].path) if place in partners else item
        for place, item in enumerate(items)
        if place not in taken | alone
    ]
    return kept, {items[place].name: faults.get(place, "partner: low quality without its truth") for place in alone}


def _pair_side(item: Item) -> tuple[str, tuple[str, ...]]:
    """The item's side ("truth", "low", or "" for neither), and the folders that both sides have in common."""
    stem = PurePosixPath(item.name).stem
    for side, pattern in (("truth", TRUTH_NAME), ("low", LOW_NAME)):
        if pattern.fullmatch(stem):
            return side, item.folders
    for depth in reversed(range(len(item.folders))):
        for side, names in (("truth", _TRUTH_FOLDERS), ("low", _LOW_FOLDERS)):
            if item.folders[depth].lower() in names:
                return side, (*item.folders[:depth], "", *item.folders[depth + 1 :])
    return "", ()
