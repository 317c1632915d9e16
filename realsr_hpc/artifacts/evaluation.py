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
    """One method's result for an image."""

    metrics: dict[Text, Number]
    """By metric; NaN if it could not be computed."""
    files: dict[Text, Inside] = field(default_factory=dict[str, str])
    """By name (rough, middle, final): paths of the images relative to the folder; empty if there are none."""
    degradation: Text | None = None
    """The degradation phrase that the model wrote."""
    texts: tuple[Text | None, ...] = ()
    """The model's three texts; empty for a method without reasoning."""
    faults: tuple[Text, ...] = ()
    not_computed: dict[Text, Text] = field(default_factory=dict[str, str])
    """By metric: why it could not be computed."""
    further_draws: tuple[dict[Text, Number], ...] = ()
    """Metrics of the method's further draws for this image, one mapping per draw."""

    @property
    def well_formed(self) -> bool:
        """Whether the method reasoned and its trace is well formed."""
        return bool(self.texts) and not self.faults


@dataclass(frozen=True)
class EvaluatedImage:
    """An image with the results of all methods."""

    key: Text
    files: dict[Text, Inside]
    """`input`, and `truth` if known: paths relative to the folder."""
    methods: dict[Text, MethodResult]
    degradation: Text | None = None
    """The true degradation phrase."""
    captions: tuple[Text, ...] | None = None
    word: Text | None = None
    """The word that the image shows, if known."""
    weights: dict[Text, Number] = field(default_factory=dict[str, float])
    """Weights of the recipe's reward terms; empty if rewards were not scored."""
    index: Whole = 0

    def total(self, result: MethodResult) -> float | None:
        """The weighted reward of a result; None without rewards or if the trace is malformed.

        For a malformed trace training uses other values than those that an evaluation measures.
        """
        terms = {f"reward_{term}": weight for term, weight in self.weights.items()}
        values = {name: result.metrics.get(name, float("nan")) for name in terms}
        if not terms or not result.well_formed or any(value != value for value in values.values()):
            return None
        return sum(weight * values[name] for name, weight in terms.items())


@dataclass(frozen=True)
class Evaluation:
    """The content of images.json."""

    set_name: Text
    images: tuple[EvaluatedImage, ...]
    version: int = VERSION


def write(folder: Path, evaluation: Evaluation) -> None:
    """Replace the folder's record; the images that it names must already exist."""
    stored.write(folder / FILE, evaluation)


def read(folder: Path) -> Evaluation:
    """Read the folder's record, also of the first version, which was a bare list of images. Raises Damaged."""
    path = folder / FILE
    content = stored.load(path)
    return stored.checked(
        path, {"set_name": "", "images": content} if isinstance(content, list) else content, Evaluation, VERSION
    )
