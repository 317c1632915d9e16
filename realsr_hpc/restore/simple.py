"""Restoring from Python: `model = load("RUN_DIR or export"); model.restore(image).image.save("sr.png")`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc import runfolder
from realsr_hpc.artifacts.restoration import RestoredTile
from realsr_hpc.config.restoring import RESTORING
from realsr_hpc.data.decoding import upright_8_bit
from realsr_hpc.restore.image_files import read_picture
from realsr_hpc.restore.model import find_model, with_sampling
from realsr_hpc.restore.options import open_with_options
from realsr_hpc.restore.tiles import Restorer, RestoreSettings, restore_images


@dataclass(frozen=True)
class Result:
    """A restored image with the policy's reasoning."""

    image: Image.Image
    """RGB, the input's size times `upscale`."""
    tiles: tuple[RestoredTile, ...]
    """The policy's reasoning for each tile: the degradation that it named, its three texts, format faults."""


class Model:
    """An opened policy."""

    def __init__(self, restorer: Restorer, settings: RestoreSettings):
        self.restorer, self.settings = restorer, settings

    def restore(self, image: Image.Image | str | Path) -> Result:
        """Restore one image of any size.

        It is decoded as `realsr-hpc restore` decodes files: turned upright, scaled to 8 bits, transparency removed.
        BrokenImage, a ValueError, for a file that is not an image.
        """
        if isinstance(image, Image.Image):
            pixels = np.array(upright_8_bit(image).convert("RGB"))
        else:
            pixels = read_picture(Path(image)).rgb
        [found] = restore_images(self.restorer, [pixels], self.settings)
        return Result(Image.fromarray(found.image), found.tiles)


def load(path: str | Path, **options: str | int | float) -> Model:
    """Open a run folder (its newest checkpoint), a checkpoint, or a Hugging Face export of ours.

    options: those of the command `restore`, such as candidates=4, choose="mean", temperature=0.7, upscale=2.
    ValueError for a wrong option, and for a folder that is none of the three.
    """
    folder = Path(path)
    kind = "checkpoint" if runfolder.is_checkpoint(folder) else "export"
    kind = "run" if runfolder.checkpoints(folder).is_dir() else kind
    upscale = float(options.pop("upscale", 0.0))
    if unknown := sorted(set(options) - set(RESTORING)):
        raise ValueError(f"{unknown[0]}: not an option of restoring; the options are upscale, {', '.join(RESTORING)}")
    given = RESTORING | {name: str(value) for name, value in options.items()}
    config, checkpoint, name = find_model({kind: str(folder)})
    restorer, settings = open_with_options(
        given, with_sampling(config, given), checkpoint, name, upscale=upscale, steps=False
    )
    return Model(restorer, settings)
