"""The images behind an evaluation's report: FOLDER/images.json and FOLDER/images/METHOD/KEY.png."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from realsr_hpc.artifacts import stored
from realsr_hpc.artifacts.stored import Inside, Number, Text, Whole

FILE = "images.json"
VERSION = 1
INPUT, TRUTH, FINAL = "input", "truth", "final"
"""Keys of `files`."""


@dataclass(frozen=True)
class MethodResult:
    """What one method made of an image."""

    metrics: dict[Text, Number]
    """NaN where one could not be computed."""
    files: dict[Text, Inside] = field(default_factory=dict)
    """Images by name (rough, middle, final), as paths from the folder; without an image, none."""
    degradation: Text | None = None
    """As the model named it."""
    texts: tuple[Text | None, ...] = ()
    """Empty: a method that does not reason."""
    faults: tuple[Text, ...] = ()
    not_computed: dict[Text, Text] = field(default_factory=dict)
    """Why, by metric."""
    further_draws: tuple[dict[Text, Number], ...] = ()
    """Metrics of the same method's other draws of this image."""

    @property
    def well_formed(self) -> bool:
        """Whether the method reasoned, in the grammar throughout."""
        return bool(self.texts) and not self.faults


@dataclass(frozen=True)
class EvaluatedImage:
    """An image with what every method made of it."""

    key: Text
    files: dict[Text, Inside]
    """`input`, and `truth` where it is known, as paths from the folder."""
    methods: dict[Text, MethodResult]
    degradation: Text | None = None
    """The true phrase."""
    captions: tuple[Text, ...] | None = None
    word: Text | None = None
    """The word that the image shows, where it is known."""
    weights: dict[Text, Number] = field(default_factory=dict)
    """Of the recipe's reward terms; empty without rewards."""
    index: Whole = 0

    def total(self, result: MethodResult) -> float | None:
        """The weighted reward of a result. None without rewards, and of a malformed trace.

        Training counts other values for a malformed trace than those that an evaluation measures.
        """
        terms = {f"reward_{term}": weight for term, weight in self.weights.items()}
        values = {name: result.metrics.get(name, float("nan")) for name in terms}
        if not terms or not result.well_formed or any(value != value for value in values.values()):
            return None
        return sum(weight * values[name] for name, weight in terms.items())


@dataclass(frozen=True)
class Evaluation:
    """What images.json holds."""

    set_name: Text
    images: tuple[EvaluatedImage, ...]
    version: int = VERSION


def write(folder: Path, evaluation: Evaluation) -> None:
    """Replace the folder's record; the images it names are there already."""
    stored.write(folder / FILE, evaluation)


def read(folder: Path) -> Evaluation:
    """Raises Damaged. Before there was a version, the file was the list of images alone."""
    path = folder / FILE
    content = stored.load(path)
    return stored.checked(
        path, {"set_name": "", "images": content} if isinstance(content, list) else content, Evaluation, VERSION
    )
