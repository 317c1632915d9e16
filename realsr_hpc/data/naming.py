"""Rules for files in folders, shared by all commands: listing files, naming results, matching pairs.

A short name (without suffix, without tag) is used only if it stays unique.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

from realsr_hpc.files import printable

_TAG = re.compile(r"(_(lr|hr|lq|gt)\d*|(_|(?<=\d))x\d)+$", re.IGNORECASE)
TRUTH_NAME = re.compile(r".+_(?:hr|gt)", re.IGNORECASE)
"""Names (without suffix) of truths in a folder that has both files of a pair."""
LOW_NAME = re.compile(r".+_(?:lr|lq)(\d*)", re.IGNORECASE)
"""Names of low-quality images there; the group is their factor, or empty."""
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_TRAIN_WORDS = frozenset({"train", "training", "trainset"})
_HELDOUT_WORDS = frozenset({"test", "testing", "testset", "val", "valid", "validation", "heldout"})
_NOT_UTF_8 = "bytes:"


def files_below(root: Path) -> tuple[list[Path], dict[str, str]]:
    """Files below a folder, sorted by path; and by path the reason why a folder or link could not be read.

    Linked folders are listed once, so loops end. A file that is reachable by two paths is listed under the real one.
    Pipes, sockets and devices are not files: reading them might never end.
    """
    found: list[Path] = []
    faults: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    waiting, linked = [root], []
    while waiting or linked:
        folder = waiting.pop(0) if waiting else linked.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            faults[str(folder)] = f"folder: {error.strerror}"
            continue
        for entry in inside:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
                is_dead = entry.is_symlink() and not os.path.exists(entry.path)
            except OSError as error:  # a link to itself, or through a folder without permission
                faults[entry.path] = f"link: {error.strerror}"
                continue
            if is_folder:
                (linked if entry.is_symlink() else waiting).append(Path(entry.path))
            elif is_file or is_dead:  # a dead link is listed, and later reported as missing
                found.append(Path(entry.path))
            else:
                faults[entry.path] = "special: a pipe, socket or device; name regular files"
    return sorted(found), faults


def distinct(candidates: Sequence[Sequence[str]], reserved: Collection[str] = ()) -> list[str]:
    """A different name for each item: the first of its candidates that no other item uses and that is not reserved.

    The last candidates of the items must differ.
    """
    level = [0] * len(candidates)
    while True:
        names = [options[place] for options, place in zip(candidates, level, strict=True)]
        uses: dict[str, list[int]] = defaultdict(list)
        for place, name in enumerate(names):
            uses[name].append(place)
        shared = [place for name, places in uses.items() if len(places) > 1 or name in reserved for place in places]
        movable = [place for place in shared if level[place] + 1 < len(candidates[place])]
        if not movable:
            return names
        for place in movable:
            level[place] += 1


def without_endings(names: Sequence[str]) -> list[str]:
    """Paths without their suffixes; paths that would become equal keep them."""
    return distinct([(PurePosixPath(name).with_suffix("").as_posix(), name) for name in names])


def flat_names(names: Sequence[str], files: Sequence[str] | None = None) -> list[str]:
    """Printable names for files in a single folder: without folders, or with as many as are needed to be distinct.

    files: distinct strings that separate names which print alike; default: the names themselves.
    """
    options = []
    for name, file in zip(names, files or names, strict=True):
        parts = PurePosixPath(name).parts
        joined = [printable("_".join(parts[-count:])) for count in range(1, len(parts) + 1)]
        options.append([*joined, quote(os.fsencode(file), safe="")])
    return distinct(options)


def split_of(folders: Sequence[str]) -> str:
    """`train`, `heldout` or "", by whole words in the name of the innermost folder that has one.

    `OutdoorSceneTest300` is a test set, `contest` is not.
    """
    for folder in reversed(folders):
        words = {word.lower() for word in _WORDS.findall(folder)}
        if words & _TRAIN_WORDS:
            return "train"
        if words & _HELDOUT_WORDS:
            return "heldout"
    return ""


def plain_stem(path: PurePath) -> str:
    """`Canon_001_LR4.png` and `Canon_001_HR.png` -> `Canon_001`; `0001x4.png` -> `0001`."""
    return _TAG.sub("", path.stem) or path.stem


RULES: tuple[Callable[[PurePath], Hashable], ...] = (
    lambda path: path.name,
    lambda path: path.stem,
    plain_stem,
)
"""Rules for matching the names of the two files of a pair, the strictest first."""


def matched(lows: Sequence[PurePath], truths: Sequence[PurePath]) -> tuple[list[tuple[int, int]], dict[int, str]]:
    """Pairs of positions (low, truth); and by position the fault of each low whose truth is ambiguous.

    Whole names are matched first, then names without suffix, then without tags. So `box1` .. `box4` stay four images if
    both folders have them. A low without a truth is in neither result.
    """
    pairs, several = [], {}
    left, right = list(range(len(lows))), list(range(len(truths)))
    for rule in RULES:
        ours, theirs = _by(rule, lows, left), _by(rule, truths, right)
        for name in ours.keys() & theirs.keys():
            if len(ours[name]) == len(theirs[name]) == 1:
                pairs.append((ours[name][0], theirs[name][0]))
            elif rule is plain_stem:
                names = ", ".join(
                    sorted({lows[place].name for place in ours[name]} | {truths[p].name for p in theirs[name]})
                )
                several |= dict.fromkeys(ours[name], f"pair: which of {names} belong together?")
        left = [place for place in left if place not in {low for low, _ in pairs}]
        right = [place for place in right if place not in {truth for _, truth in pairs}]
    return sorted(pairs), several


def _by(rule: Callable[[PurePath], Hashable], paths: Sequence[PurePath], places: Sequence[int]) -> dict:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for place in places:
        found[rule(paths[place])].append(place)
    return found


def as_text(path: str) -> str:
    """A path as valid Unicode for tables. One that is not UTF-8 becomes `bytes:` and percent-encoded bytes."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return _NOT_UTF_8 + quote_from_bytes(os.fsencode(path))
    return _NOT_UTF_8 + quote(path) if path.startswith(_NOT_UTF_8) else path


def from_text(text: str) -> str:
    """The inverse of `as_text`."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_NOT_UTF_8))) if text.startswith(_NOT_UTF_8) else text
