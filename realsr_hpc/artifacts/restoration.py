"""The files that accompany a restored image NAME.png: NAME.json (its record) and NAME.steps.jpg (a figure).

A folder of restored images holds the settings that made them in restore.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.artifacts import stored
from realsr_hpc.artifacts.stored import Flag, Number, Text, Whole

SETTINGS_FILE = "restore.json"
STEPS_SUFFIX = ".steps.jpg"
VERSION = 1


@dataclass(frozen=True)
class RestoredTile:
    """The model's reasoning about one tile."""

    top: Whole
    left: Whole
    """Its upper left corner in the input, in px."""
    well_formed: Flag
    bicubic: Flag
    """Whether the tile was upscaled bicubically, because the model gave no image."""
    degradation: Text | None
    texts: tuple[Text | None, ...]
    """Rough, middle and final text; None if malformed."""
    faults: tuple[Text, ...]
    chosen: Whole | None = None
    """Number of the chosen candidate, or -1 for the mean of all."""
    scores: tuple[Number, ...] = ()
    """Score of each candidate; NaN for one without an image."""


@dataclass(frozen=True)
class Restoration:
    """The content of NAME.json."""

    tiles: tuple[RestoredTile, ...]
    input: Text = ""
    """Path of the input, relative to this file or absolute."""
    input_sha256: Text = ""
    """SHA-256 of the input's content, because the file may have been replaced since."""
    output: Text = ""
    source: Text = ""
    """The model and its sampling settings."""
    version: int = VERSION


def record_file(target: Path) -> Path:
    """NAME.json of a restored image's NAME.png."""
    return target.with_suffix(".json")


def steps_file(target: Path) -> Path:
    """NAME.steps.jpg of a restored image's NAME.png."""
    return target.with_suffix(STEPS_SUFFIX)


def is_steps(path: Path) -> bool:
    """Whether an image file is a NAME.steps.jpg rather than a result."""
    return path.name.endswith(STEPS_SUFFIX)


def write(target: Path, restoration: Restoration) -> None:
    """Write the record of the restored image `target`."""
    stored.write(record_file(target), restoration)


def read(target: Path) -> Restoration:
    """Read the record of the restored image `target`. Raises Damaged, also for another program's NAME.json."""
    found = stored.read(record_file(target), Restoration, VERSION)
    if not found.tiles:
        raise stored.Damaged(f"{record_file(target)}: it lists no tiles")
    return found
