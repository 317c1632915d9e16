"""Test sets in the layouts the field ships them in.

A paired set is two folders side by side (lq and gt, test_LR and test_HR, LR and HR, ...) or pairs of files in one
folder (NAME_LR4.png, NAME_HR.png); an unpaired one a folder of images, or `lq` in it. Files are read when their turn
comes; what cannot be used is named with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.evaluate.cases import Case

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
LQ_FOLDERS = ("lq", "lr", "test_lr", "lr_bicubic", "lq_x4", "lr_x4", "input", "low")
GT_FOLDERS = ("gt", "hr", "test_hr", "hr_x4", "target", "high")
_TAGS = re.compile(r"(_(lr|hr|lq|gt|x)\d?|x\d)+$", re.IGNORECASE)


@dataclass(frozen=True)
class NamedSet:
    """What a test set of this name is."""

    title: str
    """As the paper's table has it."""
    paired: bool
    usual_size: int
    """Images that the field's copy has; another number is said in the report."""


NAMED_SETS = {
    "realsr": NamedSet("RealSR", True, 100),
    "drealsr": NamedSet("DRealSR", True, 93),
    "ost_val": NamedSet("OST-Val", True, 300),
    "div2k_val": NamedSet("DIV2K-Val", True, 3000),
    "reallq250": NamedSet("RealLQ250", False, 250),
    "reallr200": NamedSet("RealLR200", False, 200),
}


class FolderSet(Sequence[Case]):
    """Cases of a folder, read one at a time."""

    def __init__(self, pairs: list[tuple[str, Path, Path | None]], upscale: int):
        self._pairs, self._upscale = pairs, upscale

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, place):  # type: ignore[override]
        """Reads the files. ValueError where one is broken or the two do not fit."""
        key, lq_path, gt_path = self._pairs[place]
        try:
            lq = decode_image(lq_path)
            gt = None if gt_path is None else decode_image(gt_path)
        except BrokenImage as error:
            raise ValueError(f"cannot be read ({error})") from None
        if gt is not None and gt.shape[:2] != (lq.shape[0] * self._upscale, lq.shape[1] * self._upscale):
            raise ValueError(f"truth {gt.shape[:2]} is not {self._upscale} x low quality {lq.shape[:2]}")
        return Case(key, lq, gt, index=place)

    def keys(self) -> list[str]:
        """Names in order."""
        return [key for key, _, _ in self._pairs]


def open_set(name: str, folder: Path, upscale: int) -> tuple[FolderSet, list[str]]:
    """The cases of a named set, of `paired` or `unpaired`, and remarks about it.

    ValueError for an unknown name, and for a folder that has no such layout.
    """
    if name not in NAMED_SETS and name not in ("paired", "unpaired"):
        raise ValueError(f"set={name!r} is none of {', '.join(NAMED_SETS)}, paired, unpaired; name one")
    if not folder.is_dir():
        raise ValueError(f"data={folder}: no such folder; name where the set lies")
    known = NAMED_SETS.get(name)
    paired = known.paired if known else name == "paired"
    cases = FolderSet(_paired(folder) if paired else _unpaired(folder), upscale)
    remarks = []
    if known and len(cases) != known.usual_size:
        remarks.append(f"{known.title} usually has {known.usual_size} images; {folder} has {len(cases)}")
    return cases, remarks


def stems(folder: Path) -> dict[str, Path]:
    """Image files directly in a folder, by name without ending and tag."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    return {plain_name(path): path for path in files}


def plain_name(path: Path) -> str:
    """`Canon_001_LR4.png` and `Canon_001_HR.png` -> `Canon_001`."""
    return _TAGS.sub("", path.stem) or path.stem


def _paired(folder: Path) -> list[tuple[str, Path, Path | None]]:
    for place in _places(folder):
        inside = {path.name.lower(): path for path in place.iterdir() if path.is_dir()}
        lq_folder = next((inside[name] for name in LQ_FOLDERS if name in inside), None)
        gt_folder = next((inside[name] for name in GT_FOLDERS if name in inside), None)
        if lq_folder is not None and gt_folder is not None:
            lqs, gts = stems(lq_folder), stems(gt_folder)
            common = [key for key in lqs if key in gts]
            if not common:
                raise ValueError(f"data={folder}: no name is in both {lq_folder} and {gt_folder}; make them agree")
            return [(key, lqs[key], gts[key]) for key in common]
    pairs = _pairs_of_files(folder)
    if not pairs:
        raise ValueError(
            f"data={folder}: no pairs; expected two folders such as lq and gt, test_LR and test_HR, or files "
            "NAME_LR4 and NAME_HR side by side"
        )
    return pairs


def _pairs_of_files(folder: Path) -> list[tuple[str, Path, Path | None]]:
    """NAME_LR4.png beside NAME_HR.png, however deep (RealSR's own layout)."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    truths = {plain_name(path): path for path in files if re.search(r"_(hr|gt)$", path.stem, re.IGNORECASE)}
    inputs = {plain_name(path): path for path in files if re.search(r"_(lr|lq)\d?$", path.stem, re.IGNORECASE)}
    return [(key, path, truths[key]) for key, path in inputs.items() if key in truths]


def _unpaired(folder: Path) -> list[tuple[str, Path, Path | None]]:
    inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    place = next((inside[name] for name in LQ_FOLDERS if name in inside), folder)
    files = stems(place)
    if not files:
        raise ValueError(f"data={folder}: no images there, nor in a folder lq; known endings: {', '.join(SUFFIXES)}")
    return [(key, path, None) for key, path in files.items()]


def _places(folder: Path) -> Iterator[Path]:
    """The folder and those in it, two levels deep."""
    yield folder
    for pattern in ("*", "*/*"):
        yield from sorted(path for path in folder.glob(pattern) if path.is_dir())
