"""What lies below a source: photographs, their low-quality partners, and what the folders' names say.

| layout | what is understood |
|---|---|
| any folder | every image below it |
| LSDIR, DIV2K | `HR` is read; its reduced copies beside it (`X2`, `X3`, `X4`, `*_LR_*`) are left out |
| FFHQ | `images1024x1024`; the thumbnails beside it are left out |
| OST | `*Train*` and `*Test*` decide the split; the category folder can be the tag (`tagger=folder`) |
| RealSR, DRealSR | `NAME_HR.png` with `NAME_LR4.png` (or `_GT`, `_LQ`) beside it: a pair |
| pair folders | `gt`/`HR`/`test_HR` with `lq`/`LR`/`test_LR` beside it, equal names: pairs |
| WebDataset | `*.tar`, uncompressed: members that are images; `.json`, `.txt` of the same name are their notes |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from realsr_hpc.data.storage import Member, open_bytes, tar_members
from realsr_hpc.prepare.notes import Note, note_in_tar

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TRUTH_FOLDERS = frozenset({"gt", "hr", "test_hr"})
_LOW_FOLDERS = frozenset({"lq", "lr", "test_lr"})
_TRUTH_NAME = re.compile(r"(.+)_(?:HR|GT)", re.IGNORECASE)
_LOW_NAME = re.compile(r"(.+)_(?:LR|LQ)\d*", re.IGNORECASE)
_REDUCED = re.compile(r"x[2348]|.*_LR_.*|thumbnails\d+x\d+", re.IGNORECASE)
_FULL = re.compile(r"HR|.*_HR|images\d+x\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One photograph of a source."""

    path: Path
    """File, or member of a tar as `storage` writes it."""
    name: str
    """Path from the source, with ending."""
    lq_path: Path | None = None
    note: Note = field(default_factory=dict)
    """From the tar."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders from the source down."""
        return PurePosixPath(self.name).parts[:-1]

    @property
    def stem(self) -> str:
        """Name without ending: the key where a note gives none."""
        return PurePosixPath(self.name).with_suffix("").as_posix()


def find_items(source: Path) -> tuple[list[Item], dict[str, str]]:
    """Photographs below a folder (or in one tar), sorted by name, and what was left out with the reason, by name.

    Raises:
        ValueError: if there is no photograph.
    """
    if not source.exists():
        raise ValueError(f"source {source} does not exist; give a folder or a .tar")
    items = sorted(_all_items(source), key=lambda item: item.name)
    items, left_out = _without_reduced(items)
    items, lonely = _paired(items)
    if not items:
        raise ValueError(
            f"source {source} holds no photograph; endings looked for: {', '.join(sorted(SUFFIXES))}, .tar"
        )
    return items, left_out | lonely


def folder_splits(items: Sequence[Item]) -> list[str]:
    """Each item's split by a folder called train or test/val, empty where none is; only where both kinds occur."""
    splits = [_split_by_folder(item.folders) for item in items]
    return splits if {"train", "heldout"} <= set(splits) else [""] * len(items)


def _split_by_folder(folders: Sequence[str]) -> str:
    for folder in (name.lower() for name in reversed(folders)):
        if "train" in folder:
            return "train"
        if folder.startswith("val") or "test" in folder or "heldout" in folder:
            return "heldout"
    return ""


def _all_items(source: Path) -> Iterator[Item]:
    if source.is_file():
        yield from _tar_items(source, "")
        return
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield Item(path, name)
        elif path.suffix.lower() == ".tar" and path.is_file():
            yield from _tar_items(path, name + "/")


def _tar_items(tar: Path, prefix: str) -> Iterator[Item]:
    """Members of one name up to the first dot of the file name belong together, as WebDataset has it."""
    notes: dict[str, Note] = {}
    photographs: list[tuple[str, Member]] = []
    for member in tar_members(tar):
        path = PurePosixPath(member.name)
        sample, ending = (path.parent / path.name.split(".")[0]).as_posix(), path.suffix.lower()
        if ending in SUFFIXES:
            photographs.append((sample, member))
        elif ending in (".json", ".txt"):
            with open_bytes(member.path) as stream:
                notes[sample] = notes.get(sample, {}) | note_in_tar(stream.read(), ending)
    for sample, member in photographs:
        yield Item(member.path, prefix + member.name, note=notes.get(sample, {}))


def _without_reduced(items: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """Leave out reduced copies where the full size lies beside them."""
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
    """Truths with their partners; a partner without a truth is left out."""
    sides = [_pair_side(item) for item in items]
    truths = {key for side, key in sides if side == "truth"}
    low = {key: item for (side, key), item in zip(sides, items, strict=True) if side == "low" and key in truths}
    alone = [item for (side, key), item in zip(sides, items, strict=True) if side == "low" and key not in truths]
    if not low:  # folders called LR without truths are a set of low-quality photographs of its own
        return list(items), {}
    kept = []
    for (side, key), item in zip(sides, items, strict=True):
        if side != "low":
            partner = low.get(key) if side == "truth" else None
            kept.append(replace(item, lq_path=partner.path) if partner else item)
    return kept, {item.name: "partner: low quality without its truth" for item in alone}


def _pair_side(item: Item) -> tuple[str, tuple[str, ...]]:
    """("truth" | "low" | "", what both sides have in common)."""
    stem = PurePosixPath(item.name).stem
    for side, pattern in (("truth", _TRUTH_NAME), ("low", _LOW_NAME)):
        if match := pattern.fullmatch(stem):
            return side, (*item.folders, match[1])
    for depth in reversed(range(len(item.folders))):
        for side, names in (("truth", _TRUTH_FOLDERS), ("low", _LOW_FOLDERS)):
            if item.folders[depth].lower() in names:
                return side, (*item.folders[:depth], "", *item.folders[depth + 1 :], stem)
    return "", ()
