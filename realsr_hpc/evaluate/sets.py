"""Opens test sets in their published layouts.

A paired set is two folders side by side (lq and gt, test_LR and test_HR, LR and HR, ...) or pairs of files in one
folder (NAME_LR4.png, NAME_HR.png). An unpaired set is a folder of images, or its subfolder `lq`. Files are read one at
a time; files that cannot be used are reported with the reason. In RealSR as released (version 3: Canon and Nikon, Train
and Test, folders 2, 3, 4) low-quality images are as large as their truths; they are averaged down first, as in
training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath

from realsr_hpc.config.test_sets import NAMED_SETS, refuse_unknown_set
from realsr_hpc.data.decoding import SUFFIXES, UNREAD_SUFFIXES, BrokenImage, decode_image
from realsr_hpc.data.naming import LOW_NAME, TRUTH_NAME, files_below, flat_names, matched, plain_stem, split_of
from realsr_hpc.data.samples import fitted
from realsr_hpc.files import printable
from realsr_hpc.records import Case

LQ_FOLDERS = ("lq", "lr", "test_lr", "lr_bicubic", "lq_x4", "lr_x4", "input", "low")
GT_FOLDERS = ("gt", "hr", "test_hr", "hr_x4", "target", "high")
Pair = tuple[Path, Path]


class FolderSet(Sequence[Case]):
    """Cases of a folder, read one at a time."""

    def __init__(
        self, pairs: list[tuple[str, Path, Path | None]], upscale: int, unread: Mapping[str, str] | None = None
    ):
        """pairs: key, low-quality file and truth of each case. unread: by file, why it cannot be a case."""
        self._pairs, self._upscale, self.unread = pairs, upscale, dict(unread or {})

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, place):  # type: ignore[override]
        """Read a case. ValueError if a file is damaged or the sizes do not fit."""
        key, lq_path, gt_path = self._pairs[place]
        try:
            lq, gt = decode_image(lq_path), None
            if gt_path is not None:
                lq, gt = fitted(lq, decode_image(gt_path), self._upscale)
        except BrokenImage as error:
            raise ValueError(f"cannot be read ({error})") from None
        return Case(key, lq, gt, index=place)

    def keys(self) -> list[str]:
        """Keys of the cases, in order."""
        return [key for key, _, _ in self._pairs]


def open_set(name: str, folder: Path, upscale: int) -> tuple[FolderSet, list[str]]:
    """The cases of a named set, or of a set called `paired` or `unpaired`, and remarks for the report.

    Raises:
        ValueError: for an unknown name, or if the folder does not have the set's layout.
    """
    refuse_unknown_set(name)
    if not folder.is_dir():
        raise ValueError(f"data={folder}: no such folder; name where the set lies")
    known = NAMED_SETS.get(name)
    paired = known.paired if known else name == "paired"
    remarks: list[str] = []
    unread: dict[str, str] = {}
    found = (
        _paired(folder, upscale, remarks, unread, only_test=known is not None) if paired else _unpaired(folder, unread)
    )
    if known and len(found) != known.usual_size:
        remarks.append(f"{known.title} usually has {known.usual_size} images; {folder} has {len(found)}")
    return FolderSet(found, upscale, unread), remarks


def images_below(folder: Path, unread: dict[str, str]) -> list[Path]:
    """Images below a folder; adds to `unread` the files that cannot be read, with the reason."""
    files, faults = files_below(folder)
    unread |= {printable(name): why for name, why in faults.items()}
    for path in files:
        if path.suffix.lower() in UNREAD_SUFFIXES:
            unread[printable(path)] = f"format: {path.suffix} is not read; convert it to PNG or JPEG"
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _paired(
    folder: Path, upscale: int, remarks: list[str], unread: dict[str, str], *, only_test: bool
) -> list[tuple[str, Path, Path | None]]:
    """Key and files of each pair, from the first two folders side by side, or from files side by side.

    ValueError if there are no pairs, or the pairing is ambiguous.
    """
    files = images_below(folder, unread)
    pairs = _of_folders(folder, files, remarks, only_test) or _of_files(folder, files, upscale, remarks, only_test)
    if not pairs:
        raise ValueError(
            f"data={folder}: no pairs; expected two folders such as lq and gt, test_LR and test_HR, or files "
            "NAME_LR4 and NAME_HR side by side"
        )
    keys = [_shared_name(low, truth).relative_to(folder).as_posix() for low, truth in pairs]
    named = flat_names(keys, [low.relative_to(folder).as_posix() for low, _ in pairs])
    return [(key, low, truth) for key, (low, truth) in zip(named, pairs, strict=True)]


def _shared_name(low: Path, truth: Path) -> Path:
    return truth.with_name(truth.stem if low.stem == truth.stem else plain_stem(truth))


def _of_folders(folder: Path, files: Sequence[Path], remarks: list[str], only_test: bool) -> list[Pair]:
    """Pairs of the first place that holds both folders; other places are named."""
    sides: dict[Path, dict[str, dict[PurePath, list[Path]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        for depth, name in list(enumerate(parts))[:3]:
            side = "low" if name.lower() in LQ_FOLDERS else "truth" if name.lower() in GT_FOLDERS else ""
            if side:
                inner = sides.setdefault(folder.joinpath(*parts[:depth]), {}).setdefault(side, defaultdict(list))
                inner[PurePath(*parts[depth + 1 :])].append(file)
                break
    places = [place for place, both in sorted(sides.items()) if len(both) == 2]
    if only_test:
        places.sort(key=lambda place: split_of(place.relative_to(folder).parts) == "train")
    for place in places:
        found = sides[place]
        pairs = [
            pair
            for inner in sorted(found["low"].keys() & found["truth"].keys())
            for pair in _matched(found["low"][inner], found["truth"][inner])
        ]
        if pairs:
            others = [str(other) for other in places if other != place]
            remarks += [f"pairs of {place} are used; left out: {', '.join(others)}"] if others else []
            return pairs
    if places:
        raise ValueError(f"data={folder}: no name is in both folders of {places[0]}; make them agree")
    return []


def _of_files(folder: Path, files: Sequence[Path], upscale: int, remarks: list[str], only_test: bool) -> list[Pair]:
    """Pairs NAME_LR4.png and NAME_HR.png in the same folder, at any depth (the layout of RealSR).

    If names state a factor, those of another factor than `upscale` are left out. only_test: leave out the training
    part of the set.
    """
    lows = [path for path in files if LOW_NAME.fullmatch(path.stem)]
    other = [path for path in lows if LOW_NAME.fullmatch(path.stem)[1] not in ("", str(upscale))]  # type: ignore[index]
    lows = [path for path in lows if path not in set(other)]
    if other:
        remarks.append(
            f"left out: {len(other)} low-quality images of another factor than {upscale}, first {other[0].name}"
        )
    splits = {path: split_of(path.relative_to(folder).parts[:-1]) for path in lows}
    if only_test and {"train", "heldout"} <= set(splits.values()):
        trained = [path for path in lows if splits[path] == "train"]
        remarks.append(f"left out: {len(trained)} pairs of the set's training part")
        lows = [path for path in lows if splits[path] != "train"]
    pairs: list[Pair] = []
    for parent in dict.fromkeys(path.parent for path in lows):
        truths = [path for path in files if path.parent == parent and TRUTH_NAME.fullmatch(path.stem)]
        pairs += _matched([path for path in lows if path.parent == parent], truths)
    return pairs


def _matched(lows: Sequence[Path], truths: Sequence[Path]) -> list[Pair]:
    pairs, several = matched(lows, truths)
    if several:
        place, why = next(iter(several.items()))
        raise ValueError(f"{lows[place].parent}: {why} Rename them, or name another folder")
    return [(lows[low], truths[truth]) for low, truth in pairs]


def _unpaired(folder: Path, unread: dict[str, str]) -> list[tuple[str, Path, Path | None]]:
    inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    place = next((inside[name] for name in LQ_FOLDERS if name in inside), folder)
    files = images_below(place, unread)
    if not files:
        raise ValueError(
            f"data={folder}: no images found, nor in a folder lq; known endings: {', '.join(sorted(SUFFIXES))}"
        )
    return [(key, path, None) for key, path in zip(names_of(files, place), files, strict=True)]


def names_of(files: Sequence[Path], folder: Path) -> list[str]:
    """A unique name for each file: without folders and suffix, unless two names would then be equal."""
    paths = [PurePosixPath(file.relative_to(folder).as_posix()) for file in files]
    return flat_names([path.with_suffix("").as_posix() for path in paths], [path.as_posix() for path in paths])
