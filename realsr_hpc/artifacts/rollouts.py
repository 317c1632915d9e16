"""Groups of rollouts that training saved for inspection: RUN_DIR/rollouts/step-N-KIND/rollouts.json and its images."""

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
    """One rollout with its scores."""

    degradation: Text | None
    texts: tuple[Text | None, ...]
    """Rough, middle and final text; None if malformed."""
    faults: tuple[Text, ...]
    reward: Number
    """Weighted total reward."""
    rewards: dict[Text, Number]
    """By term: the unweighted reward."""
    advantage: Number | None
    files: dict[Text, Inside]
    """By name (rough, middle, final): paths of the images relative to the folder."""


@dataclass(frozen=True)
class KeptGroup:
    """The rollouts of one prompt."""

    key: Text
    """The image's name in the manifest."""
    degradation: Text | None
    """The true degradation phrase."""
    captions: tuple[Text, ...] | None
    weights: dict[Text, Number]
    """Weights of the reward terms at this step."""
    files: dict[Text, Inside]
    """`input`, and `truth` if known: paths relative to the folder."""
    rollouts: tuple[KeptRollout, ...]


@dataclass(frozen=True)
class KeptRollouts:
    """The content of rollouts.json."""

    run: Text
    step: Whole
    kind: Literal["train", "heldout"]
    groups: tuple[KeptGroup, ...]
    version: int = VERSION


def write(folder: Path, kept: KeptRollouts) -> None:
    """Replace the folder's record; the images that it names must already exist."""
    stored.write(folder / FILE, kept)


def read(folder: Path) -> KeptRollouts:
    """Read the folder's record. Raises Damaged."""
    return stored.read(folder / FILE, KeptRollouts, VERSION)
