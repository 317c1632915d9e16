"""Writes a static HTML file that shows results: rollouts of training, an evaluation, or a folder of restored images.

`entries` reads the files that other rooms wrote, `page` renders them with Jinja2. All images are embedded in the file,
so it can be opened from disk, mailed or served, and loads nothing from a network.
"""

from realsr_hpc.gallery.entries import Entry, Result, read_evaluation, read_restored, read_run
from realsr_hpc.gallery.page import render, write_page

__all__ = ["Entry", "Result", "read_evaluation", "read_restored", "read_run", "render", "write_page"]
