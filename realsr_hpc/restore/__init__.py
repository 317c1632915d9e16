"""Restores low-quality images with a policy and records its reasoning.

`image_folder` processes files, `tiles` cuts and blends an image, `candidates` chooses among several results, `colour`
transfers the input's colours, `image_files` reads and writes image formats, `model` opens a run or an export, `options`
does so from a command's options, and `simple` from Python.
"""

from realsr_hpc.restore.candidates import BestOf, Chosen
from realsr_hpc.restore.image_files import Picture, find_images, read_picture
from realsr_hpc.restore.image_folder import RestoreTally, inputs_of, restore_folder
from realsr_hpc.restore.model import find_checkpoint, find_model, open_restorer, with_sampling
from realsr_hpc.restore.options import open_with_options
from realsr_hpc.restore.simple import Model, Result, load
from realsr_hpc.restore.tiles import Blended, Restorer, RestoreSettings, restore_cases, restore_images, tile_starts

__all__ = [
    "Model",
    "Result",
    "BestOf",
    "Blended",
    "Chosen",
    "Picture",
    "RestoreTally",
    "RestoreSettings",
    "Restorer",
    "find_images",
    "find_checkpoint",
    "find_model",
    "inputs_of",
    "load",
    "open_restorer",
    "open_with_options",
    "read_picture",
    "restore_cases",
    "restore_folder",
    "restore_images",
    "tile_starts",
    "with_sampling",
]
