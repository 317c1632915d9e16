"""Weights that others publish: recognised by their files and keys, read one tensor at a time under our names.

One file a format, its detection beside its conversion, and one table of them. Left out: writing any of these formats.
"""

from realsr_hpc.formats.found import Found, FoundImage, FoundPolicy, Spec
from realsr_hpc.formats.place import Rotary
from realsr_hpc.formats.table import FORMATS, open_image, open_source

__all__ = ["FORMATS", "Found", "FoundImage", "FoundPolicy", "Rotary", "Spec", "open_image", "open_source"]
