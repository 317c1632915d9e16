"""Public weight formats: recognised by their files and keys, read one tensor at a time under our names.

Each format has one file with its detection and conversion; `table` lists them. None of these formats is written.
"""

from realsr_hpc.formats.found import Found, FoundImage, FoundPolicy, Spec
from realsr_hpc.formats.place import Rotary
from realsr_hpc.formats.table import FORMATS, open_image, open_source

__all__ = ["FORMATS", "Found", "FoundImage", "FoundPolicy", "Rotary", "Spec", "open_image", "open_source"]
