"""Groups of rollouts that training kept for people: RUN_DIR/rollouts/step-N-KIND/rollouts.json and its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realsr_hpc.artifacts import stored
from realsr_hpc.artifacts.stored import Inside, Number, Text, Whole

FILE = "rollouts.json"
VERSION = 1


@dataclass(frozen=True)
class KeptRollout:
    """One rollout, as it was scored."""

    degradation: Text | None
    texts: tuple[Text | None, ...]
    """Rough, middle, final; None where malformed."""
    faults: tuple[Text, ...]
    reward: Number
    """Weighted total."""
    rewards: dict[Text, Number]
    """Unweighted, by term."""
    advantage: Number | None
    files: dict[Text, Inside]
    """Images by name (rough, middle, final), as paths from the folder."""


@dataclass(frozen=True)
class KeptGroup:
    """The rollouts of one prompt."""

    key: Text
    """The image's name in the manifest."""
    degradation: Text | None
    """The true phrase."""
    captions: tuple[Text, ...] | None
    weights: dict[Text, Number]
    """Of the reward terms at this step."""
    files: dict[Text, Inside]
    """`input`, and `truth` where it is known."""
    rollouts: tuple[KeptRollout, ...]


@dataclass(frozen=True)
class KeptRollouts:
    """What rollouts.json holds."""

    run: Text
    step: Whole
    kind: Literal["train", "heldout"]
    groups: tuple[KeptGroup, ...]
    version: int = VERSION


def write(folder: Path, kept: KeptRollouts) -> None:
    """Replace the folder's record; the images it names are there already."""
    stored.write(folder / FILE, kept)


def read(folder: Path) -> KeptRollouts:
    """Raises Damaged."""
    return stored.read(folder / FILE, KeptRollouts, VERSION)
