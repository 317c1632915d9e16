"""Reads published weights: recognises a format by its files and keys, and returns its tensors under our names.

Each format is one module with its detection and its conversion; `table` lists them. Tensors are read one at a time.
This room only reads: `export` writes.
"""

from realsr_hpc.formats.found import Found, FoundImage, FoundPolicy, Spec
from realsr_hpc.formats.place import Rotary
from realsr_hpc.formats.table import FORMATS, open_image, open_source

__all__ = ["FORMATS", "Found", "FoundImage", "FoundPolicy", "Rotary", "Spec", "open_image", "open_source"]
