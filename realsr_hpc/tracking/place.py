"""Records where a run was launched, so that it is recognised after its folder or the output root was moved."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.load import from_yaml
from realsr_hpc.config.places import moved_below, output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import read_json, write_atomically


@dataclass(frozen=True)
class Place:
    """Absolute paths of a run, its output root and the checkout at launch."""

    folder: str
    """The run's folder."""
    root: str
    """The output root, which contains MLflow's default store."""
    checkout: str = ""
    """The checkout from which relative paths in the recipe are resolved, after the snapshot."""


def write_place(run_dir: Path, place: Place) -> None:
    """Record where a run is launched."""
    write_atomically(runfolder.place(run_dir), json.dumps(asdict(place)))


def read_place(run_dir: Path) -> Place | None:
    """Where the run was launched last; None if unknown."""
    place = read_json(runfolder.place(run_dir), Place)
    return place if place and os.path.isabs(place.folder) and os.path.isabs(place.root) else None


def moved_to(path: Path, run_dir: Path) -> Path:
    """Present location of `path`, which was below the run's folder or its output root when the run was launched."""
    place = read_place(run_dir)
    if os.path.exists(path) or place is None:  # Path.exists would raise for a damaged path with a null byte
        return path
    if path.is_relative_to(place.folder):
        return run_dir / path.relative_to(place.folder)
    return _root_now(place, run_dir) / path.relative_to(place.root) if path.is_relative_to(place.root) else path


def _root_now(place: Place, run_dir: Path) -> Path:
    """The present output root, at the same relative position to the run's folder as at launch."""
    return (run_dir.resolve() / os.path.relpath(place.root, place.folder)).resolve()


def recipe_of(run_dir: Path) -> RunConfig:
    """A run's recipe with the present output root, also if the run was moved. RecipeError if missing or invalid.

    Paths below the former output root that no longer exist are changed to the present one.
    """
    config = from_yaml(runfolder.recipe(run_dir))
    written, place = output_root(config), read_place(run_dir)
    place = place or Place(str(written / run_dir.name), str(written))
    folder = Path(place.folder)
    if os.path.exists(folder) and folder.samefile(run_dir):
        return config.model_copy(update={"output_root": str(written)})
    root = _root_now(place, run_dir)
    moved = moved_below(config.model_dump(mode="json"), Path(place.root), root)
    return RunConfig.model_validate(moved).model_copy(update={"output_root": str(root)})
