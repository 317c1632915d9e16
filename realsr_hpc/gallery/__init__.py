"""One static HTML file to look at results with: rollouts of training, an evaluation, a folder of restored images.

`entries` reads what the other rooms wrote, `page` renders it with Jinja2. The file holds everything it shows, so it
can be opened from disk, mailed, or served; nothing is loaded from a network.
"""

from realsr_hpc.gallery.entries import Entry, Result, read_evaluation, read_restored, read_run
from realsr_hpc.gallery.page import render, write_page

__all__ = ["Entry", "Result", "read_evaluation", "read_restored", "read_run", "render", "write_page"]
